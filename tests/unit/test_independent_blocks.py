"""`input: teacher`: blocks do not depend on one another, so they may be trained in parallel and joined."""

from typing import Any

import pytest
import torch

from pbkd.data import DataSettings
from pbkd.engine import LocalSession, Precision
from pbkd.networks import BlockNetwork, NetworkSpec, fresh
from pbkd.stages import Assemble, Block, Context, Member, Progressive, Stage, run_stage
from tests.unit.small_networks import digits, random_norms, small_resnet, small_vgg

pytestmark = pytest.mark.slow

info = DataSettings(name="digits").describe()


def network_of(spec: NetworkSpec) -> BlockNetwork:
    return random_norms(fresh(spec, 0)).eval().requires_grad_(False)


def run(stage: Stage, **inputs: BlockNetwork) -> BlockNetwork:
    """Every name is a role; `_` stands for the dot, and at the end for nothing."""
    roles = {role.removesuffix("_").replace("_", "."): network for role, network in inputs.items()}
    seed = stage.block if isinstance(stage, Block) else 0
    return run_stage(stage, Context(LocalSession(), roles, digits(limit=100), seed, Precision())).network


def progressive(**settings: Any) -> Progressive:
    return Progressive.model_validate({"steps": 3, "init_images": 40, "input": "teacher", **settings})


def carried_out(members: list[Member], teacher: BlockNetwork) -> BlockNetwork:
    """The network that the last member gives."""
    results: dict[str | None, BlockNetwork] = {None: teacher}
    for member in members:
        inputs = {role: results[name] for role, name in member.inputs} | {"teacher": teacher}
        context = Context(LocalSession(), inputs, digits(limit=100), 0, Precision())
        if isinstance(member.stage, Block):
            context.seed = member.stage.block
        specs = {role: network.spec for role, network in inputs.items()}
        results[member.name] = run_stage(member.stage, context).network
        assert results[member.name].spec == member.stage.plan(specs, info)
    return results[members[-1].name]


def of_one_unit_a_block(spec: NetworkSpec) -> NetworkSpec:
    blocks = [block.model_copy(update={"units": block.units[:1]}) for block in spec.blocks]
    return spec.model_copy(update={"blocks": tuple(blocks)})


RESNET = of_one_unit_a_block(small_resnet(base_width=4))


@pytest.mark.parametrize("spec", [small_vgg(norm=True), RESNET], ids=["vgg", "resnet"])
@pytest.mark.parametrize("init", ["kaiming", "least_squares"])
def test_in_parallel_and_one_after_another_the_weights_are_the_same(spec: NetworkSpec, init: str) -> None:
    teacher = network_of(spec)
    stage = progressive(init=init)
    joined = carried_out(stage.members(spec), teacher)
    for order in (stage.expand(spec), stage.expand(spec)[::-1]):
        auxiliary = teacher
        for block in order:
            auxiliary = run(block, from_=auxiliary, teacher=teacher)
        assert auxiliary.spec == joined.spec
        state = auxiliary.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in joined.state_dict().items())


def test_what_the_student_sees_decides_by_default() -> None:
    teacher = network_of(small_vgg(norm=True))
    first = run(Block(block=1, steps=3, init_images=40), from_=teacher, teacher=teacher)
    weights = []
    for source in ("student", "teacher"):
        block = Block.model_validate({"block": 2, "steps": 3, "init_images": 40, "input": source})
        found = run(block, from_=first, teacher=teacher)
        assert torch.equal(found.blocks[0][0][0].conv.weight, first.blocks[0][0][0].conv.weight)
        weights.append(found.blocks[1][0][0].conv.weight)
    assert not torch.equal(*weights)


def test_members_of_a_chain_start_from_one_another() -> None:
    spec = small_resnet()
    members = progressive(input="student", order="top_down").members(spec)
    assert [(member.name, member.inputs) for member in members] == [
        ("3", (("from", None),)),
        ("2", (("from", "3"),)),
        ("1", (("from", "2"),)),
    ]


def test_independent_members_start_from_the_same_network_and_are_assembled() -> None:
    members = progressive(blocks=[1, 3], teacher="big").members(small_resnet())
    assert [(member.name, member.inputs) for member in members] == [
        ("1", (("from", None),)),
        ("3", (("from", None),)),
        ("assembled", (("from", None), ("block.1", "1"), ("block.3", "3"))),
    ]
    assert all(member.stage.teacher == "big" for member in members)


def test_assembling_changes_the_given_blocks_alone() -> None:
    teacher = network_of(small_resnet())
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    giver = run(Block(block=2, epochs=0, init_images=40), from_=teacher, teacher=teacher)
    joined = run(Assemble(), from_=teacher, teacher=teacher, block_2=giver)
    assert all(torch.equal(joined.state_dict()[name], tensor) for name, tensor in giver.state_dict().items())
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in before.items())
