"""The structure criterion: a student block is narrower than its teacher, and the same from outside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pbkd.errors import UserError
from pbkd.measure import count
from pbkd.networks import BlockSpec, ConvSpec, NetworkSettings, architecture, build_block, on_meta
from pbkd.networks.spec import PlainUnit, ResidualUnit, layers_of
from pbkd.students import StudentSettings, receptive_field, student_block
from tests.unit.small_networks import blocks


@pytest.mark.slow
@given(blocks, st.sampled_from((0.5, 0.75, 1.0)), st.booleans(), st.booleans(), st.integers(57, 64))
@settings(max_examples=60, deadline=None)
def test_receptive_field_output_shape_and_stride_are_kept(
    teacher: BlockSpec, width: float, norm: bool, relu: bool, side: int
) -> None:
    student = student_block(teacher, StudentSettings(width=width, projection_norm=norm, projection_relu=relu))
    assert receptive_field(student) == receptive_field(teacher)
    with torch.device("meta"):  # from 57 pixels on, three kernels that span 9 fit, though each halves the map
        image = torch.empty(2, teacher.in_channels, side, side)
        assert build_block(student)(image).shape == build_block(teacher)(image).shape
    for mine, given_ in zip(student.units, teacher.units, strict=True):
        *narrowed, last = layers_of(mine)
        assert (last.kernel, last.out_channels) == (1, layers_of(given_)[-1].out_channels)
        for new, old in zip(narrowed, layers_of(given_), strict=False):
            assert new.out_channels == round(width * old.out_channels)
            kept = {"kernel", "stride", "padding", "dilation", "bias", "norm", "relu"}
            assert new.model_dump(include=kept) == old.model_dump(include=kept)
        if isinstance(given_, ResidualUnit):
            assert isinstance(mine, ResidualUnit)
            assert mine.shortcut == given_.shortcut
            assert not last.relu, "the ReLU of a residual unit is behind the addition"


def test_bottleneck_keeps_its_three_layers() -> None:
    network = architecture(NetworkSettings(arch="resnet50"), (3, 32, 32), 10)
    student = student_block(network.blocks[1], StudentSettings())
    unit = student.units[0]
    assert [layer.kernel for layer in layers_of(unit)] == [1, 3, 1]
    assert [layer.out_channels for layer in layers_of(unit)] == [64, 64, 512]


def test_a_lone_1x1_branch_is_narrowed_like_any_other() -> None:
    unit = ResidualUnit(branch=(ConvSpec(in_channels=4, out_channels=4, kernel=1, padding=0, relu=False),))
    student = student_block(BlockSpec(units=(unit,)), StudentSettings())
    assert [layer.out_channels for layer in layers_of(student.units[0])] == [2, 4]


@pytest.mark.parametrize("filters", [1, 2, 3, 7, 64])
def test_width_that_leaves_no_filter_is_refused_with_one_that_works(filters: int) -> None:
    layer = ConvSpec(in_channels=3, out_channels=filters)
    block = BlockSpec(units=(PlainUnit(layers=(layer,)),))
    with pytest.raises(UserError, match=f"of {filters} filters without any; take at least") as caught:
        student_block(block, StudentSettings(width=0.3 / filters))
    advised = float(str(caught.value).rsplit(" ", 1)[1])
    assert student_block(block, StudentSettings(width=advised)).out_channels == filters


def ratios(arch: str, shape: tuple[int, int, int], classes: int, blocks: int) -> list[tuple[float, float]]:
    """MACs and parameters of the teacher over those of each auxiliary network, width 0.5, bottom-up."""
    network = architecture(NetworkSettings(arch=arch), shape, classes)
    teacher = count(on_meta(network), shape)
    found = []
    for index in range(blocks):
        network = network.with_block(index, student_block(network.blocks[index], StudentSettings()))
        cost = count(on_meta(network), shape)
        found.append((round(teacher.macs / cost.macs, 3), round(teacher.params / cost.params, 3)))
    return found


def test_published_structure_of_vgg16_on_cifar100() -> None:
    """Wang et al. 2018: 2.69 and 1.40; the cumulative values are exact counts of the same structure."""
    assert ratios("vgg16", (3, 32, 32), 100, 5) == [
        (1.089, 1.001),
        (1.233, 1.005),
        (1.616, 1.035),
        (2.345, 1.179),
        (2.693, 1.402),
    ]
    teacher = architecture(NetworkSettings(arch="vgg16"), (3, 32, 32), 100)
    cost = count(on_meta(teacher), (3, 32, 32))
    assert (round(cost.macs / 1e9, 4), round(cost.params / 1e6, 2)) == (0.3325, 34.01)


def test_published_structure_of_vgg16_on_cifar10_and_imagenet() -> None:
    assert ratios("vgg16", (3, 32, 32), 10, 5)[-1] == (2.698, 1.408)
    assert ratios("vgg16", (3, 224, 224), 1000, 4)[-1] == (2.525, 1.039)
