"""A network that is no classifier pbkd can compress is refused in the user's names, with the cure."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from pbkd.errors import UserError
from pbkd.networks import architecture, settings_of


class Net(nn.Module):
    """A classifier whose end is the test's."""

    def __init__(self, end: Callable[["Net", Tensor], object], head: nn.Module, channels: int = 3) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head, self.other, self.last = head, nn.Linear(16, 10), nn.Softmax(1)
        self.norm = nn.BatchNorm1d(16)
        self.end = end

    def forward(self, x: Tensor) -> object:
        return self.end(self, self.early(x))


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclass
class Output:
    logits: Tensor


class Branching(Net):
    def forward(self, x: Tensor) -> object:
        return super().forward(x if x.mean() > 0 else -x)


class Tiny(nn.Module):
    """Pools until nothing is left."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.early, self.layer = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(8)), layer
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.early(x)).mean((2, 3)))


def pooled(net: Net, x: Tensor) -> Tensor:
    return net.pool(x).flatten(1)


def logits(net: Net, x: Tensor) -> Tensor:
    return net.head(pooled(net, x))


EXPECTED = "expected logits (N, 10)"
ALONE = (
    "expected the logits, one tensor (N, classes)\n"
    "wrap it in a module whose forward returns those alone, for example self.net(x)"
)
FLATTEN = "expected (N, ...) for N images, one too: write flatten(1) instead"
LOGITS = "let it return what 'head' gives: the losses here take logits, and the highest stays the highest"
MAP = "pbkd compresses classifiers, no segmentation; a classifier pools its map: x.mean((2, 3))"
LAYER = (
    "of a linear layer, or of a 1x1 convolution and a pooling\n"
    "let its forward return what one such layer gives"
)
SIZE = "the images are too small\nset data.image_size, or take a network for small images, such as resnet20"
LOSES = "loses the dimension of the images:"
linear, convolution = partial(nn.Linear, 16, 10), partial(nn.Conv2d, 16, 10, 1)

# what is wrong -> how the network is built, and what is said of it
MISTAKES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "map of 1x1": (
        lambda: Net(lambda net, x: net.head(net.pool(x)), convolution()),
        f"'head' gives (N, 10, 1, 1), {EXPECTED}\nput flatten(1) behind it",
    ),
    "dict": (
        lambda: Net(lambda net, x: {"logits": logits(net, x), "features": x}, linear()),
        f"its forward gives a dict of 'logits', 'features' (from 'head', 'early.2'), {ALONE}['logits']",
    ),
    "tuple": (
        lambda: Net(lambda net, x: (logits(net, x),), linear()),
        f"its forward gives a tuple of 1 (from 'head'), {ALONE}[0]",
    ),
    "named tuple": (
        lambda: Net(lambda net, x: Pair(logits(net, x), x), linear()),
        (
            "its forward gives the class Pair with 'logits', 'features' (from 'head', 'early.2'), "
            f"{ALONE}.logits"
        ),
    ),
    "dataclass": (
        lambda: Net(lambda net, x: Output(logits(net, x)), linear()),
        f"its forward gives the class Output with 'logits' (from 'head'), {ALONE}.logits",
    ),
    "nothing": (
        lambda: Net(lambda net, x: None, linear()),
        "its forward gives None, expected the logits, one tensor (N, classes); let it return them",
    ),
    "two heads": (
        lambda: Net(lambda net, x: (logits(net, x), net.other(pooled(net, x))), linear()),
        f"its forward gives a tuple of 2 (from 'head', 'other'), {ALONE}[0]",
    ),
    "two heads, added": (
        lambda: Net(lambda net, x: logits(net, x) + net.other(pooled(net, x)), linear()),
        f"ends in 'add', which gives (N, 10); {EXPECTED} {LAYER}",
    ),
    "squeeze": (
        lambda: Net(lambda net, x: net.head(net.pool(x).squeeze()), linear()),
        f"'squeeze' {LOSES} (1, 16, 1, 1), of one image, becomes (16,)\n{FLATTEN}",
    ),
    "torch.squeeze": (
        lambda: Net(lambda net, x: net.head(torch.squeeze(net.pool(x))), linear()),
        f"'squeeze' {LOSES} (1, 16, 1, 1), of one image, becomes (16,)\n{FLATTEN}",
    ),
    "squeeze at the end": (
        lambda: Net(lambda net, x: net.head(net.pool(x)).squeeze(), convolution()),
        f"'squeeze' {LOSES} (1, 10, 1, 1), of one image, becomes (10,)\n{FLATTEN}",
    ),
    "squeeze before what fails": (
        lambda: Net(lambda net, x: net.head(net.norm(net.pool(x).squeeze())), linear()),
        f"'squeeze' {LOSES} (1, 16, 1, 1), of one image, becomes (16,)\n{FLATTEN}",
    ),
    "flat view": (
        lambda: Net(lambda net, x: net.head(net.pool(x).view(-1)), linear()),
        f"'view' {LOSES} (1, 16, 1, 1), of one image, becomes (16,)\n{FLATTEN}",
    ),
    "mean over images": (
        lambda: Net(lambda net, x: net.head(x.mean((0, 2, 3))), linear()),
        (
            f"'mean' {LOSES} (1, 16, 16, 16), of one image, becomes (16,)\n"
            "expected (N, ...) for N images, one too: write what keeps the first dimension instead"
        ),
    ),
    "not flattened": (
        lambda: Net(lambda net, x: net.head(net.pool(x)), linear()),
        (
            "'head' takes 16 features, but gets (N, 16, 1, 1): expected (N, 16)\n"
            "put a pooling to 1x1 and flatten(1) before it"
        ),
    ),
    "softmax": (
        lambda: Net(lambda net, x: logits(net, x).softmax(1), linear()),
        f"ends in softmax, 'softmax', {EXPECTED}\n{LOGITS}",
    ),
    "log_softmax": (
        lambda: Net(lambda net, x: nn.functional.log_softmax(logits(net, x), 1), linear()),
        f"ends in log_softmax, 'log_softmax', {EXPECTED}\n{LOGITS}",
    ),
    "a layer of softmax": (
        lambda: Net(lambda net, x: net.last(logits(net, x)), linear()),
        f"ends in Softmax, 'last', {EXPECTED}\n{LOGITS}",
    ),
    "other classes": (
        lambda: Net(logits, nn.Linear(16, 7)),
        (
            f"gives logits (N, 7), but the data have 10 classes: {EXPECTED}\n"
            "give its last layer, 'head', 10 outputs; a function of yours is given num_classes"
        ),
    ),
    "no last layer": (
        lambda: Net(pooled, linear()),
        f"ends in 'flatten', which gives (N, 16); {EXPECTED} {LAYER}",
    ),
    "segmentation": (
        lambda: Net(lambda net, x: net.head(x), convolution()),
        f"'head' gives a map (N, 10, 16, 16), {EXPECTED}, one answer an image\n{MAP}",
    ),
    "segmentation at full size": (
        lambda: Net(lambda net, x: nn.functional.interpolate(net.head(x), scale_factor=2), convolution()),
        f"'interpolate' gives a map (N, 10, 32, 32), {EXPECTED}, one answer an image\n{MAP}",
    ),
    "a branch on the data": (
        lambda: Branching(logits, linear()),
        (
            "Branching.forward cannot be traced: symbolically traced variables cannot be used as inputs to "
            "control flow\n"
            "put what depends on the values of tensors into a module of its own, which then stays whole"
        ),
    ),
    "grey images": (
        lambda: Net(logits, linear(), channels=1),
        (
            "'early.0' takes 1 channels, but gets 3, as many as the images have\n"
            "build it for 3: a function of "
            "yours is given input_shape (C, H, W), and timm/NAME takes any number"
        ),
    ),
    "channels inside": (
        lambda: Net(lambda net, x: net.head(x), nn.Conv2d(8, 10, 1)),
        "'head' takes 8 channels, but gets 16: (N, 16, 16, 16)\ngive it in_channels=16",
    ),
    "too small for a convolution": (
        lambda: Tiny(nn.Conv2d(8, 8, 7)),
        f"'layer' has a kernel of 7x7, but gets a map of 4x4: {SIZE}",
    ),
    "too small for a pooling": (
        lambda: Tiny(nn.MaxPool2d(5)),
        f"'layer' has a kernel of 5x5, but gets a map of 4x4: {SIZE}",
    ),
    "made for another size": (
        lambda: Net(lambda net, x: net.head(x.flatten(1)), nn.Linear(16 * 7 * 7, 10)),
        (
            "'head' takes 784 features, but gets (N, 4096): expected (N, 784)\n"
            "it fits images of another size: "
            "set data.image_size, or pool before it to a fixed size (nn.AdaptiveAvgPool2d)"
        ),
    ),
}


def build(mistake: str) -> nn.Module:
    return MISTAKES[mistake][0]()


def said_of(arch: str, shape: tuple[int, int, int], **arguments: str) -> str:
    settings = settings_of(arch).model_copy(update={"arguments": arguments})
    with pytest.raises(UserError) as caught:
        architecture(settings, shape, 10)
    return str(caught.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_wrong_is_said_with_the_cure(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PBKD_ALLOW_IMPORT", "1")
    arch = f"{__name__}:build"
    assert said_of(arch, (3, 32, 32), mistake=mistake) == f"network {arch}: {MISTAKES[mistake][1]}"


@pytest.mark.parametrize(
    ("arch", "patches", "size"),
    [
        ("torchvision/vit_b_16", "conv_proj", 224),
        ("timm/vit_tiny_patch16_224", "patch_embed.proj", 224),
        ("timm/vit_tiny_patch16_224", "patch_embed.proj", 32),
    ],
)
def test_a_transformer_is_told_that_it_is_none_of_these(arch: str, patches: str, size: int) -> None:
    assert said_of(arch, (3, size, size)) == (
        f"network {arch}: its only convolution, '{patches}', cuts images into patches, as a transformer "
        "does; expected several, with maps (N, C, H, W) between them\n"
        "pbkd compresses convolutional classifiers: take one, such as torchvision/resnet50"
    )


def test_what_is_not_known_is_said_by_torch() -> None:
    first, second = said_of("timm/levit_128s", (3, 64, 64)).splitlines()  # made for images of 224x224
    assert first.startswith(
        "network timm/levit_128s: fails at 'stages.0.blocks.0.attn' on an image of 3x64x64: "
    )
    assert second == "it must take a batch of one: try it, in eval(), on torch.zeros(1, 3, 64, 64)"
