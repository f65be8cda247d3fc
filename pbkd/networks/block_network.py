"""`BlockNetwork`: stem, blocks, poolings between them, classifier. The form of every network here."""

from __future__ import annotations

from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pbkd.networks.partition import original_on_meta, parts_of
from pbkd.networks.spec import (
    AnySpec,
    BlockSpec,
    ClassifierSpec,
    ConvSpec,
    NetworkSpec,
    PadShortcut,
    PoolSpec,
    ResidualUnit,
    StemSpec,
    TracedPart,
    TracedSpec,
    Unit,
)


class ConvLayer(nn.Sequential):
    """A convolution with optional BatchNorm and ReLU; `norm` and `relu` exist where the spec has them."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    relu: nn.ReLU

    def __init__(self, spec: ConvSpec) -> None:
        conv = nn.Conv2d(
            spec.in_channels,
            spec.out_channels,
            spec.kernel,
            spec.stride,
            spec.padding,
            spec.dilation,
            bias=spec.bias,
        )
        children: OrderedDict[str, nn.Module] = OrderedDict(conv=conv)
        if spec.norm:
            children["norm"] = nn.BatchNorm2d(spec.out_channels)
        if spec.relu:
            children["relu"] = nn.ReLU(inplace=False)
        super().__init__(children)


class PadChannels(nn.Module):
    """ResNet's shortcut A: (N, C, H, W) -> (N, C', ceil(H/stride), ceil(W/stride)), new channels zero."""

    def __init__(self, spec: PadShortcut) -> None:
        super().__init__()
        missing = spec.out_channels - spec.in_channels
        self.stride = spec.stride
        self.before, self.after = missing // 2, missing - missing // 2

    def forward(self, x: Tensor) -> Tensor:
        """Subsample, then pad."""
        x = x[:, :, :: self.stride, :: self.stride]
        return nn.functional.pad(x, (0, 0, 0, 0, self.before, self.after))


class Residual(nn.Module):
    """ReLU(branch(x) + shortcut(x))."""

    def __init__(self, spec: ResidualUnit) -> None:
        super().__init__()
        self.branch = nn.Sequential(*map(ConvLayer, spec.branch))
        self.shortcut: nn.Module
        match spec.shortcut:
            case None:
                self.shortcut = nn.Identity()
            case PadShortcut():
                self.shortcut = PadChannels(spec.shortcut)
            case ConvSpec():
                self.shortcut = ConvLayer(spec.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H', W')."""
        return nn.functional.relu(self.branch(x) + self.shortcut(x))


def build_unit(spec: Unit) -> nn.Module:
    """The module of one unit."""
    return Residual(spec) if isinstance(spec, ResidualUnit) else nn.Sequential(*map(ConvLayer, spec.layers))


def build_block(spec: BlockSpec) -> nn.Sequential:
    """The module of one block: its units in a row."""
    return nn.Sequential(*map(build_unit, spec.units))


def path_of(unit: nn.Module) -> list[ConvLayer]:
    """The layers of a unit's main path, in order, as `layers_of` gives their specs."""
    path = unit.branch if isinstance(unit, Residual) else unit
    return cast(list[ConvLayer], list(path.children()))


def _pool(spec: PoolSpec | None) -> nn.Module:
    return nn.Identity() if spec is None else nn.MaxPool2d(spec.kernel, spec.stride, spec.padding)


def _stem(spec: StemSpec) -> nn.Module:
    stem = nn.Sequential(*map(ConvLayer, spec.layers))
    if spec.pool is not None:
        stem.add_module("pool", _pool(spec.pool))
    return stem


def _classifier(spec: ClassifierSpec) -> nn.Sequential:
    children: OrderedDict[str, nn.Module] = OrderedDict()
    if spec.pool:
        children["pool"] = nn.AdaptiveAvgPool2d(spec.pool)
    children["flatten"] = nn.Flatten()
    last = len(spec.widths) - 1
    for number, (before, after) in enumerate(zip(spec.widths, spec.widths[1:], strict=False), 1):
        children[f"fc{number}"] = nn.Linear(before, after)
        if number < last:
            children[f"relu{number}"] = nn.ReLU()
            children[f"dropout{number}"] = nn.Dropout(spec.dropout)
    return nn.Sequential(children)


