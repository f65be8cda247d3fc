"""The receptive field of a foreign block is what gradients of it say, or is not known."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pbkd.networks import TracedSpec, architecture, fresh, settings_of
from pbkd.students import traced_receptive_field

pytestmark = pytest.mark.slow

SIZE = 64
NETWORKS = (
    "torchvision/resnet18",
    "timm/test_convnext",  # (N, H, W, C) inside
    "timm/fasternet_t0",  # splits, and convolves a part
    "timm/tf_efficientnet_lite0",  # pads by the size of what it gets
    "timm/resnetblur18",  # a filter without weights
    *(
        pytest.param(name, marks=pytest.mark.proof)
        for name in (
            "timm/res2net50_48w_2s",
            "timm/skresnet18",  # branches in a dimension of their own, and gates
            "timm/resnest14d",
        )
    ),
)


class WithoutGates(TorchFunctionMode):
    """No gradient passes through what sees the whole map."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sees_all = getattr(func, "__name__", "") in ("mean", "norm", "adaptive_avg_pool2d")
        return result.detach() if sees_all and result.shape[-1] != args[0].shape[-1] else result


def seen_by(block: Callable[[Tensor], Tensor], x: Tensor, position: int) -> list[tuple[int, int]]:
    """First row that moves the output at `position` and how many there are to the last one; then columns."""
    x = x.requires_grad_()
    with WithoutGates():
        output = block(x)
    output[:, :, position, position].square().sum().backward()
    assert x.grad is not None
    seen = [x.grad.abs().sum(axes).nonzero().flatten() for axes in ((0, 1, 3), (0, 1, 2))]
    return [(int(places[0]), int(places[-1] - places[0]) + 1) for places in seen]


def check(block: Callable[[Tensor], Tensor], channels: int) -> None:
    field, across = known(
        traced_receptive_field(block, torch.empty(1, channels, SIZE, SIZE, dtype=torch.double))
    )
    assert field == across
    position = -(field.start // field.stride)  # the first one whose field lies wholly inside the image
    first = position * field.stride + field.start
    side = -(-(first + field.size + 2 * field.stride) // 8) * 8
    x = torch.randn(1, channels, side, side, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    for further in (0, 1):
        expected = (first + further * field.stride, field.size)
        assert seen_by(block, x.clone(), position + further) == [expected, expected]


def known(found: Any) -> Any:
    assert found is not None
    return found


@pytest.mark.parametrize("arch", NETWORKS)
def test_gradients_see_what_is_said(arch: str) -> None:
    torch.set_num_threads(1)
    spec = architecture(settings_of(arch), (3, SIZE, SIZE), 3)
    assert isinstance(spec, TracedSpec)
    network = fresh(spec, 0).double().eval().requires_grad_(False)
    x = torch.randn(1, 3, SIZE, SIZE, dtype=torch.double)
    for block in network.blocks:
        channels = (network.stem(x) if block is network.blocks[0] else x).shape[1]
        check(block, channels)
        x = block(network.stem(x) if block is network.blocks[0] else x)


class Beside(nn.Module):
    """A shortcut around a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function(x)


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda x: x.roll(1, 2),
    "transpose": lambda x: x.transpose(2, 3),
    "attention": lambda x: (x.flatten(2) @ torch.ones(SIZE, SIZE).double()).view_as(x),
    "shuffle": lambda x: functional.pixel_shuffle(functional.pixel_unshuffle(x, 2), 2),
    "resize": lambda x: functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2),
    "row": lambda x: x.mean(3, keepdim=True),
    "linear": lambda x: functional.linear(x, torch.ones(8, 8).double()),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_cannot_be_followed_is_not_known(name: str) -> None:
    """The shortcut's field would be wrong."""
    assert traced_receptive_field(Beside(MIXING[name]), torch.ones(1, 4, 8, 8, dtype=torch.double)) is None


FOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "functions": lambda x: functional.conv2d(
        functional.pad(x, (1, 1, 1, 1)), torch.ones(4, 4, 3, 3).double()
    ),
    "same": lambda x: functional.conv2d(x, torch.ones(4, 4, 5, 5).double(), padding="same"),
    "dilated": lambda x: functional.conv2d(
        x, torch.ones(4, 1, 3, 3).double(), padding=2, dilation=2, groups=4
    ),
    "every other": lambda x: functional.conv2d(
        x[:, :, 1::2, 1::2], torch.ones(4, 4, 3, 3).double(), padding=1
    ),
    "gate": lambda x: x * x.mean((2, 3)).view(1, 4, 1, 1),
    "norm of the whole": lambda x: (
        x.permute(0, 2, 3, 1).div(x.norm(p=2, dim=(2, 3)).view(4)).permute(0, 3, 1, 2)
    ),
    "channels shuffled": lambda x: functional.avg_pool2d(
        x.view(1, 2, 2, *x.shape[2:]).transpose(1, 2).reshape(x.shape), 3, 1, 1
    ),
    "a part": lambda x: torch.cat([x[:, :2], functional.avg_pool2d(x[:, 2:], 3, 1, 1)], 1),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_functions_are_followed_wherever_they_are_called(name: str) -> None:
    torch.manual_seed(0)
    check(FOLLOWED[name], 4)
