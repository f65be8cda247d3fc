"""The figure of a pipeline: its stages as a tree, with their states, accuracy and time."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from pipelines.quantities import duration
from pipelines.reporting.drawing import GREY, PURPLE, ROLES, VERMILLION, Canvas, Drawing
from pipelines.reporting.facts import PipelineFacts, StageFacts
from pipelines.reporting.tree import Branch, tree

# Inches.
ROW = 0.27
LANE = 0.2
LETTER = 0.076
WIDE, NARROW = 10.2, 4.05
LOOKS: Mapping[str, dict[str, Any]] = {
    "running": {"fillstyle": "left", "markersize": 9.0, "marker": "o"},
    "interrupted": {"fillstyle": "left", "markersize": 9.0, "marker": "o"},
    "not begun": {"fillstyle": "none", "markersize": 7.0, "marker": "o", "color": GREY},
}
BROKEN: dict[str, Any] = {"marker": "X", "markersize": 9.0, "color": VERMILLION}


def pipeline_figure(facts: PipelineFacts) -> Drawing:
    """Every stage on a line of its own, hanging on the one it starts from."""
    height = ROW * (len(facts.stages) + 1.4)
    return Drawing(
        "pipeline",
        f"The {len(facts.stages)} stages of the pipeline as a tree, with state, test accuracy and time",
        partial(_draw, facts),
        (WIDE, height),
        (NARROW, height),
        layout=None,
    )


def _draw(facts: PipelineFacts, canvas: Canvas) -> None:
    width, height = canvas.figure.get_size_inches()
    axes = canvas.figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    placed = tree(facts)
    extra = [
        (name, other)
        for name, stage in facts.stages.items()
        for role, other in stage.inputs
        if role != "from" and other not in (facts.teacher, stage.source)
    ]
    margin = 0.45 if extra else 0.15
    names_end = margin + max(
        LANE * branch.lane + 0.16 + LETTER * len(name) for name, branch in placed.items()
    )
    for branch in placed.values():
        if branch.row % 2 == 0:
            axes.add_patch(
                Rectangle((0, _y(branch) - ROW / 2), width, ROW, facecolor=GREY, alpha=0.1, linewidth=0)
            )
    _edges(axes, facts, placed, margin)
    for name, other in extra:
        _extra_edge(axes, placed[other], placed[name], margin)
    for name, branch in placed.items():
        _name(canvas, axes, facts.stages[name], branch, margin)
    _columns(canvas, axes, facts, placed, names_end + 0.1, width - 0.1)


def _y(branch: Branch) -> float:
    return ROW * (branch.row + 1.5)


def _x(branch: Branch, margin: float) -> float:
    return margin + LANE * branch.lane


def _edges(axes: Axes, facts: PipelineFacts, placed: Mapping[str, Branch], margin: float) -> None:
    to_student = set(facts.path(facts.student))
    for name, branch in placed.items():
        if branch.source is None:
            continue
        parent = placed[branch.source]
        x, y, above = _x(branch, margin), _y(branch), _x(parent, margin)
        if above == x:
            path = Path([(x, _y(parent)), (x, y)])
        else:
            bend = min(LANE, ROW / 2)
            path = Path(
                [(above, _y(parent)), (above, y - bend), (above, y), (x, y)],
                [Path.MOVETO, Path.LINETO, Path.CURVE3, Path.CURVE3],
            )
        is_main = name in to_student
        colour, line, order = (VERMILLION, 2.0, 2.0) if is_main else (GREY, 1.2, 1.0)
        axes.add_patch(PathPatch(path, facecolor="none", edgecolor=colour, linewidth=line, zorder=order))


def _extra_edge(axes: Axes, source: Branch, target: Branch, margin: float) -> None:
    """A dashed arc, to the left: of what else a stage is made from, and of a teacher of its own."""
    (x, y), (end_x, end_y) = ((_x(branch, margin), _y(branch)) for branch in (source, target))
    left = min(x, end_x) - min(0.12 + 0.05 * abs(target.row - source.row), 0.55)
    path = Path([(x, y), (left, y), (left, end_y), (end_x, end_y)], [Path.MOVETO] + 3 * [Path.CURVE4])
    axes.add_patch(
        PathPatch(path, facecolor="none", edgecolor=PURPLE, linewidth=1.2, linestyle="--", zorder=1.5)
    )


def _name(canvas: Canvas, axes: Axes, stage: StageFacts, branch: Branch, margin: float) -> None:
    x, y, role = _x(branch, margin), _y(branch), ROLES[stage.role]
    size = min(role.size, 11.0) * (1.15 if stage.role == "student" else 0.85)
    look = {"markersize": size} if stage.state == "finished" else LOOKS.get(stage.state, BROKEN)
    canvas.point(axes, x, y, stage, f"{stage.name}: {stage.kind}, {stage.state}", **look)
    axes.text(
        x + 0.13,
        y,
        stage.name,
        va="center_baseline",
        fontsize=9.5,
        color=role.colour if stage.role != "stage" else "black",
        fontweight="bold" if stage.role in ("teacher", "student") else "normal",
    )


def _columns(
    canvas: Canvas,
    axes: Axes,
    facts: PipelineFacts,
    placed: Mapping[str, Branch],
    left: float,
    right: float,
) -> None:
    """What stands beside the tree; on a phone only accuracy and time."""
    longest = max((stage.seconds or 0.0 for stage in facts.stages.values()), default=0.0) or 1.0
    if canvas.is_narrow:
        accuracy_right, bar = left + 0.42, left + 0.52
    else:
        kind, ratio_right, accuracy_right = left, left + 1.5, left + 2.1
        panel, bar = accuracy_right + 0.2, accuracy_right + 0.2 + 0.55 * (right - accuracy_right)
        scale = _Scale(facts, panel, bar - 0.35)
        _head(axes, kind, "kind")
        _head(axes, ratio_right, "fewer MACs", "right")
        _head(axes, panel, "test accuracy; dotted: the teacher")
        scale.frame(axes, facts, placed)
    _head(axes, accuracy_right, "test, %", "right")
    _head(axes, bar, "time")
    bar_width = right - bar - (0.55 if canvas.is_narrow else 0.75)
    for name, branch in placed.items():
        stage, y = facts.stages[name], _y(branch)
        small: dict[str, Any] = {"va": "center_baseline", "fontsize": 9.0}
        accuracy = stage.value("test_accuracy")
        if accuracy is not None:
            axes.text(accuracy_right, y, f"{accuracy:.2f}", ha="right", **small)
        if not canvas.is_narrow:
            axes.text(kind, y, stage.kind, **small)
            macs, reference = stage.value("macs"), facts.stages[facts.teacher].value("macs")
            if macs and reference:
                axes.text(ratio_right, y, f"{reference / macs:.2f}x", ha="right", **small)
            if accuracy is not None:
                scale.point(canvas, axes, stage, accuracy, y)
        if stage.state != "finished":
            where = bar if canvas.is_narrow else panel
            axes.text(where, y, stage.state, fontstyle="italic", **small)
            if canvas.is_narrow:
                continue
        if stage.seconds is not None:
            length = bar_width * stage.seconds / longest
            colour = ROLES[stage.role].colour
            axes.add_patch(
                Rectangle((bar, y - 0.06), length, 0.12, facecolor=colour, alpha=0.75, linewidth=0)
            )
            axes.text(bar + length + 0.06, y, duration(stage.seconds), **small)


def _head(axes: Axes, x: float, text: str, align: str = "left") -> None:
    axes.text(x, ROW * 0.55, text, ha=align, va="center_baseline", fontsize=8.5, color=GREY)


class _Scale:
    """Accuracies as places from `left` to `right`; what is far below the rest stands at the foot."""

    def __init__(self, facts: PipelineFacts, left: float, right: float) -> None:
        values = [found for stage in facts.finished if (found := stage.value("test_accuracy")) is not None]
        leading = [found for stage in facts.leading if (found := stage.value("test_accuracy")) is not None]
        self._high = max(values, default=100.0)
        self._low = min(leading, default=self._high)
        margin = max(0.15 * (self._high - self._low), 0.2)
        self._low, self._high = self._low - 2 * margin, self._high + margin
        self._left, self._right = left, right

    def x(self, accuracy: float) -> float:
        share = (max(accuracy, self._low) - self._low) / (self._high - self._low)
        return self._left + share * (self._right - self._left)

    def frame(self, axes: Axes, facts: PipelineFacts, placed: Mapping[str, Branch]) -> None:
        """A line at the teacher's accuracy."""
        reference = facts.stages[facts.teacher].value("test_accuracy")
        if reference is not None:
            ends = [ROW, ROW * (len(placed) + 1)]
            axes.plot([self.x(reference)] * 2, ends, ":", color=ROLES["teacher"].colour, linewidth=1.2)

    def point(self, canvas: Canvas, axes: Axes, stage: StageFacts, accuracy: float, y: float) -> None:
        role, x = ROLES[stage.role], self.x(accuracy)
        is_below = accuracy < self._low
        axes.plot([self._left, x], [y, y], color=role.colour, alpha=0.35, linewidth=1.0)
        axes.plot(
            [x],
            [y],
            marker="<" if is_below else role.marker,
            color=role.colour,
            markersize=6.0 if is_below else role.size * (0.8 if stage.role == "student" else 0.75),
            zorder=3,
        )
