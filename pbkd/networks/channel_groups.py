"""Channels that only go together, and the tensors of a network without some of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Removed = Mapping[tuple[str, int], Tensor]
"""By (tensor, dimension): which of its entries go, bool."""


@dataclass(frozen=True)
class Member:
    """A dimension of a tensor that loses entries with a group: entry `entries[i]` with channel `channels[i]`.

    `role` tells a layer's `filter` (its output channels), its `input` channels and a `norm`'s gains apart.
    """

    tensor: str
    dimension: int
    entries: tuple[int, ...]
    channels: tuple[int, ...]
    role: str


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that only go together with what is coupled to them.

    Attributes:
        root: the tensor whose filters they are.
        size: how many there are.
        sections: so many equal sections, each of which must keep as many as the others, at the same places
            (grouped convolutions and norms).
        members: everything that is coupled, the root first.
    """

    root: str
    size: int
    sections: int
    members: tuple[Member, ...]

    def strongest(self, scores: Tensor, left: int) -> Tensor:
        """The indices, ascending, of the `left` channels of highest score, `sections` regarded."""
        summed = scores.view(self.sections, -1).sum(0)
        places = summed.argsort(descending=True, stable=True)[: left // self.sections].sort().values
        return torch.cat([places + start for start in range(0, self.size, self.size // self.sections)])

    def renamed(self, names: Mapping[str, str]) -> ChannelGroup:
        """The same with tensors under other names."""
        members = tuple(replace(member, tensor=names[member.tensor]) for member in self.members)
        return replace(self, root=names[self.root], members=members)

    def left(self, wanted: float) -> int:
        """The nearest number of channels to `wanted` that can be left."""
        return min(self.size, max(self.sections, round(wanted / self.sections) * self.sections))


def removed_by(
    groups: Sequence[ChannelGroup], kept: Sequence[Tensor], tensors: Mapping[str, Tensor]
) -> Removed:
    """What goes if of each of `groups` only the channels `kept` (indices) stay; `tensors`: their shapes."""
    removed: dict[tuple[str, int], Tensor] = {}
    for group, indices in zip(groups, kept, strict=True):
        goes = torch.ones(group.size, dtype=torch.bool)
        goes[indices.cpu()] = False
        for member in group.members:
            key = member.tensor, member.dimension
            size = tensors[member.tensor].shape[member.dimension]
            entries = removed.setdefault(key, torch.zeros(size, dtype=torch.bool))
            entries[list(member.entries)] |= goes[list(member.channels)]
    return {key: entries for key, entries in removed.items() if bool(entries.any())}


def without(tensors: Mapping[str, Tensor], removed: Removed) -> dict[str, Tensor]:
    """Those of `tensors` that lose entries, without them."""
    narrower: dict[str, Tensor] = {}
    for (name, dimension), entries in removed.items():
        tensor = narrower.get(name, tensors[name])
        stay = (~entries).nonzero()[:, 0].to(tensor.device)
        narrower[name] = tensor.index_select(dimension, stay)
    return narrower
