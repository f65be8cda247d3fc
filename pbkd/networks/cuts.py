"""Where a foreign network is cut into stem, blocks and classifier."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from itertools import groupby, pairwise

from torch import fx, nn

from pbkd.errors import UserError
from pbkd.networks.mistakes import paths_of
from pbkd.networks.trace import Trace, operation_name


def cut_name(traced: Trace, before: fx.Node | None, end: fx.Node) -> str:
    """What to call the cut at `end`: the outermost module behind `before` that ends there."""
    inside = set(traced.between(before, end))
    ending = [path for path in paths_of(end) if traced.places[path] is end]
    nodes = traced.graph.nodes
    whole = [path for path in ending if all(node in inside for node in nodes if path in paths_of(node))]
    paths = {path for node in nodes for path in paths_of(node)}
    return (whole or ending[-1:] or [operation_name(end, paths)])[0]


@dataclass(frozen=True)
class Cuts:
    """Where a network is cut: behind the stem (None: there is none) and behind every block."""

    stem: fx.Node | None
    blocks: tuple[fx.Node, ...]


def automatic_cuts(traced: Trace) -> Cuts:
    """Cuts where the resolution changes.

    Blocks of fewer than two layers have nothing inside to narrow and are joined with the next one, the last
    one with that before it.

    Raises:
        UserError: no map is the only tensor at any place.
    """
    if not traced.features:
        raise UserError(
            f"network {traced.reference.arch}: there is no place before its classifier where one map alone "
            "(N, C, H, W) passes, so it has no blocks; only convolutional networks have"
        )
    stem, last = stem_end(traced), traced.features[-1]
    runs = [
        list(points) for _, points in groupby(traced.features, key=lambda point: traced.shapes[point][2:])
    ]
    ends = [*(_best_end(traced, run) for run in runs[:-1]), last]
    blocks: list[fx.Node] = []
    for end in ends:
        if traced.depth(traced.between(blocks[-1] if blocks else stem, end)) >= 2:
            blocks.append(end)
    if traced.layers(traced.between(blocks[-1] if blocks else stem, last)):
        blocks[-1:] = [last]
    return Cuts(stem, tuple(blocks))


def _best_end(traced: Trace, run: list[fx.Node]) -> fx.Node:
    """The last of the points of equal resolution, but before what already belongs to the next unit.

    That is a 1x1 convolution that expands the channels (an inverted bottleneck), or what has no weights.
    """

    def rank(point: fx.Node) -> tuple[int, int, int]:
        depth = min((path.count(".") for path in paths_of(point) if traced.places[path] is point), default=99)
        return traced.shapes[point][1], depth, -run.index(point)

    def is_possible(point: fx.Node) -> bool:
        layers = traced.layers(traced.between(point, run[-1]))
        lone = layers[0] if len(layers) == 1 else None
        return not layers or (isinstance(lone, nn.Conv2d) and lone.kernel_size == (1, 1))

    return min(filter(is_possible, run), key=rank)


def stem_end(traced: Trace) -> fx.Node | None:
    """The last point before the resolution changes for the second time, if a lone layer comes before it."""
    end: fx.Node | None = None
    for point, following in pairwise(traced.features):
        if traced.depth(traced.between(None, point)) > 1:
            break
        if traced.shapes[point][2:] != traced.shapes[following][2:]:
            end = point
    return end if end is not None and traced.layers(traced.between(None, end)) else None


def named_cuts(traced: Trace, names: tuple[str, ...]) -> Cuts:
    """The cuts that the user named; the stem's before and the last feature's behind them if need be.

    Raises:
        UserError: a name is unknown, or no single map passes there.
    """
    arch, order = traced.reference.arch, list(traced.graph.nodes)
    for name in names:
        if traced.places.get(name) not in traced.features:
            what = "more than one tensor, or no map" if name in traced.places else "nothing of that name"
            possible = [path for path, node in traced.places.items() if node in traced.features]
            near = difflib.get_close_matches(name, possible, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(
                f"cuts: behind '{name}' there is {what} before the classifier of {arch}{hint}\n"
                f"possible: {_some(sorted(possible, key=lambda path: path.count('.')))}"
            )
    ends = sorted((traced.places[name] for name in names), key=order.index)
    if traced.depth(traced.between(None, ends[0])) < 2:
        stem: fx.Node | None = ends.pop(0)
    else:
        stem = stem_end(traced)
        stem = stem if stem is not None and order.index(stem) < order.index(ends[0]) else None
    last = traced.features[-1]
    if traced.layers(traced.between(ends[-1] if ends else stem, last)):
        ends.append(last)
    return Cuts(stem, tuple(ends))


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else ", ".join([*names[:12], "..."])
