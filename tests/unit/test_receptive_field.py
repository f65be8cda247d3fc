"""The receptive field computed from a spec is what gradients of the real module say."""

import pytest
import torch
from hypothesis import given, settings

from pbkd.networks import BlockSpec, ConvSpec, build_block
from pbkd.networks.spec import PadShortcut, PlainUnit, ResidualUnit
from pbkd.students import ReceptiveField, receptive_field
from tests.unit.small_networks import blocks


def seen_by(block: BlockSpec, position: int, side: int) -> tuple[int, int]:
    """First input row that moves output row `position`, and how many rows there are from it to the last."""
    module = build_block(block).eval()
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 0.1)  # all positive: nothing cancels, no ReLU closes
    image = torch.ones(1, block.in_channels, side, side, requires_grad=True)
    output = module(image)
    output[:, :, position, position].sum().backward()
    assert image.grad is not None
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    return int(rows[0]), int(rows[-1] - rows[0]) + 1


@given(blocks)
@settings(max_examples=15, deadline=None)
def test_gradients_see_what_the_spec_says(block: BlockSpec) -> None:
    field = receptive_field(block)
    position = -(field.start // field.stride)  # the first one whose field lies wholly inside the image
    first = position * field.stride + field.start
    side = first + field.size + 2 * field.stride + 12
    assert seen_by(block, position, side) == (first, field.size)
    assert seen_by(block, position + 1, side) == (first + field.stride, field.size)


def test_known_fields() -> None:
    conv = ConvSpec(in_channels=2, out_channels=2)
    assert receptive_field(BlockSpec(units=(PlainUnit(layers=(conv, conv, conv)),))) == ReceptiveField(
        7, 1, -3
    )
    stem = ConvSpec(in_channels=2, out_channels=2, kernel=7, stride=2, padding=3)
    assert receptive_field(BlockSpec(units=(PlainUnit(layers=(stem, conv)),))) == ReceptiveField(11, 2, -5)


def test_paths_of_different_stride_are_refused() -> None:
    unit = ResidualUnit(
        branch=(ConvSpec(in_channels=2, out_channels=2),),
        shortcut=PadShortcut(in_channels=2, out_channels=2, stride=2),
    )
    with pytest.raises(ValueError, match="branch has stride 1, its shortcut 2"):
        receptive_field(BlockSpec(units=(unit,)))
