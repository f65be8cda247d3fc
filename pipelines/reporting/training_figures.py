"""Figures of what happened while stages trained: losses, accuracies, gradient shock, features of blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import cycle, product
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from pipelines.reporting.drawing import (
    BLUE,
    GREEN,
    LINES,
    ORANGE,
    PURPLE,
    ROLES,
    VERMILLION,
    Canvas,
    Drawing,
    columns,
    plain_ticks,
)
from pipelines.reporting.facts import PipelineFacts, Shock, StageFacts

LOSS, ACCURACY = "train_loss", "val_accuracy"
SHEET_COLUMNS = 4


def curves(stage: StageFacts, name: str) -> Drawing:
    """Training loss above validation accuracy in percent, over epochs."""
    return Drawing(
        name,
        f"Training loss and validation accuracy of {stage.name} over epochs",
        partial(_curves, stage),
        (3.4, 2.9) if stage.series(ACCURACY) else (3.4, 1.7),
    )


def _curves(stage: StageFacts, canvas: Canvas) -> None:
    found = _panels(stage)
    grid = canvas.figure.subplots(len(found), sharex=True, squeeze=False)
    for axes, panel in zip(grid.flat, found, strict=True):
        _curve(axes, stage, *panel)
    grid[-1, 0].set_xlabel("epoch")
    grid[-1, 0].xaxis.set_major_locator(MaxNLocator(5, integer=True))
    canvas.figure.align_ylabels()


def curve_sheet(stages: Sequence[StageFacts]) -> Drawing:
    """The curves of all stages on one sheet."""
    rows = math.ceil(len(stages) / SHEET_COLUMNS)
    return Drawing(
        "curves",
        "Training loss and validation accuracy of every stage over epochs",
        partial(_sheet, stages, rows),
        (13.0, 3.0 * rows),
        layout=None,
    )


def _sheet(stages: Sequence[StageFacts], rows: int, canvas: Canvas) -> None:
    parts = canvas.figure.subfigures(rows, SHEET_COLUMNS, squeeze=False)
    for part, stage in zip(parts.flat, stages, strict=False):
        found = _panels(stage)
        grid = part.subplots(
            len(found),
            sharex=True,
            squeeze=False,
            gridspec_kw={"left": 0.2, "right": 0.95, "top": 0.88, "bottom": 0.16, "hspace": 0.2},
        )
        grid[0, 0].set_title(stage.name, fontsize=10, loc="left")
        for axes, panel in zip(grid.flat, found, strict=True):
            _curve(axes, stage, *panel)


def _panels(stage: StageFacts) -> list[tuple[str, str, str]]:
    panels = ((LOSS, VERMILLION, "training loss"), (ACCURACY, BLUE, "validation, %"))
    return [panel for panel in panels if stage.series(panel[0])]


def _curve(axes: Axes, stage: StageFacts, metric: str, colour: str, label: str) -> None:
    points = stage.series(metric, along="epoch")
    axes.plot(*columns(points), color=colour, marker="o" if len(points) < 3 else "", markersize=4)
    axes.set_ylabel(label, fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if metric == ACCURACY:
        room = max(100.0 - min(value for _, value in points), 0.5)
        axes.set_ylim(100.0 - 1.1 * room, 100.0 + 0.1 * room)
        axes.ticklabel_format(axis="y", useOffset=False)


def shock(group: Sequence[Shock], name: str) -> Drawing:
    """Gradient norm, and CKA with the stage's start, side by side, by step; a line a stage."""
    rows = 0.2 * len(group)
    return Drawing(
        name,
        f"Gradient norm and linear CKA of the features, step by step, from {group[0].origin}",
        partial(_shock, group),
        (10.2, 3.4 + rows),
        (4.05, 5.6 + rows),
    )


def _shock(group: Sequence[Shock], canvas: Canvas) -> None:
    shape = (2, 1) if canvas.is_narrow else (1, 2)
    norm, similarity = canvas.figure.subplots(*shape).flat
    for (colour, line), each in zip(cycle(LINES), group, strict=False):
        label = f"{each.stage.name}: {stabilization(each)}"
        style = {"color": colour, "linestyle": line, "linewidth": 1.3, "label": label}
        norm.plot(*columns(each.norms), **style)
        similarity.plot(*columns(each.similarities), marker="o", markersize=4, **style)
    if all(value > 0 for each in group for _, value in each.norms) and any(each.norms for each in group):
        norm.set_yscale("log")
        plain_ticks(norm.yaxis, "{:g}".format)
    norm.set_ylabel("norm of the features' gradient")
    similarity.set_ylabel("linear CKA with the stage's start")
    for axes in (norm, similarity):
        axes.set_xscale("log")
        plain_ticks(axes.xaxis, "{:g}".format)
        axes.set_xlabel("step (log scale)")
    handles, labels = norm.get_legend_handles_labels()
    canvas.figure.legend(handles, labels, loc="outside upper left", ncols=1 if canvas.is_narrow else 2)


