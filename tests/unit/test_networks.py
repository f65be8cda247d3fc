"""`BlockNetwork`: one network cut at any block is the same network; specs describe it completely."""

import pytest
import torch
from pydantic import ValidationError

from pbkd.networks import (
    BlockNetwork,
    FeatureNetwork,
    NetworkSpec,
    build_block,
    feature_shapes,
    fold_norms,
    fresh,
    on_meta,
    spec_of,
)
from pbkd.students import StudentSettings, initialize_kaiming, student_block
from tests.unit.small_networks import random_norms, small_resnet, small_vgg

SPECS = {
    "vgg": small_vgg(norm=False),
    "vgg_bn": small_vgg(norm=True, dropout=0.5),
    "resnet20_a": small_resnet(shortcut="A"),
    "resnet20_b": small_resnet(shortcut="B"),
    "resnet18": small_resnet("resnet18"),
    "resnet50": small_resnet("resnet50"),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def images(spec: NetworkSpec, count: int = 3) -> torch.Tensor:
    return torch.randn(count, *spec.input_shape, generator=torch.Generator().manual_seed(1))


def network_of(spec: NetworkSpec) -> BlockNetwork:
    return random_norms(fresh(spec, 0)).eval().requires_grad_(False)


@every_spec
def test_cut_at_any_block_it_computes_the_same(spec: NetworkSpec) -> None:
    network = network_of(spec)
    x = images(spec)
    logits = network(x)
    assert logits.shape == (3, 10)
    assert torch.equal(network.classifier(network.features(x)), logits)
    for index in range(len(spec.blocks)):
        h = network.blocks[index](network.prefix(index)(x))
        assert torch.equal(network.suffix(index)(h), logits)


@every_spec
def test_features_are_those_of_the_parts(spec: NetworkSpec) -> None:
    network = network_of(spec)
    x = images(spec)
    found = FeatureNetwork(network)(x)
    assert torch.equal(found.logits, network(x))
    assert torch.equal(network.classifier[-1](found.penultimate), found.logits)
    for index, feature in enumerate(found.blocks):
        assert torch.equal(feature, network.blocks[index](network.prefix(index)(x)))
        assert tuple(feature.shape[1:]) == feature_shapes(spec)[index]


@every_spec
def test_auxiliary_networks_lead_from_the_teacher_to_a_student_without_teacher_blocks(
    spec: NetworkSpec,
) -> None:
    teacher = network_of(spec)
    auxiliary = network_of(spec)
    x = images(spec)
    assert torch.equal(auxiliary(x), teacher(x)), "A^0 is the teacher"
    for index, block in enumerate(spec.blocks):
        narrow = student_block(block, StudentSettings())
        student = build_block(narrow)
        initialize_kaiming(student, index)
        auxiliary.replace_block(index, narrow, student.eval())
        for other in range(index + 1, len(spec.blocks)):
            state = auxiliary.blocks[other].state_dict()
            assert all(torch.equal(t, state[n]) for n, t in teacher.blocks[other].state_dict().items())
    assert all(mine != given for mine, given in zip(auxiliary.spec.blocks, spec.blocks, strict=True))
    assert spec_of(auxiliary) == auxiliary.spec, "the spec says what the modules are"
    assert BlockNetwork(auxiliary.spec)(x).shape == (3, 10)


@every_spec
def test_folded_norms_change_nothing(spec: NetworkSpec) -> None:
    network = network_of(spec)
    logits = network(images(spec))
    folded = fold_norms(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(images(spec)), logits, rtol=1e-4, atol=1e-4)


@every_spec
def test_spec_survives_json_and_the_modules(spec: NetworkSpec) -> None:
    assert NetworkSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec_of(on_meta(spec)) == spec
    assert all(tensor.is_meta for tensor in on_meta(spec).state_dict().values())


def test_blocks_that_do_not_fit_together_are_refused() -> None:
    spec = small_vgg(norm=False)
    first, second = spec.model_dump()["blocks"]
    with pytest.raises(ValidationError, match="block 1 takes 8 channels, but gets 1"):
        NetworkSpec.model_validate({**spec.model_dump(), "blocks": [second, first]})
    with pytest.raises(ValidationError, match="2 blocks need as many poolings, found 1"):
        NetworkSpec.model_validate({**spec.model_dump(), "poolings": [None]})
    with pytest.raises(ValidationError, match="Extra inputs"):
        NetworkSpec.model_validate({**spec.model_dump(), "colour": "red"})
