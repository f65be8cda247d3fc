"""`pbkd bench`: what it prints for machines, from a measurement too short to mean anything."""

import json
from pathlib import Path

import pytest

import benchmarks.loader
from pipelines.cli import main
from tests.unit.image_folders import save_folder


@pytest.mark.proof  # its arguments are read on every run, in test_documentation
@pytest.mark.ffcv
@pytest.mark.timeout(600)  # five processes import torch and FFCV, three compile
def test_loaders_are_compared_side_by_side(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_folder(tmp_path / "imagenette", train=15)
    monkeypatch.setattr(benchmarks.loader, "RESULTS", tmp_path / "loader.csv")
    short = ["--rounds", "1", "--seconds", "0.01", "--epochs", "2", "--case", "photographs"]
    code = main(["bench", "loader", "--data", str(tmp_path), *short, "--json"])
    report = json.loads(capfd.readouterr().out)
    assert report["benchmark"] == "loader"
    assert {row["loader"] for row in report["rows"]} == {"pbkd", "ffcv", "torchvision"}
    assert all(list(floor) == ["name", "value", "floor", "holds"] for floor in report["floors"])
    assert [floor["floor"] for floor in report["floors"]] == [2.0, 15.0, 1.0, 32.0]
    assert code == (0 if all(floor["holds"] for floor in report["floors"]) else 1)
    assert len((tmp_path / "loader.csv").read_text().splitlines()) == 1 + len(report["rows"])
