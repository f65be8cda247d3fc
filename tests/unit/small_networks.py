"""Networks small enough to train within a test, and random blocks for properties of all of them."""

from functools import cache
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from pbkd.data import Data, DataSettings, open_data
from pbkd.engine import LocalSession, OptimizerSettings, Task, TrainingSettings, fit
from pbkd.networks import BlockNetwork, BlockSpec, ConvSpec, NetworkSettings, NetworkSpec, architecture, fresh
from pbkd.networks.spec import ClassifierSpec, PadShortcut, PlainUnit, PoolSpec, ResidualUnit, Unit
from pbkd.stages.base import label_objective

CHANNELS = (8, 16)

# So small they gain nothing from a second thread, and lose a lot where threads wait for a busy machine.
torch.set_num_threads(1)


@cache
def digits(limit: int | None = None) -> Data:
    return open_data(DataSettings(name="digits", batch_size=50, limit=limit))


def small_vgg(norm: bool, dropout: float = 0.0) -> NetworkSpec:
    """Two blocks of two convolutions for digits."""
    blocks, before = [], 1
    for channels in CHANNELS:
        first = ConvSpec(in_channels=before, out_channels=channels, bias=True, norm=norm)
        second = ConvSpec(in_channels=channels, out_channels=channels, bias=True, norm=norm)
        blocks.append(BlockSpec(units=(PlainUnit(layers=(first, second)),)))
        before = channels
    return NetworkSpec(
        arch="vgg-small",
        input_shape=(1, 8, 8),
        blocks=tuple(blocks),
        poolings=(PoolSpec(),) * 2,
        classifier=ClassifierSpec(pool=1, widths=(before, 12, 10), dropout=dropout),
    )


def small_resnet(arch: str = "resnet20", shortcut: str = "B", base_width: int = 8) -> NetworkSpec:
    """`resnet20` for basic, `resnet50` for bottleneck units, which have but one kind of shortcut."""
    options = {"shortcut": shortcut} if arch == "resnet20" else {}
    settings = NetworkSettings.model_validate({"arch": arch, "base_width": base_width} | options)
    return architecture(settings, (1, 8, 8), 10)


def small_bottleneck() -> NetworkSpec:
    """Two stages of two bottleneck units each, as ResNet-50 begins."""
    spec = small_resnet("resnet50", base_width=8)
    blocks = tuple(BlockSpec(units=block.units[:2]) for block in spec.blocks[:2])
    classifier = ClassifierSpec(widths=(blocks[-1].out_channels, 10))
    return NetworkSpec(
        arch="resnet50",
        input_shape=spec.input_shape,
        stem=spec.stem,
        blocks=blocks,
        poolings=(None,) * 2,
        classifier=classifier,
    )


def trained(spec: NetworkSpec, epochs: int, lr: float = 0.1) -> BlockNetwork:
    """A network that knows digits somewhat, frozen and in eval mode."""
    network = fresh(spec, 0)
    data = digits()
    reader = data.reader("train", 50, 0, shuffle=True, augment=True)
    settings = TrainingSettings(epochs=epochs, optimizer=OptimizerSettings(lr=lr, clip=5.0))
    fit(Task(trained=network, objective=label_objective), settings, reader, LocalSession(), 0)
    return network


def random_norms(network: BlockNetwork, seed: int = 0) -> BlockNetwork:
    """`network` with BatchNorm statistics and gains that are not the trivial ones."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            tensors: tuple[Tensor, ...] = (module.weight.data, module.bias.data)
            for tensor in (*tensors, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return network


@st.composite
def convolutions(draw: st.DrawFn, in_channels: int, out_channels: int, stride: int, relu: bool) -> ConvSpec:
    kernel = draw(st.sampled_from((1, 3, 5)))
    dilation = draw(st.sampled_from((1, 2)))
    norm = draw(st.booleans())
    return ConvSpec(
        in_channels=in_channels,
        out_channels=out_channels,
        kernel=kernel,
        stride=stride,
        padding=dilation * (kernel - 1) // 2,
        dilation=dilation,
        bias=not norm,
        norm=norm,
        relu=relu,
    )


@st.composite
def plain_blocks(draw: st.DrawFn) -> BlockSpec:
    """VGG-like: convolutions of any kernel, stride, dilation and even unusual padding in a row."""
    channels = draw(st.lists(st.integers(2, 6), min_size=2, max_size=4))
    layers = []
    for before, after in pairwise(channels):
        layer = draw(convolutions(before, after, draw(st.sampled_from((1, 2))), relu=True))
        padding = draw(st.integers(0, layer.padding + 1))
        layers.append(layer.model_copy(update={"padding": padding}))
    return BlockSpec(units=(PlainUnit(layers=tuple(layers)),))


@st.composite
def residual_blocks(draw: st.DrawFn) -> BlockSpec:
    """ResNet-like: basic or bottleneck units; identity, padded or projected shortcuts."""
    channels = draw(st.integers(2, 5))
    units: list[Unit] = []
    for _ in range(draw(st.integers(1, 3))):
        stride, out = draw(st.sampled_from((1, 2))), draw(st.sampled_from((channels, channels + 3)))
        inner = draw(st.integers(2, 5))
        branch = [draw(convolutions(channels, inner, stride, relu=True))]
        if draw(st.booleans()):
            branch.append(draw(convolutions(inner, inner, 1, relu=True)))
            branch.append(ConvSpec(in_channels=inner, out_channels=out, kernel=1, padding=0, relu=False))
        else:
            branch.append(draw(convolutions(inner, out, 1, relu=False)))
        shortcut: PadShortcut | ConvSpec | None = None
        if stride != 1 or out != channels:
            if draw(st.booleans()):
                shortcut = PadShortcut(in_channels=channels, out_channels=out, stride=stride)
            else:
                shortcut = ConvSpec(
                    in_channels=channels, out_channels=out, kernel=1, stride=stride, padding=0, relu=False
                )
        units.append(ResidualUnit(branch=tuple(branch), shortcut=shortcut))
        channels = out
    return BlockSpec(units=tuple(units))


blocks = st.one_of(plain_blocks(), residual_blocks())
