"""Weights from a seed and from files, under pbkd's names and those of public checkpoints."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pbkd.data import DataSettings, open_data
from pbkd.errors import UserError
from pbkd.measure import evaluate
from pbkd.networks import BlockNetwork, NetworkSettings, architecture, fresh, load_weights, weights_digest
from pbkd.networks.weights import empty
from pbkd.torchvision_compat import import_torchvision
from tests.unit.small_networks import random_norms, small_resnet, small_vgg

SIDE = 64


def check_same(theirs: nn.Module, settings: NetworkSettings) -> None:
    """Loaded with `theirs`' names, our network computes what theirs does."""
    torch.manual_seed(0)
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.0) if "running" in name else tensor.normal_(0, 0.05)
    ours = empty(architecture(settings, (3, SIDE, SIDE), 10))
    load_weights(ours, {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}, "theirs")
    x = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_resnets_load_by_their_names(name: str) -> None:
    import_torchvision()
    from torchvision.models import resnet

    check_same(
        getattr(resnet, name)(num_classes=10),
        NetworkSettings.model_validate({"arch": name, "stem": "imagenet"}),
    )


@pytest.mark.parametrize("norm", [False, True])
def test_torchvision_vggs_load_by_their_names(norm: bool) -> None:
    import_torchvision()
    from torchvision.models import vgg

    theirs = vgg.VGG(vgg.make_layers(vgg.cfgs["A"], batch_norm=norm), num_classes=10, init_weights=False)
    theirs.avgpool = nn.AdaptiveAvgPool2d(1)
    theirs.classifier = nn.Sequential(
        nn.Linear(512, 24),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(24, 24),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(24, 10),
    )
    check_same(theirs, NetworkSettings(arch="vgg11_bn" if norm else "vgg11", head=(24, 24)))
    theirs.classifier = nn.Linear(512, 10)  # as public CIFAR VGGs have it
    check_same(theirs, NetworkSettings(arch="vgg11_bn" if norm else "vgg11", head=()))


def public_names(network: BlockNetwork) -> dict[str, Tensor]:
    """The names of public CIFAR ResNets for the tensors of one of ours."""
    renamed = {}
    for name, tensor in network.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stem":
            name = f"{'conv1' if parts[2] == 'conv' else 'bn1'}.{parts[3]}"
        elif parts[0] == "classifier":
            name = f"linear.{parts[2]}"
        elif parts[3] == "branch":
            layer = f"{'conv' if parts[5] == 'conv' else 'bn'}{int(parts[4]) + 1}"
            name = f"layer{int(parts[1]) + 1}.{parts[2]}.{layer}.{parts[6]}"
        else:
            name = f"layer{int(parts[1]) + 1}.{parts[2]}.shortcut.{0 if parts[4] == 'conv' else 1}.{parts[5]}"
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_public_cifar_resnet_names_load(shortcut: str) -> None:
    given = random_norms(fresh(small_resnet(shortcut=shortcut), 5))
    tensors = {name: t for name, t in public_names(given).items() if not name.endswith("num_batches_tracked")}
    found = fresh(given.spec, 6)
    load_weights(found, tensors, "public")
    assert weights_digest(found.state_dict()) == weights_digest(given.state_dict())


def test_fresh_weights_are_a_function_of_the_seed() -> None:
    spec = small_vgg(norm=True)
    torch.manual_seed(1)
    first = weights_digest(fresh(spec, 3).state_dict())
    torch.manual_seed(2)
    assert weights_digest(fresh(spec, 3).state_dict()) == first
    assert weights_digest(fresh(spec, 4).state_dict()) != first


def test_digest_sees_names_types_shapes_and_values_but_not_layout() -> None:
    weight = torch.arange(24.0).reshape(1, 2, 3, 4)
    digest = weights_digest({"a": weight, "n": torch.tensor(1)})
    assert weights_digest({"n": torch.tensor(1), "a": weight.to(memory_format=torch.channels_last)}) == digest
    others = [weight.reshape(2, 1, 3, 4), weight.double(), weight + 1]
    assert all(weights_digest({"a": other, "n": torch.tensor(1)}) != digest for other in others)
    assert weights_digest({"b": weight, "n": torch.tensor(1)}) != digest


def test_weights_that_do_not_fit_are_named_with_both_shapes() -> None:
    network = fresh(small_resnet(), 0)
    tensors = network.state_dict()
    with pytest.raises(
        UserError, match=r"'classifier.fc1.bias' has shape \(100,\), but resnet20 needs \(10,\)\n.*classes"
    ) as said:
        load_weights(network, tensors | {"classifier.fc1.bias": torch.zeros(100)}, "w.safetensors")
    assert str(said.value).startswith("w.safetensors: ")
    with pytest.raises(UserError, match=r"1 of \d+ tensors missing: 'stem.0.conv.weight'\n"):
        load_weights(network, {n: t for n, t in tensors.items() if n != "stem.0.conv.weight"}, "w")
    with pytest.raises(UserError, match="resnet20\n1 left over: 'layer9'"):
        load_weights(network, tensors | {"layer9": torch.zeros(1)}, "w")


@pytest.mark.data("cifar-10-batches-py", "cifar10-resnet20.safetensors")
def test_public_resnet20_keeps_its_accuracy() -> None:
    root = Path(os.environ["PBKD_DATA"])
    weights = root / "cifar10-resnet20.safetensors"
    data = open_data(DataSettings(name="cifar10", root=root, limit=1000))
    network = empty(architecture(NetworkSettings(arch="resnet20"), data.info.input_shape, 10))
    load_weights(network, load_file(weights), weights.name)
    assert evaluate(network, data.reader("test", 500)).top1 == pytest.approx(90.6, abs=0.2)