class BlockNetwork(nn.Module):
    """classifier(pool_N(block_N(... pool_1(block_1(stem(x))))))."""

    spec: AnySpec
    stem: nn.Module
    classifier: nn.Sequential

    def __init__(self, spec: AnySpec, original: nn.Module | None = None) -> None:
        """Build `spec`; a traced one from the modules of `original`, narrowed in place (None: on meta)."""
        super().__init__()
        self.spec = spec
        if isinstance(spec, TracedSpec):
            self.stem, blocks, self.classifier = parts_of(spec, original or original_on_meta(spec))
            self.blocks = nn.ModuleList(blocks)
            self.poolings = nn.ModuleList(nn.Identity() for _ in blocks)
            return
        self.stem = _stem(spec.stem)
        self.blocks = nn.ModuleList(map(build_block, spec.blocks))
        self.poolings = nn.ModuleList(map(_pool, spec.poolings))
        self.classifier = _classifier(spec.classifier)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, classes)."""
        return cast(Tensor, self.classifier(self.features(x)))

    def features(self, x: Tensor) -> Tensor:
        """Images -> what the classifier gets, (N, C', H', W')."""
        return cast(Tensor, self.prefix(len(self.blocks))(x))

    def prefix(self, index: int) -> nn.Sequential:
        """Everything before block `index` (from 0), its modules shared with this network."""
        parts: list[nn.Module] = [self.stem]
        for block, pool in zip(self.blocks[:index], self.poolings[:index], strict=True):
            parts += [block, pool]
        return nn.Sequential(*parts)

    def suffix(self, index: int) -> nn.Sequential:
        """Everything after block `index` (from 0), its pooling first; modules shared with this network."""
        parts: list[nn.Module] = [self.poolings[index]]
        for block, pool in zip(self.blocks[index + 1 :], self.poolings[index + 1 :], strict=True):
            parts += [block, pool]
        return nn.Sequential(*parts, self.classifier)

    def replace_block(self, index: int, spec: BlockSpec | TracedPart, block: nn.Module) -> None:
        """Put `block`, which `spec` describes, in the place of block `index` (from 0)."""
        self.spec = self.spec.with_block(index, spec)
        self.blocks[index] = block


def on_meta(spec: AnySpec) -> BlockNetwork:
    """The network without memory for its weights, for counting and for checking shapes."""
    with torch.device("meta"):
        return BlockNetwork(spec)


def fold_norms(module: nn.Module) -> nn.Module:
    """Merge every BatchNorm of `module` into the convolution before it, in place; for frozen parts."""
    for layer in module.modules():
        if isinstance(layer, ConvLayer) and hasattr(layer, "norm"):
            layer.conv = fuse_conv_bn_eval(layer.conv.eval(), layer.norm.eval())
            del layer.norm
    return module


def spec_of(network: BlockNetwork) -> NetworkSpec:
    """The spec of a network of ours as its modules are now: channels and features read back after pruning."""
    spec = network.spec
    assert isinstance(spec, NetworkSpec)
    blocks = tuple(
        BlockSpec(
            units=tuple(
                _unit_spec(unit, module)
                for unit, module in zip(block.units, cast(nn.Sequential, modules), strict=True)
            )
        )
        for block, modules in zip(spec.blocks, network.blocks, strict=True)
    )
    stem = [module for module in network.stem.children() if isinstance(module, ConvLayer)]
    linear = [module for module in network.classifier if isinstance(module, nn.Linear)]
    widths = (linear[0].in_features, *(layer.out_features for layer in linear))
    return spec.model_copy(
        update={
            "stem": spec.stem.model_copy(update={"layers": _layer_specs(spec.stem.layers, stem)}),
            "blocks": blocks,
            "classifier": spec.classifier.model_copy(update={"widths": widths}),
        }
    )


def _unit_spec(spec: Unit, module: nn.Module) -> Unit:
    if not isinstance(spec, ResidualUnit):
        return spec.model_copy(update={"layers": _layer_specs(spec.layers, path_of(module))})
    assert isinstance(module, Residual)
    shortcut = spec.shortcut
    if isinstance(shortcut, ConvSpec):
        assert isinstance(module.shortcut, ConvLayer)
        (shortcut,) = _layer_specs((shortcut,), [module.shortcut])
    return spec.model_copy(
        update={"branch": _layer_specs(spec.branch, path_of(module)), "shortcut": shortcut}
    )


def _layer_specs(specs: tuple[ConvSpec, ...], layers: list[ConvLayer]) -> tuple[ConvSpec, ...]:
    return tuple(
        spec.model_copy(
            update={"in_channels": layer.conv.in_channels, "out_channels": layer.conv.out_channels}
        )
        for spec, layer in zip(specs, layers, strict=True)
    )
