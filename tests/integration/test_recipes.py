"""The recipes as they are shipped: each can be planned, and its smoke form runs from beginning to end."""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pbkd.networks import NetworkSettings, architecture, fresh
from pbkd.torchvision_compat import import_torchvision
from pipelines.cli import main
from tests.integration.pbkd_process import (
    LOCAL,
    ROOT,
    SMOKE,
    call,
    digests,
    report_of,
    run_here,
    states,
    with_database,
)

RECIPES = sorted((ROOT / "pipelines" / "recipes").glob("*.yaml"))
RUN_KEYS = ["recipe", "pipeline_run", "store", "seconds", "teacher", "student", "baselines", "stages"]
STAGE_KEYS = [
    *("name", "kind", "key", "state", "seconds", "run_id", "artifact"),
    *("params", "nonzero_params", "macs", "nonzero_macs", "macs_ratio", "memory_peak_mb"),
    *("latency_ms", "latency_ms_batch32", "latency_ms_compiled", "latency_ms_batch32_compiled"),
    *("test_accuracy", "test_top5", "val_accuracy", "nll", "ece", "agreement", "kl", "digest"),
]
IMAGE_SIDE = 32
LARGE = ["data.limit=8"]  # images of each split
if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
    LARGE.append("compute.precision=fp32")  # bf16 would be emulated, ten times slower


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_can_be_planned_in_full_and_in_small(
    recipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PBKD_DATA", str(tmp_path))
    for overrides in ([], ["smoke=true"]):
        assert main(["plan", str(recipe), *overrides, "--store", str(tmp_path / "runs"), "--json"]) == 0
        stages = json.loads(capfd.readouterr().out)["stages"]
        assert len(stages) > 3
        assert all(stage["macs"] or "depends on the weights" in stage["reason"] for stage in stages)


@pytest.fixture
def digits(small_demo: dict[str, Any]) -> dict[str, Any]:
    """The main job in small; on Ray it is what `make demo` runs."""
    return small_demo


def test_the_report_of_a_run_has_the_documented_keys(digits: dict[str, Any]) -> None:
    assert list(digits) == RUN_KEYS
    assert (digits["recipe"], digits["teacher"], digits["student"]) == ("digits", "teacher", "recovered")
    assert set(digits["baselines"]) == {"scratch", "kd", "kd_same_start"}
    for stage in digits["stages"]:
        assert list(stage) == STAGE_KEYS
        unknown = {name for name, value in stage.items() if value is None}
        assert unknown == {"latency_ms_compiled", "latency_ms_batch32_compiled"}, "compute.measure_compiled"
        assert Path(stage["artifact"]).is_dir()
        assert 0 <= stage["test_accuracy"] <= 100 and 0 <= stage["agreement"] <= 100


def test_a_report_page_has_every_measurement_and_the_recipe_to_repeat_it(
    digits: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    here = ["--store", digits["store"], "--json"]
    assert main(["report", str(_recipe("digits")), *SMOKE, LOCAL, *here]) == 0
    path = Path(json.loads(capfd.readouterr().out)["path"])
    html = path.read_text("utf-8")
    for stage in digits["stages"]:
        assert stage["key"][:12] in html and stage["artifact"].rpartition("/")[2] in html
        assert f"<td>{stage['latency_ms_batch32']:,.2f}</td><td>{stage['memory_peak_mb']:,.0f}</td>" in html
    assert main(["plan", str(path.with_name("recipe.yaml")), *here]) == 0
    again = json.loads(capfd.readouterr().out)["stages"]
    assert [(row["key"], row["state"]) for row in again] == [(row["key"], "done") for row in digits["stages"]]


def test_the_student_has_a_third_of_the_teachers_macs_and_the_baselines_its_architecture(
    digits: dict[str, Any],
) -> None:
    stages = {stage["name"]: stage for stage in digits["stages"]}
    student = stages[digits["student"]]
    assert student["macs_ratio"] >= 3
    costs = {(stages[name]["params"], stages[name]["macs"]) for name in digits["baselines"]}
    assert costs == {(student["params"], student["macs"])}


@pytest.mark.parametrize("what", ["run_id", "artifact", "key"])
def test_the_lineage_leads_from_the_student_to_the_teacher_and_the_data(
    what: str, digits: dict[str, Any]
) -> None:
    student = next(stage for stage in digits["stages"] if stage["name"] == digits["student"])
    chain = report_of("lineage", student[what], "--store", digits["store"])["chain"]
    assert all(
        list(row) == ["stage", "kind", "key", "run_id", "model_id", "data_digest", "inputs"] for row in chain
    )
    assert [row["stage"] for row in chain] == [
        *("recovered", "restabilized", "pruned", "distilled", "stabilized"),
        *("blocks.3", "blocks.2", "blocks.1", "teacher"),
    ]
    for row, origin in pairwise(chain):
        assert {given["role"]: given["key"] for given in row["inputs"]} == {
            "from": origin["key"],
            "teacher": chain[-1]["key"],
        }
    assert len({row["data_digest"] for row in chain}) == 1 and len(chain[0]["data_digest"]) == 64
    assert all(row["run_id"] and row["model_id"] for row in chain)


def test_the_table_for_people_names_every_stage_and_what_to_type_next(digits: dict[str, Any]) -> None:
    code, out, err = call("run", _recipe("digits"), *SMOKE, "--store", digits["store"])
    assert code == 0
    assert all(name in out for name in digests(digits))
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines() if line[:1].isalpha()}
    assert (rows["recovered"], rows["scratch"], rows["distilled"]) == ("student", "baseline", "distill")
    assert f"pbkd ui --store {digits['store']}" in out and "pbkd lineage " in out
    assert all(line.endswith("reused") for line in err.splitlines())


def test_the_imagenet_recipe_runs_on_a_folder_of_images_with_given_weights(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 24), ("val", 8)):
        for name in ("n01", "n02"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(
                    256, (IMAGE_SIDE, IMAGE_SIDE, 3), generator=generator, dtype=torch.uint8
                )
                Image.fromarray(pixels.numpy()).save(folder / f"{number}.JPEG")
    # The whole network at 224 pixels needs 0.5 GB of weights and minutes: its head and images are shrunk.
    spec = architecture(NetworkSettings(arch="vgg16", head=(32,)), (3, IMAGE_SIDE, IMAGE_SIDE), 2)
    save_file(fresh(spec, 0).state_dict(), tmp_path / "vgg16.safetensors")
    small = [f"data.image_size={IMAGE_SIDE}", "data.num_classes=2", "stages.teacher.network.head=[32]"]
    report = run_here(
        _recipe("imagenet_vgg16_conv"),
        *(*SMOKE, LOCAL, *small, f"data.root={tmp_path}"),
        *("--store", with_database(tmp_path / "runs")),
    )
    assert list(states(report)) == [
        *("teacher", "blocks.1", "blocks.2", "blocks.3", "blocks.4", "stabilized", "distilled")
    ]


CIFAR10 = pytest.mark.data("cifar-10-batches-py")
REAL = [
    pytest.param("cifar10_resnet56", marks=[CIFAR10, pytest.mark.data("cifar10-resnet56.safetensors")]),
    pytest.param("cifar10_vgg16", marks=[CIFAR10, pytest.mark.proof]),
    pytest.param("cifar100_vgg16", marks=[CIFAR10, pytest.mark.proof]),
    pytest.param("imagenette_resnet18", marks=pytest.mark.data("imagenette")),
]


@pytest.mark.parametrize("name", REAL)
def test_a_recipe_runs_in_small_on_real_data(name: str, tmp_path: Path) -> None:
    """Its own data, but for CIFAR-100's recipe, which takes CIFAR-10 where CIFAR-100 is not to be had."""
    given = [*SMOKE, LOCAL, *LARGE]
    if name == "cifar100_vgg16" and not (Path(os.environ["PBKD_DATA"]) / "cifar-100-python").exists():
        given.append("data.name=cifar10")
    if name == "imagenette_resnet18":  # at the recipe's own rate, eight small images diverge
        given += ["data.image_size=32", "stages.teacher.optimizer.lr=0.01"]
    report = run_here(_recipe(name), *given, "--store", with_database(tmp_path))
    assert set(states(report).values()) == {"ran"}


@pytest.mark.proof  # on every run: imagenette_resnet18 on photographs, and torchvision's weights in test_init
@pytest.mark.data("imagenette")
def test_an_imagenet_recipe_runs_in_small_on_real_photographs(tmp_path: Path) -> None:
    """With weights from a state_dict file, as without a connection; random, and for these ten classes."""
    network = import_torchvision().models.resnet18(num_classes=10)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    given = [f"data.root={os.environ['PBKD_DATA']}/imagenette", "data.num_classes=10", "data.image_size=64"]
    given += ["stages.teacher.pretrained=false", f"stages.teacher.weights={tmp_path / 'weights.pt'}"]
    report = run_here(
        _recipe("imagenet_resnet18"),
        *(*SMOKE, LOCAL, *LARGE, *given, "--store", with_database(tmp_path / "runs")),
    )
    blocks = [f"blocks.{number}" for number in range(1, 5)]
    assert list(states(report)) == ["teacher", *blocks, "stabilized", "distilled"]
    assert report["stages"][-1]["macs_ratio"] > 1.3


def _recipe(name: str) -> Path:
    return ROOT / "pipelines" / "recipes" / f"{name}.yaml"
