"""The receptive field of a block, computed from its spec."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from pbkd.networks.spec import BlockSpec, ConvSpec, PadShortcut, ResidualUnit, Unit


class ReceptiveField(NamedTuple):
    """What one output position sees of the input: `size` pixels in a row, from `start`, moved by `stride`."""

    size: int
    stride: int
    start: int


def receptive_field(block: BlockSpec) -> ReceptiveField:
    """Receptive field of a block's output on its input; of a residual unit, the union of its two paths.

    Raises:
        ValueError: the two paths of a residual unit have different strides.
    """
    field = ReceptiveField(1, 1, 0)
    for unit in block.units:
        field = compose(field, _unit_field(unit))
    return field


def _unit_field(unit: Unit) -> ReceptiveField:
    if not isinstance(unit, ResidualUnit):
        return _path_field(unit.layers)
    branch, shortcut = _path_field(unit.branch), _shortcut_field(unit.shortcut)
    if branch.stride != shortcut.stride:
        raise ValueError(f"branch has stride {branch.stride}, its shortcut {shortcut.stride}")
    return union([branch, shortcut])


def _shortcut_field(shortcut: PadShortcut | ConvSpec | None) -> ReceptiveField:
    if isinstance(shortcut, ConvSpec):
        return _path_field([shortcut])
    return ReceptiveField(1, shortcut.stride if shortcut else 1, 0)


def _path_field(layers: Iterable[ConvSpec]) -> ReceptiveField:
    field = ReceptiveField(1, 1, 0)
    for layer in layers:
        reach = layer.dilation * (layer.kernel - 1) + 1
        field = compose(field, ReceptiveField(reach, layer.stride, -layer.padding))
    return field


def compose(first: ReceptiveField, second: ReceptiveField) -> ReceptiveField:
    """What an output of `second` sees of the input of `first`, whose output it gets."""
    return ReceptiveField(
        size=first.size + (second.size - 1) * first.stride,
        stride=first.stride * second.stride,
        start=first.start + second.start * first.stride,
    )


def union(fields: Iterable[ReceptiveField]) -> ReceptiveField:
    """What is seen along several paths of equal stride."""
    fields = list(fields)
    start = min(field.start for field in fields)
    end = max(field.start + field.size for field in fields)
    return ReceptiveField(end - start, fields[0].stride, start)
