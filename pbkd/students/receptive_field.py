"""The receptive field of a block, computed from its spec, or of a foreign network from its graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

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
        field = _compose(field, _unit_field(unit))
    return field


def traced_receptive_field(block: fx.GraphModule, x: Tensor) -> tuple[ReceptiveField, ReceptiveField] | None:
    """Receptive fields along height and width of a foreign block's output on its input `x` (N, C, H, W).

    They are those of convolutions and poolings; what sees the whole map, as a squeeze-and-excitation gate
    does, is left out. None: an operation that is neither changes the resolution.
    """
    runner = _FieldRunner(block)
    with torch.no_grad():
        runner.run(x)
    (output,) = (node for node in block.graph.nodes if node.op == "output")
    return runner.fields.get(cast(fx.Node, output.args[0]))


class _FieldRunner(fx.Interpreter):
    """Runs a graph and keeps the receptive fields (height, width) of the maps."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.fields: dict[fx.Node, tuple[ReceptiveField, ReceptiveField]] = {}
        self._sizes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run, and derive the fields from those of what goes in."""
        result = super().run_node(n)
        if isinstance(result, Tensor) and result.dim() >= 3:
            self._sizes[n] = tuple(result.shape)
            if n.op == "placeholder":
                self.fields[n] = (ReceptiveField(1, 1, 0), ReceptiveField(1, 1, 0))
            elif (windows := _windows(self.module, n)) is not None:
                if (given := self.fields.get(n.all_input_nodes[0])) is not None:
                    height, width = (_compose(*pair) for pair in zip(given, windows, strict=True))
                    self.fields[n] = height, width
            elif sources := [node for node in n.all_input_nodes if node in self.fields]:
                sources = [node for node in sources if self._positions(node) == self._positions(n)]
                if sources:
                    paths = zip(*(self.fields[node] for node in sources), strict=True)
                    height, width = (_union(fields) for fields in paths)
                    self.fields[n] = height, width
        return result

    def _positions(self, node: fx.Node) -> int:
        """Of a map, wherever its channels stand."""
        sizes = self._sizes[node]
        return sizes[2] * sizes[3] if len(sizes) == 4 else sizes[-1]


def _windows(module: nn.Module, node: fx.Node) -> tuple[ReceptiveField, ReceptiveField] | None:
    """What one output of a convolution or pooling sees, along height and width; None: it is neither."""
    kernel: Any
    stride: Any
    padding: Any
    dilation: Any
    if node.op == "call_module":
        layer = module.get_submodule(str(node.target))
        if not isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            return None
        kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
        dilation = 1 if isinstance(layer, nn.AvgPool2d) else layer.dilation
    elif node.target in (nn.functional.max_pool2d, nn.functional.avg_pool2d):
        names = ("kernel_size", "stride", "padding")
        given = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
        kernel, padding, dilation = given["kernel_size"], given.get("padding", 0), given.get("dilation", 1)
        stride = given.get("stride") or kernel
    else:
        return None
    height, width = (
        ReceptiveField(
            _along(dilation, axis) * (_along(kernel, axis) - 1) + 1,
            _along(stride, axis),
            0 if isinstance(padding, str) else -_along(padding, axis),
        )
        for axis in (0, 1)
    )
    return height, width


def _along(value: Any, axis: int) -> int:
    return int(value[axis] if isinstance(value, tuple | list) else value)


def _union(fields: Iterable[ReceptiveField]) -> ReceptiveField:
    fields = list(fields)
    start = min(field.start for field in fields)
    end = max(field.start + field.size for field in fields)
    return ReceptiveField(end - start, max(field.stride for field in fields), start)


def _unit_field(unit: Unit) -> ReceptiveField:
    if not isinstance(unit, ResidualUnit):
        return _path_field(unit.layers)
    branch, shortcut = _path_field(unit.branch), _shortcut_field(unit.shortcut)
    if branch.stride != shortcut.stride:
        raise ValueError(f"branch has stride {branch.stride}, its shortcut {shortcut.stride}")
    start = min(branch.start, shortcut.start)
    end = max(branch.start + branch.size, shortcut.start + shortcut.size)
    return ReceptiveField(end - start, branch.stride, start)


def _shortcut_field(shortcut: PadShortcut | ConvSpec | None) -> ReceptiveField:
    if isinstance(shortcut, ConvSpec):
        return _path_field([shortcut])
    return ReceptiveField(1, shortcut.stride if shortcut else 1, 0)


def _path_field(layers: Iterable[ConvSpec]) -> ReceptiveField:
    field = ReceptiveField(1, 1, 0)
    for layer in layers:
        reach = layer.dilation * (layer.kernel - 1) + 1
        field = _compose(field, ReceptiveField(reach, layer.stride, -layer.padding))
    return field


def _compose(first: ReceptiveField, second: ReceptiveField) -> ReceptiveField:
    return ReceptiveField(
        size=first.size + (second.size - 1) * first.stride,
        stride=first.stride * second.stride,
        start=first.start + second.start * first.stride,
    )
