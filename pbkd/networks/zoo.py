"""Named architectures: VGG (Simonyan & Zisserman 2015) and ResNet (He et al. 2016), for any input size."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal, overload

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag

from pbkd.errors import UserError
from pbkd.networks.builders import ForeignSettings, is_foreign
from pbkd.networks.partition import partition
from pbkd.networks.spec import (
    AnySpec,
    BlockSpec,
    ClassifierSpec,
    ConvSpec,
    NetworkSpec,
    PadShortcut,
    PlainUnit,
    PoolSpec,
    ResidualUnit,
    StemSpec,
)

VGG_GROUPS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
VGG_CHANNELS = (64, 128, 256, 512, 512)
RESNET_UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
CIFAR_DEPTHS = (20, 32, 44, 56, 110)
NAMES = (
    *(f"vgg{depth}{norm}" for depth in VGG_GROUPS for norm in ("", "_bn")),
    *(f"resnet{depth}" for depth in (*CIFAR_DEPTHS, *RESNET_UNITS)),
)


class NetworkSettings(BaseModel):
    """An architecture by name, with its options; the classes and the input's shape come from the data.

    Attributes:
        arch: one of `NAMES`: `vgg11` ... `vgg19_bn`; `resnet20` ... `resnet110` (CIFAR); `resnet18`, `34`,
            `50`.
        head: VGG only: widths of the hidden linear layers, `[]` for a single linear classifier.
        dropout: VGG only: between the hidden linear layers.
        shortcut: CIFAR ResNets only: `A` (subsample and zero-pad, no parameters) or `B` (1x1 convolution).
        stem: ResNet-18/34/50 only: `imagenet` (7x7, stride 2, max pooling), `cifar` (3x3), or `auto`:
            `cifar` for images smaller than 96 pixels.
        base_width: ResNets only: channels of the first stage.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arch: str
    head: tuple[PositiveInt, ...] = (4096, 4096)
    dropout: float = Field(default=0.5, ge=0.0, lt=1.0)
    shortcut: Literal["A", "B"] = "A"
    stem: Literal["auto", "imagenet", "cifar"] = "auto"
    base_width: PositiveInt | None = None


def _kind_of(settings: object) -> str:
    arch = settings.get("arch") if isinstance(settings, dict) else getattr(settings, "arch", None)
    return "foreign" if isinstance(arch, str) and is_foreign(arch) else "own"


AnyNetworkSettings = Annotated[
    Annotated[NetworkSettings, Tag("own")] | Annotated[ForeignSettings, Tag("foreign")],
    Discriminator(_kind_of),
]


def settings_of(arch: str, **options: Any) -> NetworkSettings | ForeignSettings:
    """The settings of the network that `arch` names, ours or another's."""
    return (ForeignSettings if is_foreign(arch) else NetworkSettings).model_validate(
        {"arch": arch, **options}
    )


@overload
def architecture(
    settings: NetworkSettings, input_shape: tuple[int, int, int], num_classes: int
) -> NetworkSpec: ...


@overload
def architecture(
    settings: NetworkSettings | ForeignSettings, input_shape: tuple[int, int, int], num_classes: int
) -> AnySpec: ...


def architecture(
    settings: NetworkSettings | ForeignSettings, input_shape: tuple[int, int, int], num_classes: int
) -> AnySpec:
    """The spec of a named architecture for images of `input_shape` (C, H, W).

    Raises:
        UserError: no architecture has this name, it lacks an option that is set, the images are too small for
            it, or it is a foreign one that cannot be partitioned.
    """
    if isinstance(settings, ForeignSettings):
        return partition(settings, input_shape, num_classes)
    name = settings.arch
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "it is none of the known ones."
        raise UserError(f"network.arch: unknown architecture '{name}'; {hint}\nKnown: {', '.join(NAMES)}")
    if name.startswith("vgg"):
        family, options = _vgg, ("head", "dropout")
    elif int(name.removeprefix("resnet")) in CIFAR_DEPTHS:
        family, options = _cifar_resnet, ("shortcut", "base_width")
    else:
        family, options = _resnet, ("stem", "base_width")
    for key, field in NetworkSettings.model_fields.items():
        if key not in ("arch", *options) and getattr(settings, key) != field.default:
            raise UserError(f"network.{key}: {name} has no such option; it has {' and '.join(options)}")
    return family(settings, input_shape, num_classes)


