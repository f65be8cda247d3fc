"""The cost of an architecture and the shapes of its features, from its spec alone.

A network of ours is described down to every layer, so both follow by arithmetic, without a tensor: `pbkd
plan` asks for hundreds of them. A traced network runs once on the meta device.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch

from pbkd.measure import Cost, count
from pbkd.networks.block_network import on_meta
from pbkd.networks.features import FeatureNetwork, Features
from pbkd.networks.spec import (
    AnySpec,
    ClassifierSpec,
    ConvSpec,
    NetworkSpec,
    PadShortcut,
    PoolSpec,
    ResidualUnit,
    TracedSpec,
    Unit,
    layers_of,
)

Shape = tuple[int, int, int]


def cost_of(spec: AnySpec) -> Cost:
    """Parameters and multiply-accumulates for one image, as `pbkd.measure.count` counts them."""
    return _traced_cost(spec) if isinstance(spec, TracedSpec) else _walked(spec)[0]


def feature_shapes(spec: AnySpec) -> tuple[Shape, ...]:
    """(channels, height, width) of the feature of each block, before any pooling.

    Raises:
        ValueError: nothing is left of the image, or two layers do not fit.
    """
    return _traced_shapes(spec) if isinstance(spec, TracedSpec) else _walked(spec)[1]


class _Walk:
    """A walk from the image to the logits, that adds up what it meets; at `shape` so far."""

    def __init__(self, spec: NetworkSpec) -> None:
        self.shape: Shape = spec.input_shape
        self.params = self.macs = 0
        self._arch = spec.arch

    def through(self, layer: ConvSpec | PoolSpec | None) -> Shape:
        """Go through a layer (torch.nn.Conv2d and MaxPool2d document how large its output is)."""
        if layer is None:
            return self.shape
        channels, *sides = self.shape
        seen = (layer.dilation if isinstance(layer, ConvSpec) else 1) * (layer.kernel - 1) + 1
        height, width = ((side + 2 * layer.padding - seen) // layer.stride + 1 for side in sides)
        if min(height, width) < 1:
            raise ValueError(f"{self._arch}: a layer with kernel {layer.kernel} gets only {sides} pixels")
        if isinstance(layer, ConvSpec):
            channels, filters = layer.out_channels, layer.kernel**2 * layer.in_channels * layer.out_channels
            self.params += filters + layer.bias * channels
            self.macs += filters * height * width
        self.shape = channels, height, width
        return self.shape

    def through_unit(self, unit: Unit) -> None:
        """Go through the main path of a unit, and through its shortcut."""
        given = self.shape
        added: Shape | None = None
        if isinstance(unit, ResidualUnit):
            match unit.shortcut:
                case None:
                    added = given
                case PadShortcut(out_channels=channels, stride=stride):
                    added = channels, -(-given[1] // stride), -(-given[2] // stride)
                case ConvSpec():
                    added = self.through(unit.shortcut)
        self.shape = given
        for layer in layers_of(unit):
            self.through(layer)
        if added not in (None, self.shape):
            raise ValueError(f"{self._arch}: a unit adds {added} to {self.shape}")

    def through_classifier(self, spec: ClassifierSpec) -> None:
        """Go through the linear layers."""
        channels, height, width = self.shape
        flat = channels * (spec.pool**2 or height * width)
        if flat != spec.widths[0]:
            raise ValueError(f"{self._arch}: the classifier takes {spec.widths[0]} features, but gets {flat}")
        for before, after in pairwise(spec.widths):
            self.params += before * after + after
            self.macs += before * after


@lru_cache(maxsize=1024)
def _walked(spec: NetworkSpec) -> tuple[Cost, tuple[Shape, ...]]:
    walk, features = _Walk(spec), []
    for layer in (*spec.stem.layers, spec.stem.pool):
        walk.through(layer)
    for block, pool in zip(spec.blocks, spec.poolings, strict=True):
        for unit in block.units:
            walk.through_unit(unit)
        features.append(walk.shape)
        walk.through(pool)
    walk.through_classifier(spec.classifier)
    return Cost(params=walk.params, macs=walk.macs), tuple(features)


@lru_cache(maxsize=1024)
def _traced_cost(spec: TracedSpec) -> Cost:
    return count(on_meta(spec), spec.input_shape)


@lru_cache(maxsize=1024)
def _traced_shapes(spec: TracedSpec) -> tuple[Shape, ...]:
    with torch.no_grad():
        images = torch.empty(1, *spec.input_shape, device="meta")
        features: Features = FeatureNetwork(on_meta(spec).eval())(images)
    return tuple((feature.shape[1], feature.shape[2], feature.shape[3]) for feature in features.blocks)
