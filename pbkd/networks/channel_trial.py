"""Whether channels go together: by value, on a part of a network with random weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from pbkd.networks.channel_groups import ChannelGroup, removed_by, without
from pbkd.networks.partition import count_channels, randomize, replace_tensor, with_memory

OF_NUMBER = "the forward works with no other number of them"
OF_INDICES = "tensors of whole numbers in the block may say which of them go where"
OF_VALUE = "others change when some are removed, as behind a shuffle, a padding or a norm over channels"
ROUNDING = 1e-9
SMALL_SIDES = (8, 16, 32)
"""Of maps on which it is tried out what goes together."""


class Trial:
    """Tries out on a part with random weights, in float64, whether channels go together."""

    def __init__(self, part: nn.Module, x: Tensor) -> None:
        """`part` is on the meta device, and so is its input `x`; neither is changed."""
        self._part = with_memory(copy.deepcopy(part).double()).eval().requires_grad_(False)
        randomize((*self._part.parameters(), *self._part.buffers()), 0)
        for name, module in list(self._part.named_modules()):
            is_known = type(module).__module__.partition(".")[0] in ("torch", "torchvision", "timm")
            weight = getattr(module, "weight", None)
            if is_known and isinstance(module, nn.GroupNorm | nn.LayerNorm) and weight is not None:
                if weight.dim() > 1:  # it is of places too, and goes with no channel
                    continue
                self._part.set_submodule(name, _Affine(module))  # its statistics are of all channels
        self._has_indices = any(
            not buffer.is_floating_point() and not name.endswith("num_batches_tracked")
            for name, buffer in self._part.named_buffers()
        )
        generator = torch.Generator().manual_seed(1)
        self._x = torch.randn(2, *_small(part, x), generator=generator, dtype=torch.float64)

    def objection(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Why half of each of `groups` cannot go; None: removed they change no more than silenced."""
        if self._has_indices:
            return OF_INDICES
        tensors, indices = self._part.state_dict(), torch.Generator().manual_seed(1)
        kept = [
            group.strongest(torch.rand(group.size, generator=indices), group.left(group.size / 2))
            for group in groups
        ]
        try:
            expected = self._silenced(groups, kept, tensors)(self._x)
            with redirect_stderr(io.StringIO()):  # where torch.fx explains what failed
                found = _narrowed(self._part, groups, kept)(self._x)
        except Exception:  # noqa: BLE001  # the user's forward may raise anything
            return OF_NUMBER
        if found.shape != expected.shape:
            return OF_NUMBER
        if not bool((found - expected).abs().max() <= ROUNDING * expected.abs().max()):
            return OF_VALUE
        return None

    def _silenced(
        self, groups: Sequence[ChannelGroup], kept: Sequence[Tensor], tensors: Mapping[str, Tensor]
    ) -> nn.Module:
        silent = copy.deepcopy(self._part)
        for group, stay in zip(groups, kept, strict=True):
            readers = replace(group, members=tuple(m for m in group.members if m.role == "input"))
            for (name, dimension), entries in removed_by([readers], [stay], tensors).items():
                silent.get_parameter(name).movedim(dimension, 0)[entries] = 0.0
        return silent


class _Affine(nn.Module):
    """A norm without its statistics, so that each channel depends on itself alone."""

    def __init__(self, norm: nn.GroupNorm | nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        self.is_last = type(norm) is nn.LayerNorm  # timm's own are of maps, or of both

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        shape = [1] * x.dim()
        shape[-1 if self.is_last or x.shape[1] != len(self.weight) else 1] = -1
        x = x * self.weight.view(shape)
        return x if self.bias is None else x + self.bias.view(shape)


def _small(part: nn.Module, x: Tensor) -> tuple[int, ...]:
    """The shape (C, H, W) of a smaller map on which `part` works too, if there is one."""
    channels, *sides = x.shape[1:]
    for most in SMALL_SIDES:
        shape = (channels, *(min(side, most) for side in sides))
        with suppress(Exception), torch.no_grad(), redirect_stderr(io.StringIO()):
            part(torch.empty(2, *shape, device="meta"))
            return shape
    return tuple(x.shape[1:])


def _narrowed(part: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> nn.Module:
    part = copy.deepcopy(part)
    tensors = part.state_dict()
    owners = []
    for name, tensor in without(tensors, removed_by(groups, kept, tensors)).items():
        path, _, leaf = name.rpartition(".")
        owners.append(part.get_submodule(path))
        replace_tensor(owners[-1], leaf, tensor)
    for owner in dict.fromkeys(owners):
        count_channels(owner)
    return part
