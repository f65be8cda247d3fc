"""A figure as SVG for a page, wide and for a phone, and as a PNG file; colours that everybody can tell apart.

In the SVG text stays text, black becomes the page's `currentColor`, and the palette its variables, such as
`--blue`: so figures follow the page into dark mode. A PNG is on white.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from pipelines.reporting.facts import StageFacts

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
LINES = [(BLUE, "-"), (VERMILLION, "--"), (GREEN, "-."), (PURPLE, ":"), (ORANGE, (0, (6, 1, 1, 1, 1, 1)))]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "font.size": 10,
}
DOTS_PER_INCH = 144
PAGE_WIDE = 9.0  # inches; wider ones fill the page, smaller ones are not blown up


@dataclass(frozen=True)
class Role:
    """How stages of a role are marked.

    Attributes:
        size: of the marker, in points.
    """

    title: str
    colour: str
    marker: str
    size: float


ROLES = {
    "stage": Role("other stages", GREY, "D", 4.5),
    "baseline": Role("baselines", GREEN, "o", 7.0),
    "teacher": Role("teacher", BLUE, "s", 8.5),
    "student": Role("student", VERMILLION, "*", 14.0),
}


class Canvas:
    """A figure being drawn, and what its points say when they are pointed at."""

    def __init__(self, figure: Figure, is_narrow: bool) -> None:
        self.figure = figure
        self.is_narrow = is_narrow
        self.points: list[tuple[str, str]] = []

    def point(self, axes: Axes, x: float, y: float, stage: StageFacts, says: str, **style: Any) -> None:
        """The marker of a stage."""
        role = ROLES[stage.role]
        look = {"color": role.colour, "marker": role.marker, "markersize": role.size}
        self.mark(axes, x, y, stage.name, says, **(look | style))

    def mark(self, axes: Axes, x: float, y: float, name: str, says: str, **look: Any) -> None:
        """A marker that becomes `<g class="point" data-stage="NAME">` with a title."""
        axes.plot([x], [y], linestyle="", gid=f"point{len(self.points)}", **({"zorder": 3} | look))
        self.points.append((name, says))


@dataclass(frozen=True)
class Drawing:
    """A figure that can be drawn.

    Attributes:
        name: of its file; keeps its ids apart from those of a page's other figures.
        description: for those who do not see it.
        wide: width and height in inches.
        narrow: the same for a phone; None where the wide one serves.
        layout: matplotlib's; None for a figure that places everything itself.
    """

    name: str
    description: str
    draw: Callable[[Canvas], None]
    wide: tuple[float, float]
    narrow: tuple[float, float] | None = None
    layout: Literal["constrained"] | None = "constrained"

    def svg(self, is_narrow: bool = False) -> str:
        """The figure as an element of a page."""
        file = io.StringIO()
        with rc_context(STYLE | {"svg.hashsalt": f"{self.name}{is_narrow}"}):
            canvas = self._drawn(is_narrow)
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            canvas.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        return _for_page(file.getvalue(), canvas.points, self.description)

    def png(self) -> bytes:
        """The figure as a file."""
        file = io.BytesIO()
        with rc_context(STYLE):
            figure = self._drawn(is_narrow=False).figure
            FigureCanvasAgg(figure)
            figure.savefig(file, format="png", dpi=DOTS_PER_INCH, facecolor="white")
        return file.getvalue()

    def _drawn(self, is_narrow: bool) -> Canvas:
        size = self.narrow if is_narrow and self.narrow else self.wide
        canvas = Canvas(Figure(size, layout=self.layout), is_narrow)
        self.draw(canvas)
        return canvas


def plain_ticks(axis: Axis, form: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis by their numbers, as many as there is room for."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if decades < 0.5:
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    else:
        steps = ((1, (1, 2, 3, 5)), (2, (1, 2, 5)), (3, (1, 3)), (math.inf, (1,)))
        within = next(within for most, within in steps if decades < most)
        axis.set_major_locator(LogLocator(subs=within))
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axis.set_minor_locator(NullLocator())


def columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Points as xs and ys."""
    return [x for x, _ in points], [y for _, y in points]


def _for_page(text: str, points: Sequence[tuple[str, str]], description: str) -> str:
    def marked(match: re.Match[str]) -> str:
        stage, says = points[int(match[1])]
        return f'<g class="point" data-stage="{escape(stage)}"><title>{escape(says)}</title>'

    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="point(\d+)">', marked, text)
    text = re.sub(r"(?<=<g) id=\"[^\"]*\"", "", text)
    text = re.sub(r'style="[^"]*"', lambda style: _page_colours(style[0]), text)
    box = re.search(r'viewBox="0 0 ([\d.]+) [^"]*"', text)
    assert box is not None, "matplotlib writes one"
    content = text[text.index(">", box.end()) + 1 :]
    inches = float(box[1]) / 72
    limit = "" if inches > PAGE_WIDE else f' style="max-width:{1.35 * inches:.2f}in"'
    return f'<svg {box[0]}{limit} role="img" aria-label="{escape(description)}">{content}'


def _page_colours(style: str) -> str:
    style = re.sub(r"font-family: [^;\"]*(; )?", "", style).replace("#000000", "currentColor")
    for colour, name in PALETTE.items():
        style = style.replace(colour, f"var(--{name})")
    return style