def _vgg(settings: NetworkSettings, input_shape: tuple[int, int, int], num_classes: int) -> NetworkSpec:
    name = settings.arch
    norm = name.endswith("_bn")
    channels, height, width = input_shape
    if min(height, width) < 32:
        raise UserError(
            f"network.arch: {name} halves its input five times and needs images of at least 32x32, found "
            f"{height}x{width}; set data.image_size=32, or take a CIFAR ResNet such as resnet20"
        )
    blocks = []
    for convolutions, out in zip(VGG_GROUPS[int(name[3:5])], VGG_CHANNELS, strict=True):
        layers = []
        for _ in range(convolutions):
            layers.append(ConvSpec(in_channels=channels, out_channels=out, bias=True, norm=norm))
            channels = out
        blocks.append(BlockSpec(units=(PlainUnit(layers=tuple(layers)),)))
    small = min(height, width) < 224
    pool = 1 if small else 7
    widths = (channels * pool * pool, *settings.head, num_classes)
    return NetworkSpec(
        arch=name,
        input_shape=input_shape,
        blocks=tuple(blocks),
        poolings=(PoolSpec(),) * len(blocks),
        classifier=ClassifierSpec(pool=pool, widths=widths, dropout=settings.dropout),
    )


def _basic_unit(
    channels: int, out: int, stride: int, shortcut: PadShortcut | ConvSpec | None
) -> ResidualUnit:
    first = ConvSpec(in_channels=channels, out_channels=out, stride=stride)
    second = ConvSpec(in_channels=out, out_channels=out, relu=False)
    return ResidualUnit(branch=(first, second), shortcut=shortcut)


def _bottleneck_unit(channels: int, out: int, stride: int, shortcut: ConvSpec | None) -> ResidualUnit:
    inner = out // 4
    return ResidualUnit(
        branch=(
            ConvSpec(in_channels=channels, out_channels=inner, kernel=1, padding=0),
            ConvSpec(in_channels=inner, out_channels=inner, stride=stride),
            ConvSpec(in_channels=inner, out_channels=out, kernel=1, padding=0, relu=False),
        ),
        shortcut=shortcut,
    )


def _projection(channels: int, out: int, stride: int) -> ConvSpec:
    return ConvSpec(in_channels=channels, out_channels=out, kernel=1, stride=stride, padding=0, relu=False)


def _cifar_resnet(
    settings: NetworkSettings, input_shape: tuple[int, int, int], num_classes: int
) -> NetworkSpec:
    units_per_stage = (int(settings.arch.removeprefix("resnet")) - 2) // 6
    base = settings.base_width or 16
    channels, blocks = base, []
    for stage in range(3):
        out, units = base * 2**stage, []
        for unit in range(units_per_stage):
            stride = 2 if stage and not unit else 1
            shortcut: PadShortcut | ConvSpec | None = None
            if channels != out:
                shortcut = (
                    PadShortcut(in_channels=channels, out_channels=out, stride=stride)
                    if settings.shortcut == "A"
                    else _projection(channels, out, stride)
                )
            units.append(_basic_unit(channels, out, stride, shortcut))
            channels = out
        blocks.append(BlockSpec(units=tuple(units)))
    return NetworkSpec(
        arch=settings.arch,
        input_shape=input_shape,
        stem=StemSpec(layers=(ConvSpec(in_channels=input_shape[0], out_channels=base),)),
        blocks=tuple(blocks),
        poolings=(None,) * 3,
        classifier=ClassifierSpec(widths=(channels, num_classes)),
    )


def _resnet(settings: NetworkSettings, input_shape: tuple[int, int, int], num_classes: int) -> NetworkSpec:
    depth = int(settings.arch.removeprefix("resnet"))
    base = settings.base_width or 64
    bottleneck = depth >= 50
    small = settings.stem == "cifar" or (settings.stem == "auto" and min(input_shape[1:]) < 96)
    stem = (
        StemSpec(layers=(ConvSpec(in_channels=input_shape[0], out_channels=base),))
        if small
        else StemSpec(
            layers=(ConvSpec(in_channels=input_shape[0], out_channels=base, kernel=7, stride=2, padding=3),),
            pool=PoolSpec(kernel=3, stride=2, padding=1),
        )
    )
    channels, blocks = base, []
    for stage, count in enumerate(RESNET_UNITS[depth]):
        out, units = base * 2**stage * (4 if bottleneck else 1), []
        for unit in range(count):
            stride = 2 if stage and not unit else 1
            shortcut = _projection(channels, out, stride) if channels != out or stride != 1 else None
            make = _bottleneck_unit if bottleneck else _basic_unit
            units.append(make(channels, out, stride, shortcut))
            channels = out
        blocks.append(BlockSpec(units=tuple(units)))
    return NetworkSpec(
        arch=settings.arch,
        input_shape=input_shape,
        stem=stem,
        blocks=tuple(blocks),
        poolings=(None,) * 4,
        classifier=ClassifierSpec(widths=(channels, num_classes)),
    )
