"""The figures of a report: facts -> SVG to be put into an HTML page, in colours that the page defines.

Text stays text, black becomes the page's `currentColor`, and the palette its variables, such as `--blue`: so
figures follow the page into dark mode.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pipelines.display import human
from pipelines.report import PipelineFacts, Shock, StageFacts

# Okabe & Ito's palette, which the colour-blind can tell apart; grey is for what stands back.
PALETTE = {
    "#0072b2": "blue",
    "#d55e00": "vermillion",
    "#009e73": "green",
    "#cc79a7": "purple",
    "#e69f00": "orange",
    "#999999": "grey",
}
BLUE, VERMILLION, GREEN, PURPLE, ORANGE, GREY = PALETTE
ROLES = {  # colour, marker, size in points
    "stage": (GREY, "D", 4.0),
    "baseline": (GREEN, "o", 7.0),
    "teacher": (BLUE, "s", 9.0),
    "student": (VERMILLION, "*", 15.0),
}
LINES = [(BLUE, "-"), (VERMILLION, "--"), (GREEN, "-."), (PURPLE, ":"), (ORANGE, "-")]
ALL_LABELLED = 16  # stages; of more, those without a role go without a label
LABEL_HEIGHT = 0.043  # of the axes
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "font.size": 10,
}


def accuracy_against_macs(facts: PipelineFacts) -> str:
    """Every finished stage: test accuracy in percent over multiply-accumulates, the best label on top.

    The axis ends a little below the stages that have a role; what is worse stands at its foot as a triangle.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        points = [(stage, *place) for stage in facts.finished if (place := _place(stage)) is not None]
        highest = max((accuracy for _, _, accuracy in points), default=100.0)
        lowest = min((accuracy for stage, _, accuracy in points if stage.role != "stage"), default=0.0)
        margin = max(0.15 * (highest - lowest), 0.25)
        foot = lowest - 2 * margin
        axes.set_ylim(foot - margin / 2, highest + margin)
        for role, (colour, marker, size) in ROLES.items():
            here = [(macs, accuracy) for stage, macs, accuracy in points if stage.role == role]
            inside = _columns([point for point in here if point[1] >= foot])
            below = _columns([(macs, foot) for macs, accuracy in here if accuracy < foot])
            label = {"stage": "other stages", "baseline": "baselines"}.get(role, role)
            if here:
                axes.plot(*inside, marker, color=colour, markersize=size, label=label)
            axes.plot(*below, "v", color=colour, markersize=size)
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis, human)
        axes.set(xlabel="multiply-accumulates of one image (log scale)", ylabel="test accuracy, %")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.1), ncols=4, reverse=True)
        named = [point for point in points if point[0].role != "stage" or len(points) <= ALL_LABELLED]
        _label(axes, named)

    return _svg(draw, (9.0, 5.4), "accuracy", "Test accuracy against multiply-accumulates of every stage")


def gradient_norms(group: Sequence[Shock], name: str) -> str:
    """The norm of the features' gradient at every step, a line a stage; both axes logarithmic."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _lines(axes, group, [shock.norms for shock in group], marker="")
        if all(norm > 0 for shock in group for _, norm in shock.norms):
            axes.set_yscale("log")
            _plain_ticks(axes.yaxis, "{:g}".format)
        axes.set(ylabel="norm of the features' gradient")

    return _svg(draw, (5.6, 3.9), name, "Norm of the gradient of the feature extractor, step by step")


def feature_similarity(group: Sequence[Shock], name: str) -> str:
    """Linear CKA of the features with those a stage began with, after 1, 2, 4, ... steps and every epoch."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _lines(axes, group, [shock.similarities for shock in group], marker="o")
        axes.set(ylabel="linear CKA with the stage's start")

    return _svg(draw, (5.6, 3.9), name, "Linear CKA of the features with those of the stage's start, by step")


