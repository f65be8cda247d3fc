"""Networks of random VGG- and ResNet-like blocks: what block stages keep, and what they replace."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pbkd.data import DataSettings
from pbkd.engine import LocalSession, Precision
from pbkd.measure import count
from pbkd.networks import (
    BlockNetwork,
    BlockSpec,
    ConvSpec,
    FeatureNetwork,
    NetworkSpec,
    cost_of,
    feature_shapes,
    fresh,
    on_meta,
)
from pbkd.networks.spec import ClassifierSpec, PlainUnit, PoolSpec
from pbkd.stages import Context, Progressive, run_stage
from pbkd.students import receptive_field
from tests.unit.small_networks import blocks, digits, random_norms

pytestmark = pytest.mark.slow

info = DataSettings(name="digits").describe()


@st.composite
def networks(draw: st.DrawFn) -> NetworkSpec:
    """One to three random blocks for digits; each begins with a 1x1 convolution that makes it fit."""
    chain: list[BlockSpec] = []
    channels = 1
    for block in draw(st.lists(blocks, min_size=1, max_size=3)):
        entry = ConvSpec(in_channels=channels, out_channels=block.in_channels, kernel=1, padding=0)
        chain.append(BlockSpec(units=(PlainUnit(layers=(entry,)), *block.units)))
        channels = block.out_channels
    poolings = [draw(st.sampled_from((None, PoolSpec()))), *(None for _ in chain[1:])]
    spec = NetworkSpec(
        arch="random",
        input_shape=(1, 8, 8),
        blocks=tuple(chain),
        poolings=tuple(poolings),
        classifier=ClassifierSpec(widths=(channels, 10)),
    )
    try:
        feature_shapes(spec)
    except ValueError:  # nothing of the image is left
        assume(False)
    return spec


def weights_of(network: BlockNetwork) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], prefix: str = "") -> bool:
    names = [name for name in first if name.startswith(prefix)]
    return names == [name for name in second if name.startswith(prefix)] and all(
        torch.equal(first[name], second[name]) for name in names
    )


@given(networks())
@settings(max_examples=30, deadline=None)
def test_a_spec_tells_the_cost_and_the_shapes_of_its_modules(spec: NetworkSpec) -> None:
    network = on_meta(spec).eval()
    assert cost_of(spec) == count(network, spec.input_shape)
    features = FeatureNetwork(network)(torch.empty(1, *spec.input_shape, device="meta")).blocks
    assert feature_shapes(spec) == tuple(feature.shape[1:] for feature in features)


@given(
    networks(),
    st.sampled_from(("kaiming", "inherit", "least_squares")),
    st.sampled_from(("student", "teacher")),
    st.sampled_from(("bottom_up", "top_down")),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_stage_replaces_its_block_and_leaves_every_other_part_bitwise(
    spec: NetworkSpec, init: str, source: str, order: str
) -> None:
    teacher = random_norms(fresh(spec, 0)).eval().requires_grad_(False)
    original = weights_of(teacher)
    choice: dict[str, Any] = {"init": init, "input": source, "order": order}
    stage = Progressive.model_validate({"steps": 1, "init_images": 30, "optimizer": {"clip": 1.0}, **choice})
    auxiliary = teacher
    images = torch.randn(3, 1, 8, 8)
    for index, part in enumerate(teacher.blocks):  # A^0 as a stage takes it apart
        joined = teacher.suffix(index)(part(teacher.prefix(index)(images)))
        assert torch.equal(joined, teacher(images)), "A^0 is the teacher"
    for block in stage.expand(spec):
        planned = block.plan({"from": auxiliary.spec, "teacher": spec}, info)
        before = weights_of(auxiliary)
        inputs = {"from": auxiliary, "teacher": teacher}
        auxiliary = run_stage(block, Context(LocalSession(), inputs, digits(60), 1, Precision())).network
        after = weights_of(auxiliary)
        index = block.block - 1
        assert auxiliary.spec == planned
        assert feature_shapes(planned) == feature_shapes(spec)
        assert receptive_field(planned.blocks[index]) == receptive_field(spec.blocks[index])
        for part in ("classifier", *(f"blocks.{i}." for i in range(len(spec.blocks)) if i != index)):
            assert same(before, after, part), "weights and BatchNorm statistics"
        assert same(weights_of(teacher), original)
    pairs = zip(auxiliary.spec.blocks, spec.blocks, strict=True)
    assert all(mine != given_ for mine, given_ in pairs), "A^N contains no teacher block"