def stabilization(each: Shock) -> str:
    """With how many steps of it before, or without."""
    return f"with stabilization ({each.stabilized} steps)" if each.stabilized else "without stabilization"


def feature_errors(facts: PipelineFacts) -> Drawing | None:
    """How far each block's features are from the teacher's, a line a stage, as numbers and shades."""
    stages = [stage for stage in facts.finished if stage.feature_errors]
    if not stages:
        return None
    blocks = max(max(stage.feature_errors) for stage in stages)
    height = 0.25 * (len(stages) + 1) + 0.45
    return Drawing(
        "feature_error",
        "Error of every block's features against the teacher's, by stage",
        partial(_feature_errors, stages, blocks),
        (min(10.2, 2.6 + 0.85 * blocks), height),
        (4.05, height),
        layout=None,
    )


def _feature_errors(stages: Sequence[StageFacts], blocks: int, canvas: Canvas) -> None:
    width, height = canvas.figure.get_size_inches()
    axes = canvas.figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    left = 0.2 + 0.074 * max(len(stage.name) for stage in stages)
    cell = (width - left - 0.1) / blocks
    errors = [error for stage in stages for error in stage.feature_errors.values() if error > 0]
    low, high = (math.log(limit(errors, default=1.0)) for limit in (min, max))
    size = 9.0 if cell > 0.5 else 6.5
    middle: dict[str, Any] = {"ha": "center", "va": "center_baseline"}
    axes.text(left - 0.08, 0.15, "block", fontsize=8.5, ha="right", va="center_baseline")
    for block in range(1, blocks + 1):
        axes.text(left + (block - 0.5) * cell, 0.15, str(block), fontsize=8.5, **middle)
    for row, stage in enumerate(stages):
        y = 0.25 * row + 0.3
        colour = ROLES[stage.role].colour if stage.role != "stage" else "black"
        name: dict[str, Any] = {"fontsize": 9, "ha": "right", "va": "center_baseline", "color": colour}
        axes.text(left - 0.08, y + 0.125, stage.name, **name)
        for block, error in stage.feature_errors.items():
            share = (math.log(error) - low) / ((high - low) or 1.0) if error > 0 else 0.0
            x = left + (block - 1) * cell
            shade: dict[str, Any] = {"facecolor": ORANGE, "alpha": 0.06 + 0.54 * share, "linewidth": 0}
            axes.add_patch(Rectangle((x, y), cell - 0.03, 0.22, **shade))
            text = f"{error:.2g}" if error < 100 else f"{error:.0f}"
            axes.text(x + cell / 2, y + 0.125, text, fontsize=size, **middle)


def local_losses(facts: PipelineFacts) -> list[Drawing]:
    """Of each group of block stages the local loss over epochs, a line a block."""
    groups: dict[str, list[StageFacts]] = {}
    for stage in facts.stages.values():
        if stage.kind == "block" and stage.series("train_local_loss"):
            groups.setdefault(stage.name.rpartition(".")[0] or stage.name, []).append(stage)
    return [
        Drawing(
            f"local_loss_{number}",
            f"Local loss of the blocks of {group} over epochs",
            partial(_local_losses, stages),
            (5.0, 3.2),
            (4.05, 3.2),
        )
        for number, (group, stages) in enumerate(groups.items(), 1)
    ]


def _local_losses(stages: Sequence[StageFacts], canvas: Canvas) -> None:
    axes = canvas.figure.subplots()
    styles = cycle(product(("-", "--", ":", "-."), (BLUE, VERMILLION, GREEN, PURPLE, ORANGE)))
    markers = cycle("osD^vP")
    for stage, (line, colour), marker in zip(stages, styles, markers, strict=False):
        points = stage.series("train_local_loss", along="epoch")
        label = f"{stage.name}  {points[-1][1]:.2g}"
        style: dict[str, Any] = {
            "color": colour,
            "linestyle": line,
            "marker": marker,
            "markersize": 4,
            "linewidth": 1.3,
        }
        axes.plot(*columns(points), label=label, **style)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis, "{:g}".format)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set(xlabel="epoch", ylabel="local loss (log scale)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8.5, title="block, last value")
