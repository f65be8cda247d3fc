"""Pruning: as much as asked for, as planned where a plan is possible, and never an interface."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pbkd.data import DataSettings
from pbkd.engine import LocalSession, Precision
from pbkd.errors import UserError
from pbkd.measure import count
from pbkd.networks import BlockNetwork, NetworkSettings, NetworkSpec, architecture, build_block, fresh
from pbkd.networks.spec import layers_of
from pbkd.stages import Context, Prune, Unplanned
from pbkd.stages.prune import estimate_norms
from pbkd.students import StudentSettings, student_block
from tests.unit.small_networks import digits, random_norms, small_bottleneck, small_resnet, small_vgg

SPECS = {
    "vgg": small_vgg(norm=False),
    "vgg_bn": small_vgg(norm=True),
    "basic_a": small_resnet(shortcut="A"),
    "basic_b": small_resnet(shortcut="B"),
    "bottleneck": small_bottleneck(),
}
info = DataSettings(name="digits").describe()


def network_of(kind: str) -> BlockNetwork:
    return random_norms(fresh(SPECS[kind], 0)).eval().requires_grad_(False)


def prune(network: BlockNetwork, **settings: Any) -> BlockNetwork:
    context = Context(LocalSession(), {"from": network}, digits(limit=100), 0, Precision())
    return Prune(**({"round_to": 2, "recalibrate_images": 0} | settings)).run(context)


def macs(network: BlockNetwork) -> int:
    return count(network, network.spec.input_shape).macs


def check(pruned: BlockNetwork) -> None:
    """Its spec describes it, and it computes."""
    rebuilt = BlockNetwork(pruned.spec).eval()
    rebuilt.load_state_dict(pruned.state_dict())
    x = torch.randn(2, *pruned.spec.input_shape)
    assert torch.equal(rebuilt(x), pruned(x))


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("criterion", ["l1", "bn_scale"])
@pytest.mark.parametrize("target", [{"ratio": 0.5}, {"macs": 0.6}], ids=["ratio", "macs"])
def test_uniform_interior_pruning_gives_what_was_planned(
    kind: str, criterion: str, target: dict[str, float]
) -> None:
    network = network_of(kind)
    settings: dict[str, Any] = {"criterion": criterion, "round_to": 2, **target}
    if kind == "vgg" and criterion == "bn_scale":
        with pytest.raises(UserError, match="has no BatchNorm; use l1 or group_norm"):
            Prune(**settings).plan({"from": network.spec}, info)
        return
    planned = Prune(**settings).plan({"from": network.spec}, info)
    pruned = prune(network, **settings)
    assert pruned.spec == planned
    check(pruned)
    for before, after in zip(network.spec.blocks, planned.blocks, strict=True):
        assert (after.in_channels, after.out_channels) == (before.in_channels, before.out_channels)
        for old, new in zip(before.units, after.units, strict=True):
            *inner, last = zip(layers_of(old), layers_of(new), strict=True)
            assert last[0].out_channels == last[1].out_channels
            if "ratio" in target:
                assert all(b.out_channels == max(2, a.out_channels // 2) for a, b in inner)
    if "macs" in target:
        assert macs(pruned) <= 0.6 * macs(network)


@pytest.mark.parametrize("kind", ["vgg_bn", "basic_b"])
@pytest.mark.parametrize("ranking", ["uniform", "global"])
@pytest.mark.parametrize("scope", ["interior", "all"])
@pytest.mark.parametrize("criterion", ["group_norm", "bn_scale"])
def test_macs_target_is_met_in_every_mode(kind: str, ranking: str, scope: str, criterion: str) -> None:
    network = network_of(kind)
    settings = {"macs": 0.7, "ranking": ranking, "scope": scope, "criterion": criterion, "round_to": 2}
    pruned = prune(network, **settings)
    if ranking == "global":
        with pytest.raises(Unplanned):
            Prune.model_validate(settings).plan({"from": network.spec}, info)
    else:
        assert Prune.model_validate(settings).plan({"from": network.spec}, info) == pruned.spec
    assert 0.3 < macs(pruned) / macs(network) <= 0.7
    check(pruned)
    interfaces = [block.out_channels for block in pruned.spec.blocks]
    assert (interfaces == [block.out_channels for block in network.spec.blocks]) == (scope == "interior")
    assert pruned.spec.num_classes == 10
    assert network.spec == SPECS[kind], "the given network is left as it was"


def test_the_strongest_filters_survive() -> None:
    network = network_of("vgg_bn")
    first = network.blocks[0][0][0].conv
    with torch.no_grad():
        first.weight[[1, 4]] *= 100.0
    survivors = first.weight[[1, 4]].clone()
    pruned = prune(network, ratio=0.75)
    assert torch.equal(pruned.blocks[0][0][0].conv.weight, survivors)


@pytest.mark.parametrize("criterion", ["l1", "group_norm", "bn_scale"])
def test_each_criterion_keeps_what_it_finds_important(criterion: str) -> None:
    network = network_of("vgg_bn")
    first, second = network.blocks[0][0]
    with torch.no_grad():  # by each criterion other channels are the four strongest
        first.conv.weight[:4] *= 20.0
        second.conv.weight[:, 2:6] *= 60.0
        first.norm.weight[4:8] = 100.0
        first.norm.weight[:4] = 0.01
    strong = {"l1": range(4), "group_norm": range(2, 6), "bn_scale": range(4, 8)}[criterion]
    if criterion == "group_norm":  # of the whole group: filters, norm and the next layer's weights
        first.norm.weight.data.fill_(1.0)
        first.conv.weight.data[:4] /= 20.0
    kept = first.conv.weight[list(strong)].clone()
    half = Prune(ratio=1 - 4 / first.conv.out_channels, criterion=criterion, round_to=4, recalibrate_images=0)
    context = Context(LocalSession(), {"from": network}, digits(limit=100), 0, Precision())
    assert torch.equal(half.run(context).blocks[0][0][0].conv.weight, kept)


def test_removing_dead_channels_changes_nothing() -> None:
    network = network_of("basic_b")
    with torch.no_grad():
        for block in network.blocks:
            for unit in block.children():
                layer = unit.branch[0]
                half = layer.conv.out_channels // 2
                layer.conv.weight[:half] = 0.0
                layer.norm.bias[:half] = 0.0
                layer.norm.running_mean[:half] = 0.0
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(prune(network, ratio=0.5)(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", SPECS)
def test_solved_blocks_are_nearer_to_what_they_were(kind: str) -> None:
    network, images = network_of(kind), torch.randn(64, *SPECS[kind].input_shape)
    inherited = prune(network, ratio=0.5)
    solved = prune(network, ratio=0.5, init="least_squares", init_images=100)
    assert solved.spec == inherited.spec
    check(solved)
    wanted = network.features(images)
    far, near = ((pruned.features(images) - wanted).norm() for pruned in (inherited, solved))
    assert near < 0.8 * far


def test_student_blocks_can_be_pruned_as_planned() -> None:
    spec = SPECS["basic_a"]
    for index, block in enumerate(spec.blocks):
        spec = spec.with_block(index, student_block(block, StudentSettings()))
    network = fresh(spec, 0).requires_grad_(False)
    pruned = prune(network, ratio=0.5)
    assert pruned.spec == Prune(ratio=0.5, round_to=2).plan({"from": spec}, info)
    check(pruned)
    assert build_block(pruned.spec.blocks[0])(torch.zeros(1, 8, 4, 4)).shape == (1, 8, 4, 4)


@pytest.mark.parametrize("round_to", [1, 3, 8])
def test_channels_left_are_multiples(round_to: int) -> None:
    planned = Prune(ratio=0.4, round_to=round_to).plan({"from": SPECS["bottleneck"]}, info)
    pairs = zip(SPECS["bottleneck"].blocks, planned.blocks, strict=True)
    for before, after in ((b, a) for old, new in pairs for b, a in zip(old.units, new.units, strict=True)):
        for old_layer, new_layer in zip(layers_of(before)[:-1], layers_of(after)[:-1], strict=True):
            assert new_layer.out_channels % round_to == 0 or new_layer.out_channels == old_layer.out_channels
            assert new_layer.out_channels <= old_layer.out_channels


def test_mistakes_are_refused_before_anything_runs() -> None:
    spec: NetworkSpec = SPECS["basic_a"]
    for kind, scope in (("basic_a", "interior"), ("basic_b", "all")):
        for ranking in ("uniform", "global"):
            choice = {"scope": scope, "ranking": ranking, "round_to": 2}
            with pytest.raises(UserError, match=r"can leave no less than 0\.\d"):
                Prune.model_validate({"macs": 0.01, **choice}).plan({"from": SPECS[kind]}, info)
    with pytest.raises(UserError, match=r"option A.*scope=interior, or network.shortcut=B"):
        Prune(ratio=0.5, scope="all").plan({"from": spec}, info)
    other = architecture(NetworkSettings(arch="resnet20"), (3, 32, 32), 100)
    with pytest.raises(UserError, match="has 100 classes, but digits has 10"):
        Prune(ratio=0.5).plan({"from": other}, info)
    for wrong in (
        {},
        {"ratio": 0.5, "macs": 0.5},
        {"ratio": 0.99},
        {"macs": 0.0},
        {"ratio": 0.5, "recalibrate_images": 1},
    ):
        with pytest.raises(ValidationError):
            Prune.model_validate(wrong)


@pytest.mark.parametrize("batch_size", [1, 32, 64])
def test_estimated_statistics_are_those_of_the_images(batch_size: int) -> None:
    network = network_of("vgg_bn")
    images = next(iter(digits().reader("train", 64, 0, shuffle=True)))[0]
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    estimate_norms(network, images, batch_size)
    first = network.blocks[0][0][0]
    outputs = first.conv(images)
    torch.testing.assert_close(first.norm.running_mean, outputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(parameter, before[name]) for name, parameter in network.named_parameters())
    assert not any(module.training for module in network.modules())
    momenta = {m.momentum for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert momenta == {0.1}


@pytest.mark.parametrize("kind", ["vgg_bn", "basic_b", "bottleneck"])
@pytest.mark.parametrize("scope", ["interior", "all"])
def test_the_least_that_a_plan_promises_is_reached(kind: str, scope: str) -> None:
    network = network_of(kind)
    choice: dict[str, Any] = {"ranking": "global", "scope": scope, "round_to": 2}
    with pytest.raises(UserError) as refused:
        Prune(macs=1e-6, **choice).plan({"from": network.spec}, info)
    least = float(str(refused.value).split("no less than ")[1].split()[0])
    pruned = prune(network, macs=least + 1e-3, **choice)
    assert macs(pruned) <= (least + 1e-3) * macs(network)
    check(pruned)
