"""The command as a script or another program sees it: help, and the machine form of a plan."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pbkd import __version__
from pipelines.cli import main

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "pipelines" / "recipes"
PLAN_KEYS = [
    "name",
    "kind",
    "key",
    "state",
    "reason",
    "from",
    "teacher",
    "params",
    "macs",
    "params_ratio",
    "macs_ratio",
]


def plan(capfd: pytest.CaptureFixture[str], recipe: str, *arguments: str) -> dict[str, Any]:
    assert main(["plan", str(RECIPES / recipe), "--json", *arguments]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    report: dict[str, Any] = json.loads(out)
    assert list(report) == ["recipe", "stages"]
    return report


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PBKD_DATA", str(tmp_path / "no-data"))
    monkeypatch.setenv("PBKD_STORE", str(tmp_path / "no-store"))


def test_the_plan_for_cifar100_has_the_published_ratios_without_the_data(
    capfd: pytest.CaptureFixture[str],
) -> None:
    report = plan(capfd, "cifar100_vgg16.yaml")
    assert report["recipe"] == "cifar100_vgg16"
    rows = {row["name"]: row for row in report["stages"]}
    blocks = [rows[f"blocks.{number}"] for number in range(1, 6)]
    assert [round(row["macs_ratio"], 3) for row in blocks] == [1.089, 1.233, 1.616, 2.345, 2.693]
    assert [round(row["params_ratio"], 3) for row in blocks] == [1.001, 1.005, 1.035, 1.179, 1.402]
    assert {(row["kind"], row["state"], row["key"], row["teacher"]) for row in blocks} == {
        ("block", "unknown", None, "teacher")
    }
    assert [row["from"] for row in blocks] == ["teacher", *(f"blocks.{number}" for number in range(1, 5))]
    assert all("data.download=true" in row["reason"] for row in blocks)
    assert "blocks" not in rows, "members only, no row for the group"


def test_the_plan_for_imagenet_has_the_published_ratios_without_the_data(
    capfd: pytest.CaptureFixture[str],
) -> None:
    rows = {row["name"]: row for row in plan(capfd, "imagenet_vgg16_conv.yaml")["stages"]}
    last = rows["blocks.4"]
    assert (round(last["macs_ratio"], 3), round(last["params_ratio"], 3)) == (2.525, 1.039)
    assert round(2 * rows["teacher"]["macs"] / 1e9, 2) == 30.94
    assert round(2 * last["macs"] / 1e9, 2) == 12.25


def test_a_row_of_the_plan_has_the_documented_keys(capfd: pytest.CaptureFixture[str]) -> None:
    for row in plan(capfd, "digits.yaml")["stages"]:
        assert list(row) == PLAN_KEYS
        assert (row["state"], row["reason"], len(row["key"])) == ("pending", None, 64)


def test_what_cannot_be_known_is_null_with_a_reason(capfd: pytest.CaptureFixture[str]) -> None:
    rows = plan(capfd, "digits.yaml", "stages.pruned.ranking=global")["stages"]
    pruned = next(row for row in rows if row["name"] == "pruned")
    assert [pruned[name] for name in PLAN_KEYS[-4:]] == [None] * 4
    assert pruned["key"] is not None and "depends on the weights" in pruned["reason"]


def test_a_plan_makes_no_store(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan(capfd, "digits.yaml", "--store", str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_the_plan_for_people_has_every_stage(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(RECIPES / "cifar100_vgg16.yaml")]) == 0
    out, _ = capfd.readouterr()
    assert all(f"blocks.{number}" in out for number in range(1, 6))
    assert "2.693x" in out and "unknown: data.root=" in out


@pytest.mark.parametrize("command", ["run", "plan", "lineage", "report", "ui"])
def test_every_command_has_help_with_an_example(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    out, _ = capfd.readouterr()
    assert f"Example: pbkd {command} " in out
    assert "--store" in out


def test_help_is_what_one_gets_for_nothing_and_it_names_every_command(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    out, _ = capfd.readouterr()
    assert all(f" {command} " in out for command in ("run", "plan", "lineage", "report", "ui"))
    assert "pbkd run pipelines/recipes/digits.yaml" in out


HEAVY = {"torch", "ray", "mlflow", "numpy", "matplotlib", "jinja2"}
LIGHT = {
    ("run", "--help"): HEAVY | {"omegaconf"},
    ("-h",): HEAVY | {"omegaconf"},
    ("--version",): HEAVY | {"omegaconf"},
    ("rnu",): HEAVY | {"omegaconf"},
    ("run", "nowhere.yaml"): HEAVY,
    ("plan", "nowhere.yaml"): HEAVY,
    ("init", "torchvision/resnet18", "--data", "digits", "--weights", "nowhere.pt"): HEAVY,
    ("init", "torchvision/resnet18", "--data", "nowhere"): HEAVY,
    ("plan", str(RECIPES / "digits.yaml")): {"sklearn", "sympy", "torch._dynamo", "ray", "mlflow"},
}


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_what_is_cheap_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    """What keeps help and mistakes under half a second, and a plan at three."""
    code = f"import sys; from pipelines.cli import main; main({list(words)}); print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    modules = set(found.stdout.splitlines()[-1].split())
    assert "typer" in modules
    assert modules.isdisjoint(LIGHT[words])


def test_the_version_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"pbkd {__version__}\n"
