"""The receptive field of a foreign block, followed through every function that its forward calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pbkd.students.receptive_field import ReceptiveField, compose, union

_REDUCTIONS = (
    "mean", "sum", "amax", "amin", "max", "min", "std", "var", "std_mean", "var_mean", "norm",
    "linalg_vector_norm", "logsumexp",
)  # fmt: skip
_MIXING = (
    "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "conv1d",
    "conv3d", "conv_transpose1d", "conv_transpose2d", "scaled_dot_product_attention", "movedim", "moveaxis",
    "__get__", "roll", "flip", "rot90", "sort", "cumsum", "cumprod", "gather", "grid_sample", "fold",
    "unfold", "multi_head_attention_forward",
)  # fmt: skip
"""May give tensors of the same size whose positions are not the same; `__get__` is that of `x.mT`."""

_ANY_LAYOUT = ("pad", "__getitem__")


def traced_receptive_field(
    block: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[ReceptiveField, ReceptiveField] | None:
    """Receptive fields along height and width of a foreign block's output on its input `x` (N, C, H, W).

    They are those of convolutions, poolings, paddings and slices; what sees the whole map, as a norm or a
    squeeze-and-excitation gate does, is left out. None: on the way to the output something else moves or
    mixes positions.
    """
    follower = _Follower()
    follower.keep(x, _Map((ReceptiveField(1, 1, 0), ReceptiveField(1, 1, 0)), (-2, -1)))
    with torch.no_grad(), follower:
        output = block(x)
    found = follower.maps.get(id(output))
    return None if found is None or found.axes != (-2, -1) else found.fields


class _Map(NamedTuple):
    """What the positions of a tensor see along height and width, and which of its dimensions those are."""

    fields: tuple[ReceptiveField, ReceptiveField]
    axes: tuple[int, int]

    def sizes(self, tensor: Tensor) -> list[int]:
        """Height and width of a tensor that is laid out like this one, as far as it has them."""
        return [tensor.shape[axis] for axis in self.axes if tensor.dim() >= -axis]


class _Follower(TorchFunctionMode):
    """Keeps the map of every tensor that comes from the input; None: it cannot be followed.

    What sees all positions, and what comes from that alone, has none and is not kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self.maps: dict[int, _Map | None] = {}
        self._tensors: list[Tensor] = []  # so that no id is given twice

    def keep(self, tensor: Tensor, found: _Map | None) -> None:
        """What `tensor` is."""
        self.maps[id(tensor)] = found
        self._tensors.append(tensor)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call it, and derive what its results see from what goes in."""
        call = _Call(getattr(func, "__name__", ""), args, kwargs or {})
        given = [tensor for tensor in _tensors((args, kwargs)) if id(tensor) in self.maps]
        maps = [self.maps[id(tensor)] for tensor in given]
        result = func(*args, **call.options)
        for tensor in _tensors(args[0] if call.name == "__setitem__" else result) if given else ():
            known = [found for found in maps if found is not None]
            if len(known) < len(maps):
                self.keep(tensor, None)
            elif not call.reduced(given[0], tensor).issuperset(known[0].axes):
                self.keep(tensor, call.mapped(given, known, tensor))
        return result


class _Call(NamedTuple):
    """A function, by its name, and what it was given."""

    name: str
    args: Sequence[Any]
    options: Mapping[str, Any]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument, by its place or name."""
        return self.args[place] if len(self.args) > place else self.options.get(name, default)

    def reduced(self, x: Tensor, result: Tensor) -> set[int]:
        """The dimensions of `x`, counted from the last, that become one number."""
        if self.name.startswith("adaptive_"):
            return {-2, -1} if result.shape[-2:] == (1, 1) else set()
        chosen = self.argument(2 if "norm" in self.name else 1, "dim")
        if self.name not in _REDUCTIONS or isinstance(chosen, Tensor):  # the larger of two
            return set()
        if chosen is None:
            return set(range(-x.dim(), 0))
        return {axis % x.dim() - x.dim() for axis in ((chosen,) if isinstance(chosen, int) else chosen)}

    def mapped(self, given: Sequence[Tensor], maps: Sequence[_Map], result: Tensor) -> _Map | None:
        """What `result` sees if the tensors `given` are `maps`; None: that is not known."""
        (fields, axes), x = maps[0], given[0]
        if (windows := self._windows(x, axes)) is not None:
            height, width = (compose(*pair) for pair in zip(fields, windows, strict=True))
            return _Map((height, width), axes) if axes == (-2, -1) or self.name in _ANY_LAYOUT else None
        reduced = self.reduced(x, result)
        is_mixing = self.name in _MIXING or self.name.startswith("fft_") or reduced.intersection(axes)
        if is_mixing or (self.name == "linear" and -1 in axes):
            return None
        strides = {tuple(field.stride for field in found.fields) for found in maps}
        if len(strides) > 1 or {found.axes for found in maps} != {axes}:
            return None
        height, width = (union(found.fields[along] for found in maps) for along in (0, 1))
        joined = _Map(
            (height, width), self._moved(axes, x.dim(), reduced if x.dim() > result.dim() else set())
        )
        same = all(
            found.sizes(tensor) == joined.sizes(result) for found, tensor in zip(maps, given, strict=True)
        )
        return joined if same else None

    def _moved(self, axes: tuple[int, int], dimensions: int, gone: set[int]) -> tuple[int, int]:
        """Where the dimensions `axes` of a tensor are in the result, which has lost those in `gone`."""
        order = list(range(-dimensions, 0))
        if self.name == "permute":
            chosen = self.argument(1, "dims")
            order = list(self.args[1:]) if isinstance(chosen, int) else list(chosen)
        elif self.name in ("transpose", "swapaxes", "swapdims"):
            first, second = self.argument(1, "dim0"), self.argument(2, "dim1")
            order[first], order[second] = order[second], order[first]
        order = [axis % dimensions - dimensions for axis in order]
        left = [axis for axis in order if axis not in gone]
        height, width = (left.index(axis) - len(left) for axis in axes)
        return height, width

    def _windows(self, x: Tensor, axes: tuple[int, int]) -> tuple[ReceptiveField, ReceptiveField] | None:
        """What one output sees of `x` along height and width; None: it does not look through windows."""
        match self.name:
            case "conv2d":
                kernel = self.argument(1, "weight").shape[-2:]
                stride, padding, dilation = (
                    self.argument(place, name, default)
                    for place, name, default in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1))
                )
            case "max_pool2d" | "avg_pool2d":
                kernel, padding = self.argument(1, "kernel_size"), self.argument(3, "padding", 0)
                stride = self.argument(2, "stride") or kernel
                dilation = self.argument(4, "dilation", 1) if self.name == "max_pool2d" else 1
            case "pad":
                pads = self.argument(1, "pad")
                before = [pads[-2 * axis - 2] if len(pads) >= -2 * axis else 0 for axis in axes]
                return ReceptiveField(1, 1, -before[0]), ReceptiveField(1, 1, -before[1])
            case "__getitem__" if (chosen := _slices(self.args[1], x.dim())) is not None:
                height, width = (chosen[axis].indices(x.shape[axis]) for axis in axes)
                return ReceptiveField(1, height[2], height[0]), ReceptiveField(1, width[2], width[0])
            case _:
                return None

        def window(along: int) -> ReceptiveField:
            size, step, spread = (_along(value, along) for value in (kernel, stride, dilation))
            reach = spread * (size - 1) + 1
            if isinstance(padding, str):
                return ReceptiveField(reach, step, -((reach - 1) // 2) if padding == "same" else 0)
            return ReceptiveField(reach, step, -_along(padding, along))

        return window(0), window(1)


def _along(value: Any, along: int) -> int:
    return int(value[along % len(value)] if isinstance(value, Sequence) else value)


def _slices(index: Any, dimensions: int) -> list[slice] | None:
    """The slice of every dimension; None: an index has something else in it."""
    given = list(index) if isinstance(index, tuple) else [index]
    for at, part in enumerate(given):
        if part is Ellipsis:
            given[at : at + 1] = [slice(None)] * (dimensions - len(given) + 1)
            break
    given += [slice(None)] * (dimensions - len(given))
    return given if all(isinstance(part, slice) for part in given) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
