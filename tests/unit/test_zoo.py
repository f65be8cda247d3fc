"""Named architectures are those of the papers: sizes, shapes, and refusals that help."""

import pytest
import torch

from pbkd.errors import UserError
from pbkd.measure import count
from pbkd.networks import FeatureNetwork, NetworkSettings, architecture, cost_of, feature_shapes, on_meta
from pbkd.networks.zoo import NAMES

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_a_network_of_the_cost_and_the_shapes_that_its_spec_tells(name: str) -> None:
    spec = architecture(NetworkSettings(arch=name), CIFAR, 7)
    network = on_meta(spec)
    found = FeatureNetwork(network)(torch.empty(2, *CIFAR, device="meta"))
    assert found.logits.shape == (2, 7)
    assert feature_shapes(spec) == tuple(feature.shape[1:] for feature in found.blocks)
    assert cost_of(spec) == count(network, CIFAR)


@pytest.mark.parametrize(
    ("name", "parameters", "gigamacs"),
    [
        ("vgg16", 138_357_544, 15.470),
        ("vgg16_bn", 138_365_992, 15.470),
        ("vgg19", 143_667_240, 19.632),
        ("resnet18", 11_689_512, 1.814),
        ("resnet34", 21_797_672, 3.664),
        ("resnet50", 25_557_032, 4.089),
    ],
)
def test_imagenet_sizes_are_torchvisions(name: str, parameters: int, gigamacs: float) -> None:
    network = on_meta(architecture(NetworkSettings(arch=name), IMAGENET, 1000))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert count(network, IMAGENET).macs / 1e9 == pytest.approx(gigamacs, abs=5e-4)


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_cifar_resnets_have_the_papers_sizes(depth: int, parameters: int) -> None:
    network = on_meta(architecture(NetworkSettings(arch=f"resnet{depth}"), CIFAR, 10))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("stem", "side", "expected"), [("auto", 32, 4), ("auto", 224, 7), ("cifar", 224, 28)]
)
def test_stem_sets_the_resolution_of_resnet18(stem: str, side: int, expected: int) -> None:
    settings = NetworkSettings.model_validate({"arch": "resnet18", "stem": stem})
    network = on_meta(architecture(settings, (3, side, side), 10))
    assert network.features(torch.empty(1, 3, side, side, device="meta")).shape[-1] == expected


def test_options_reach_the_architecture() -> None:
    narrow = architecture(NetworkSettings(arch="resnet50", base_width=16), CIFAR, 10)
    assert [block.out_channels for block in narrow.blocks] == [64, 128, 256, 512]
    single = architecture(NetworkSettings(arch="vgg11", head=()), CIFAR, 10)
    assert single.classifier.widths == (512, 10)
    padded, projected = (
        on_meta(architecture(NetworkSettings(arch="resnet20", shortcut=kind), CIFAR, 10))
        for kind in ("A", "B")
    )
    more = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert (
        sum(p.numel() for p in projected.parameters()) - sum(p.numel() for p in padded.parameters()) == more
    )


def test_mistakes_are_told_with_the_cure() -> None:
    with pytest.raises(UserError, match=r"unknown architecture 'resnet55'; did you mean 'resnet5[06]'"):
        architecture(NetworkSettings(arch="resnet55"), CIFAR, 10)
    with pytest.raises(UserError, match="at least 32x32, found 8x8"):
        architecture(NetworkSettings(arch="vgg16"), (1, 8, 8), 10)