def training_curves(stage: StageFacts, name: str) -> str:
    """Training loss above validation accuracy in percent, over epochs."""

    def draw(figure: Figure) -> None:
        upper, lower = figure.subplots(2, sharex=True)
        for axes, metric, colour, label in (
            (upper, "train_loss", VERMILLION, "training loss"),
            (lower, "val_accuracy", BLUE, "validation %"),
        ):
            points = stage.series(metric, along="epoch")
            axes.plot(*_columns(points), color=colour, marker="o" if len(points) < 2 else "")
            axes.set_ylabel(label)
            axes.yaxis.set_major_locator(MaxNLocator(4))
        lower.set_xlabel("epoch")
        lower.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        figure.align_ylabels()

    return _svg(draw, (3.4, 3.0), name, f"Training loss and validation accuracy of {stage.name} over epochs")


def _svg(draw: Callable[[Figure], None], inches: tuple[float, float], name: str, description: str) -> str:
    """What `draw` makes of an empty figure; `name` keeps its ids apart from those of a page's other ones."""
    file = io.StringIO()
    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(inches, layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = re.sub(r"<style.*?</style>|(?<=<g) id=\"[^\"]*\"", "", text, flags=re.DOTALL)
    text = re.sub(r'style="[^"]*"', lambda style: _page_colours(style[0]), text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib writes one"
    content = text[text.index(">", box.end()) + 1 :]
    return f'<svg {box[0]} role="img" aria-label="{escape(description)}">{content}'


def _page_colours(style: str) -> str:
    style = re.sub(r"font-family: [^;\"]*(; )?", "", style).replace("#000000", "currentColor")
    for colour, name in PALETTE.items():
        style = style.replace(colour, f"var(--{name})")
    return style


def _lines(
    axes: Axes, group: Sequence[Shock], curves: Sequence[Sequence[tuple[float, float]]], marker: str
) -> None:
    for position, (shock, points) in enumerate(zip(group, curves, strict=True)):
        colour, line = LINES[position % len(LINES)]
        label = f"{shock.stage.name}: {stabilization(shock)}"
        xs, ys = _columns(points)
        axes.plot(xs, ys, line, color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, "{:g}".format)
    axes.set_xlabel("step (log scale)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.22), ncols=1)


def stabilization(shock: Shock) -> str:
    """With how many steps of it before, or without."""
    return f"with stabilization ({shock.stabilized} steps)" if shock.stabilized else "without stabilization"


def _plain_ticks(axis: Axis, form: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis by their numbers, as many to the decade as there is room for."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    within = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=within))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axis.set_minor_formatter(NullFormatter())


def _place(stage: StageFacts) -> tuple[float, float] | None:
    macs, accuracy = stage.value("macs"), stage.value("test_accuracy")
    return None if macs is None or accuracy is None else (macs, accuracy)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _label(axes: Axes, points: Sequence[tuple[StageFacts, float, float]]) -> None:
    """Names in a column on the right, by accuracy, none over another, each with a line to its point."""
    low, high = axes.get_ylim()
    points = sorted(points, key=lambda point: point[2], reverse=True)
    # From the top down no label above its point; then from the bottom up, those that ran out of the axes.
    heights: list[float] = []
    for _, _, accuracy in points:
        wanted = (max(accuracy, low) - low) / (high - low)
        heights.append(min(wanted, heights[-1] - LABEL_HEIGHT if heights else 1.0))
    for position in reversed(range(len(heights))):
        floor = heights[position + 1] + LABEL_HEIGHT if position + 1 < len(heights) else 0.0
        heights[position] = max(heights[position], floor)
    for (stage, macs, accuracy), height in zip(points, heights, strict=True):
        axes.annotate(
            f"{accuracy:.2f}  {stage.name}",
            (macs, max(accuracy, low)),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            color=ROLES[stage.role][0] if stage.role != "stage" else "black",
            fontsize=9,
            fontweight="bold" if stage.role in ("teacher", "student") else "normal",
            arrowprops={"arrowstyle": "-", "color": GREY, "alpha": 0.5, "linewidth": 0.7}
            | {"relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 4},
        )
