"""The figure of README.md, drawn from benchmarks/results: `python -m benchmarks.readme_figure`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
PLACE = Path(__file__).parents[1] / "docs" / "images" / "results.svg"
BLUE, VERMILLION, GREY = "#0072b2", "#d55e00", "#767676"  # of Okabe and Ito's palette
DIGITS = {
    "teacher": "teacher",
    "recovered": "pbkd's student",
    "kd_same_start": "distilled from the same start",
    "kd": "plain distillation",
    "scratch": "from scratch",
}
CIFAR = {  # the stage -> how it is called, on which side of its point
    "teacher": ("teacher", "right"),
    "start.3": ("closed-form start, no training", "left"),
    "two_stage": ("blocks, two-stage\ndistillation", "right"),
    "kd_same_start": ("distilled from the same start", "left"),
    "recovered": ("pruned, recovered", "left"),
    "fine_tuned": ("pruned, fine-tuned", "left"),
    "hybrid": ("blocks, pruning,\nrecovery", "right"),
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "pbkd",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(path: Path) -> None:
    """Write the figure, an SVG, to `path`; the same rows give the same bytes."""
    with rc_context(STYLE):
        figure = Figure((10, 3.2), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.45))
        _digits(left)
        _cifar(right)
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})  # type: ignore[no-untyped-call]


def _digits(axes: Axes) -> None:
    summary = {row["stage"]: row for row in _rows("digits_summary.csv")}
    ratio = next(float(row["macs_ratio"]) for row in _rows("digits.csv") if row["stage"] == "recovered")
    for place, stage in enumerate(DIGITS):
        row, colour = summary[stage], {"teacher": GREY, "recovered": BLUE}.get(stage, VERMILLION)
        accuracy, deviation = float(row["mean"]), float(row["sd"])
        axes.errorbar(accuracy, -place, xerr=deviation, fmt="o", color=colour, capsize=3)
        axes.annotate(f"{accuracy:.2f}", (accuracy, -place), (0, 5), textcoords="offset points", ha="center")
    axes.set_yticks(range(0, -len(DIGITS), -1), DIGITS.values())
    axes.set_ylim(-len(DIGITS) + 0.6, 0.6)
    axes.set_xlabel(f"test accuracy in %, {summary['teacher']['seeds']} seeds, mean and deviation")
    axes.set_title(f"Digits: {ratio:.2f}x fewer multiply-accumulates", fontsize=10, loc="left")


def _cifar(axes: Axes) -> None:
    rows = _rows("compare_cifar10.csv")
    seeds = len({row["seed"] for row in rows})
    for stage, (label, side) in CIFAR.items():
        same = [row for row in rows if row["stage"] == stage]
        cost = mean(float(row["macs"]) for row in same) / 1e6
        accuracy = [float(row["test_accuracy"]) for row in same]
        others = {"teacher": GREY, "kd_same_start": VERMILLION, "fine_tuned": VERMILLION}
        colour = others.get(stage, BLUE)
        axes.errorbar(cost, mean(accuracy), yerr=stdev(accuracy), fmt="o", color=colour, capsize=3)
        offset = (7 if side == "left" else -7, 0)
        text = f"{label} {mean(accuracy):.2f}"
        axes.annotate(text, (cost, mean(accuracy)), offset, textcoords="offset points", ha=side, va="center")
    axes.margins(y=0.12)
    axes.set_xlim(-6, 136)
    axes.set_xlabel("million multiply-accumulates")
    axes.set_ylabel(f"test accuracy in %, {seeds} seeds")
    axes.set_title("CIFAR-10, ResNet-56, 4 epochs", fontsize=10, loc="left")


def _rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PLACE)
