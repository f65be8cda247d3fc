"""Figures that compare a pipeline's stages: accuracy against cost, fidelity to the teacher, calibration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from pipelines.quantities import human
from pipelines.reporting.drawing import (
    GREY,
    ROLES,
    VERMILLION,
    Canvas,
    Drawing,
    columns,
    plain_ticks,
)
from pipelines.reporting.facts import PipelineFacts, StageFacts

Place = tuple[StageFacts, float, float]
MANY = 16  # finished stages; of more, only those with a role are compared


def trade_off(facts: PipelineFacts, metric: str, axis: str, name: str) -> Drawing | None:
    """Test accuracy in percent of every finished stage over what `metric` says it costs; None without any.

    A line follows the student's way from its teacher. The axis ends a little below the stages that have a
    role; what is worse stands at its foot as a triangle.
    """
    places = [
        (stage, cost, accuracy)
        for stage in facts.finished
        if (cost := stage.value(metric)) is not None
        and (accuracy := stage.value("test_accuracy")) is not None
    ]
    if not places:
        return None
    labels = sum(stage.role != "stage" for stage, *_ in places)
    height = max(4.0, 0.6 + 0.24 * labels)
    return Drawing(
        name,
        f"Test accuracy against {axis} of {len(places)} stages",
        partial(_trade_off, facts, places, axis, human if metric == "macs" else "{:g}".format),
        (6.4, height),
        (4.05, max(4.0, 0.9 + 0.22 * labels)),
    )


def _trade_off(
    facts: PipelineFacts, places: Sequence[Place], axis: str, form: Callable[[float], str], canvas: Canvas
) -> None:
    axes = canvas.figure.subplots()
    highest = max(accuracy for _, _, accuracy in places)
    leading = [stage.name for stage in facts.leading]
    lowest = min((accuracy for stage, _, accuracy in places if stage.name in leading), default=highest)
    margin = max(0.15 * (highest - lowest), 0.25)
    foot = lowest - 2 * margin
    axes.set_ylim(foot - margin / 2, highest + margin)
    by_name = {stage.name: (cost, max(accuracy, foot)) for stage, cost, accuracy in places}
    way = [by_name[name] for name in facts.path(facts.student) if name in by_name]
    axes.plot(*columns(way), color=VERMILLION, linewidth=1.0, alpha=0.5)
    for stage, cost, accuracy in sorted(places, key=lambda place: list(ROLES).index(place[0].role)):
        says = f"{stage.name}: {accuracy:.2f} % at {form(cost)}"
        if accuracy >= foot:
            canvas.point(axes, cost, accuracy, stage, says)
        else:
            canvas.point(axes, cost, foot, stage, says, marker="v", markersize=7.0)
    axes.set_xscale("log")
    plain_ticks(axes.xaxis, form)
    axes.set(xlabel=f"{axis} (log scale)", ylabel="test accuracy, %")
    label_by_column(axes, [place for place in places if place[0].role != "stage"], canvas)


def label_by_column(axes: Axes, places: Sequence[Place], canvas: Canvas) -> None:
    """Names in a column on the right, by accuracy, none over another, each with a line to its point."""
    low, high = axes.get_ylim()
    size = 8.5 if canvas.is_narrow else 9.0
    step = size * 1.5 / 72 / (canvas.figure.get_size_inches()[1] - 0.7)
    places = sorted(places, key=lambda place: place[2], reverse=True)
    # From the top down no label above its point; then from the bottom up, those that ran out of the axes.
    heights: list[float] = []
    for _, _, accuracy in places:
        wanted = (max(accuracy, low) - low) / (high - low)
        heights.append(min(wanted, heights[-1] - step if heights else 1.0))
    for position in reversed(range(len(heights))):
        floor = heights[position + 1] + step if position + 1 < len(heights) else 0.0
        heights[position] = max(heights[position], floor)
    for (stage, cost, accuracy), height in zip(places, heights, strict=True):
        role = ROLES[stage.role]
        axes.annotate(
            f"{accuracy:.2f}  {stage.name}",
            (cost, max(accuracy, low)),
            xytext=(1.05, height),
            textcoords="axes fraction",
            va="center",
            color=role.colour,
            fontsize=size,
            fontweight="bold" if stage.role in ("teacher", "student") else "normal",
            arrowprops={"arrowstyle": "-", "color": role.colour, "alpha": 0.35, "linewidth": 0.7}
            | {"relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 4},
        )


PANELS = (
    ("agreement", "agreement with the teacher, %"),
    ("kl", "KL(teacher, stage), nats"),
    ("ece", "calibration error (ECE), %"),
    ("nll", "negative log-likelihood, nats"),
)


def fidelity(facts: PipelineFacts) -> Drawing | None:
    """Agreement, KL, calibration and likelihood of the finished stages, a line each; None without any."""
    stages = facts.finished if len(facts.finished) <= MANY else facts.compared
    panels = [
        (metric, title)
        for metric, title in PANELS
        if any(stage.value(metric) is not None for stage in stages)
    ]
    if not panels:
        return None
    few = facts.compared or stages  # on a phone
    return Drawing(
        "fidelity",
        "Agreement with the teacher and calibration of every stage",
        partial(_fidelity, stages, few, panels),
        (10.2, 0.22 * len(stages) + 0.7),
        (4.05, len(panels) * (0.22 * len(few) + 0.8)),
    )


def _fidelity(
    stages: Sequence[StageFacts],
    few: Sequence[StageFacts],
    panels: Sequence[tuple[str, str]],
    canvas: Canvas,
) -> None:
    shape = (len(panels), 1) if canvas.is_narrow else (1, len(panels))
    stages = few if canvas.is_narrow else stages
    grid = canvas.figure.subplots(*shape, squeeze=False, sharey=not canvas.is_narrow)
    for axes, (metric, title) in zip(grid.flat, panels, strict=True):
        values = [value for stage in stages if (value := stage.value(metric)) is not None]
        span = (max(values) - min(values)) or 1.0
        start = min(values) - 0.15 * span if metric == "agreement" else 0.0
        for row, stage in enumerate(stages):
            value = stage.value(metric)
            if value is None:
                axes.text(start, row, " not measured", va="center", fontsize=8, color=GREY)
                continue
            role = ROLES[stage.role]
            axes.plot([start, value], [row, row], color=role.colour, alpha=0.4, linewidth=1.2)
            size = role.size * (0.8 if stage.role == "student" else 0.75)
            canvas.point(axes, value, row, stage, f"{stage.name}: {value:.4g}", markersize=size)
        axes.set(xlabel=title, ylim=(len(stages) - 0.5, -0.5))
        axes.set_xlim(left=start)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(visible=False, axis="y")
        axes.set_yticks(range(len(stages)), [stage.name for stage in stages], fontsize=8.5)
        for tick, stage in zip(axes.get_yticklabels(), stages, strict=False):
            if stage.role != "stage":
                tick.set_color(ROLES[stage.role].colour)
