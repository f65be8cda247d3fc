"""A network that gives its features beside its logits, by composition: nothing is hooked into it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from pbkd.networks.block_network import BlockNetwork


class Features(NamedTuple):
    """What a network computes on its way.

    Attributes:
        blocks: of each block, before any pooling, (N, C, H, W).
        penultimate: what the last linear layer gets, (N, D).
        logits: (N, classes).
    """

    blocks: tuple[Tensor, ...]
    penultimate: Tensor
    logits: Tensor


class FeatureNetwork(nn.Module):
    """`network`, whose modules it shares, giving `Features` instead of logits."""

    def __init__(self, network: BlockNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Features:
        """Images (N, C, H, W) -> features."""
        x, blocks = self.network.stem(x), []
        for block, pool in zip(self.network.blocks, self.network.poolings, strict=True):
            blocks.append(block(x))
            x = pool(blocks[-1])
        *layers, last = self.network.classifier
        for layer in layers:
            x = layer(x)
        return Features(tuple(blocks), x, last(x))
