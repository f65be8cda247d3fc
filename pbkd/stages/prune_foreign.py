"""Pruning of networks that are not ours: which channels go, and the network without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from pbkd.errors import UserError
from pbkd.networks import BlockNetwork, TracedSpec
from pbkd.networks.channel_groups import ChannelGroup, Removed, removed_by, without
from pbkd.networks.channels import all_groups, inner_groups, narrowed_spec, original_tensors
from pbkd.networks.partition import original_name
from pbkd.networks.weights import empty
from pbkd.students import solve


def prunable_groups(spec: TracedSpec, scope: str) -> tuple[ChannelGroup, ...]:
    """The groups inside blocks and classifier (`interior`), or those of the whole network (`all`).

    Raises:
        UserError: there are none, or they cannot be told apart.
    """
    if scope == "all":
        groups = all_groups(spec)
    else:
        parts = [*range(len(spec.blocks)), None]
        groups = tuple(group for part in parts for group in inner_groups(spec, part))
    if not groups:
        raise UserError(
            f"scope={scope}: {spec.arch} has no channels there that could be fewer; choose other network.cuts"
            + ("" if scope == "all" else ", or scope=all")
        )
    return groups


@dataclass(frozen=True)
class ForeignPruning:
    """A network that is to be pruned.

    Attributes:
        network: as it is given, on the CPU.
        groups: channels that only go together.
        scores: importance of each channel of each group.
    """

    network: BlockNetwork
    groups: tuple[ChannelGroup, ...]
    scores: list[Tensor]

    @classmethod
    def of(cls, network: BlockNetwork, spec: TracedSpec, scope: str, criterion: str) -> ForeignPruning:
        """Judge the channels of `network` by `criterion` (see `Prune`)."""
        groups, tensors = prunable_groups(spec, scope), original_tensors(network)
        return cls(network, groups, [_scores(group, tensors, criterion) for group in groups])

    def removed(self, left: Sequence[int]) -> Removed:
        """What goes, if of each group about as many channels as `left` says stay, those of highest score."""
        kept = [
            group.strongest(scores, group.left(count))
            for group, scores, count in zip(self.groups, self.scores, left, strict=True)
        ]
        return removed_by(self.groups, kept, original_tensors(self.network))

    def spec(self, removed: Removed) -> TracedSpec:
        """The architecture without what is removed."""
        assert isinstance(self.network.spec, TracedSpec)
        narrower = without(original_tensors(self.network), removed)
        return narrowed_spec(self.network.spec, {name: tuple(t.shape) for name, t in narrower.items()})

    def without(self, removed: Removed) -> BlockNetwork:
        """The network without what is removed; what stays keeps its weights."""
        tensors = original_tensors(self.network)
        left = tensors | without(tensors, removed)
        pruned = empty(self.spec(removed))
        pruned.load_state_dict({name: left[original_name(name)] for name in pruned.state_dict()})
        return pruned.eval().requires_grad_(False)


@torch.no_grad()
def solve_pruned(
    network: BlockNetwork, given: BlockNetwork, removed: Removed, images: Tensor, seed: int
) -> None:
    """Solve the blocks of `network`, in place, one after the other, for those of `given`, on `images`.

    Raises:
        UserError: a block has no linear map that could be solved.
    """
    mine = others = given.stem(images)
    for block, old in zip(network.blocks, given.blocks, strict=True):
        assert isinstance(block, fx.GraphModule) and isinstance(old, fx.GraphModule)
        names = old.state_dict()
        inside = {key: entries for key, entries in removed.items() if key[0] in names}
        if inside:
            solve(block, old, inside, mine, others, seed)
        mine, others = block(mine), old(others)


def _scores(group: ChannelGroup, tensors: dict[str, Tensor], criterion: str) -> Tensor:
    """Importance of each channel of a group, (channels,)."""
    by_filter = tensors[group.root].abs().flatten(1).sum(1)
    if criterion == "l1":
        return by_filter
    wanted = ("norm",) if criterion == "bn_scale" else ("filter", "input", "norm")
    total = torch.zeros(group.size)
    for member in group.members:
        if member.role in wanted and member.tensor.endswith(".weight"):
            weights = tensors[member.tensor].movedim(member.dimension, 0)[list(member.entries)]
            squares = weights.pow(2).reshape(len(weights), -1).sum(1)  # a norm has one weight a channel
            total.index_add_(0, torch.tensor(member.channels), squares)
    if criterion == "bn_scale" and not bool(total.any()):
        return by_filter
    return total.sqrt()
