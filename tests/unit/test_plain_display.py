"""What a log without a terminal says of a stage that takes long."""

from io import StringIO
from pathlib import Path

from rich.console import Console

from pipelines.display import PlainDisplay
from pipelines.graph import build_graph
from pipelines.recipe_file import load_recipe

SMALL = Path(__file__).parents[1] / "integration" / "small.yaml"
ROW = {"step": 8, "epoch": 1, "train_loss": 0.51234, "val_accuracy": 90.0}


def said(tmp_path: Path, *overrides: str, seconds: float) -> list[str]:
    out = StringIO()
    node = build_graph(load_recipe(SMALL, overrides), None, tmp_path).nodes["teacher"]
    display = PlainDisplay(Console(file=out, width=80), seconds)
    display.started(node)
    display.progress(node, ROW)
    display.progress(node, ROW)
    return out.getvalue().splitlines()


def test_a_line_says_how_far_a_stage_has_come(tmp_path: Path) -> None:
    by_steps = "teacher                  train      step 8 of 12  loss 0.512  val % 90.00"
    assert said(tmp_path, seconds=0.0) == [by_steps, by_steps]
    by_epochs = ["stages.teacher.steps=null", "stages.teacher.epochs=4"]
    line = "teacher                  train      epoch 1 of 4  loss 0.512  val % 90.00"
    assert said(tmp_path, *by_epochs, seconds=0.0) == [line, line]


def test_and_not_more_often_than_asked(tmp_path: Path) -> None:
    assert said(tmp_path, seconds=3600.0) == []
