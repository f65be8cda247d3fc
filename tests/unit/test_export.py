"""A network leaves as a file that others run, and that gives the same logits for real images."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pbkd.data import DataSettings
from pbkd.errors import StageError, UserError
from pbkd.export import OPSET, Format, export, open_exported
from pbkd.networks import AnySpec, BlockNetwork, architecture, fresh, settings_of
from pbkd.networks.spec import BlockSpec, NetworkSpec
from pbkd.parity import compare, images_to_compare
from pbkd.stages import Prune
from pbkd.stages.prune import estimate_norms
from pbkd.students import StudentSettings, student_block
from tests.unit.small_networks import digits, small_resnet

pytestmark = pytest.mark.slow

FORMATS: tuple[Format, ...] = ("onnx", "pt2", "safetensors")


def spec_of(arch: str, side: int) -> AnySpec:
    return architecture(settings_of(arch), (3, side, side), 10)


def student_of(spec: AnySpec) -> AnySpec:
    assert isinstance(spec, NetworkSpec)
    for index, block in enumerate(spec.blocks):
        assert isinstance(block, BlockSpec)
        spec = spec.with_block(index, student_block(block, StudentSettings(width=0.5)))
    return spec


def real_images(network: BlockNetwork, count: int = 16) -> Tensor:
    """Digits, in the network's shape."""
    images = next(iter(digits().reader("test", count, seed=0)))[0]
    channels, side, _ = network.spec.input_shape
    return interpolate(images, (side, side), mode="bilinear").repeat(1, channels, 1, 1)


def settled(spec: AnySpec) -> BlockNetwork:
    """With BatchNorm statistics of real images, as a trained network has them."""
    network = fresh(spec, 0)
    with torch.inference_mode():
        estimate_norms(network, real_images(network, 64), 64)
    return network.eval().requires_grad_(False)


def pruned(spec: AnySpec) -> AnySpec:
    cifar = DataSettings(name="cifar10").describe()
    return Prune(ratio=0.5, round_to=4, ranking="uniform").plan({"from": spec}, cifar)


NETWORKS = {
    "digits student": lambda: settled(student_of(small_resnet())),
    "pruned resnet56": lambda: settled(pruned(spec_of("resnet56", 32))),
    "vgg16 student": lambda: settled(student_of(spec_of("vgg16", 32))),
    "traced resnet18": lambda: settled(spec_of("torchvision/resnet18", 64)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_agrees_with_pytorch_on_real_images(name: str, tmp_path: Path) -> None:
    network, file = NETWORKS[name](), tmp_path / "model.onnx"
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    export(network, file, "onnx", dynamic_batch=True, metadata={"who": "me"})
    images = real_images(network)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for size in (1, 16):
        (logits,) = session.run(["logits"], {"images": images[:size].numpy()})
        with torch.inference_mode():
            np.testing.assert_allclose(logits, network(images[:size]).numpy(), rtol=0, atol=1e-4)

    model = onnx.load(file)
    assert not [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [OPSET]
    assert {entry.key: entry.value for entry in model.metadata_props} == {"who": "me"}
    assert str(Path(__file__).parents[2]).encode() not in file.read_bytes(), "paths of this machine"
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("dynamic", "fp16"), [(False, False), (True, True)])
def test_every_format_gives_the_network_back(form: Format, dynamic: bool, fp16: bool, tmp_path: Path) -> None:
    network, file = settled(small_resnet()), tmp_path / f"model.{form}"
    export(network, file, form, dynamic_batch=dynamic, fp16=fp16)
    found = open_exported(file, form)
    images = real_images(network)
    is_single = form != "safetensors" and not dynamic
    parity = compare(network, found, images.split(5), one_by_one=is_single, fp16=fp16)
    assert parity.images == 16 and parity.agreement == 100
    assert 0 < parity.max_abs_diff < 0.05 if fp16 else parity.max_abs_diff <= 1e-5
    assert found(images[:1]).dtype == torch.float32


TRACED = (
    "torchvision/resnet18",
    "timm/regnetx_002",  # norms that activate
    "timm/test_efficientnet",
    *(
        pytest.param(name, marks=pytest.mark.proof)
        for name in ("timm/gernet_s", "timm/mobilenetv3_small_050", "torchvision/squeezenet1_1")
    ),
)


@pytest.mark.parametrize("arch", TRACED)
def test_batch_norm_is_folded_into_traced_convolutions(arch: str, tmp_path: Path) -> None:
    network = settled(spec_of(arch, 64))
    export(network, tmp_path / "model.pt2", "pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    assert "batch_norm" not in str(program.graph)
    exported = open_exported(tmp_path / "model.pt2", "pt2")
    parity = compare(network, exported, [real_images(network, 4)], one_by_one=True, fp16=False)
    assert parity.agreement == 100 and parity.spread > 0


def test_safetensors_carry_their_architecture(tmp_path: Path) -> None:
    network = settled(small_resnet())
    export(network, tmp_path / "model.safetensors", "safetensors", fp16=True)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["pbkd.spec"]) == network.spec.model_dump(mode="json")
        assert set(file.keys()) == set(network.state_dict())
        assert file.get_tensor("classifier.fc1.weight").dtype == torch.float16


class Standardized(nn.Conv2d):
    """Its weights have mean 0 and variance 1: a scale in them would be lost."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.flatten(1)
        weight = (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 1e-5)
        return nn.functional.conv2d(x, weight.view_as(self.weight), self.bias, self.stride, self.padding)


class Shifted(nn.BatchNorm2d):
    """More than its base class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Unusual(nn.Module):
    """Layers that are not what their base classes are."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Sequential(Standardized(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), Shifted(8), nn.ReLU())
        self.classify = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.second(self.first(x)).mean((2, 3)))


def test_what_only_derives_from_a_layer_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PBKD_ALLOW_IMPORT", "1")
    network = settled(architecture(settings_of("tests.unit.test_export:Unusual"), (1, 8, 8), 10))
    export(network, tmp_path / "model.pt2", "pt2", dynamic_batch=True)
    exported = open_exported(tmp_path / "model.pt2", "pt2")
    compare(network, exported, [real_images(network)], one_by_one=False, fp16=False)


class Bessel(nn.Module):
    """Traced like any other, and nothing ONNX knows."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.classify = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.special.bessel_j0(self.first(x))))
        return self.classify(torch.relu(self.third(x)).mean((2, 3)))


def test_what_onnx_cannot_express_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PBKD_ALLOW_IMPORT", "1")
    spec = architecture(settings_of("tests.unit.test_export:Bessel"), (1, 8, 8), 10)
    network = fresh(spec, 0).eval()
    with pytest.raises(UserError, match=r"test_export:Bessel: ONNX has no operation for 'prims\.bessel_j0'"):
        export(network, tmp_path / "model.onnx", "onnx")
    assert not (tmp_path / "model.onnx").exists()
    export(network, tmp_path / "model.pt2", "pt2")


@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("wrong", [0.01, float("nan")])
def test_a_file_that_computes_something_else_is_refused(wrong: float, scale: float) -> None:
    """However small the logits are: their order is what counts."""
    network = settled(small_resnet())
    classify = network.classifier.get_submodule("fc1")
    for parameter in classify.parameters():
        parameter.mul_(scale)

    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return network(x) + wrong * scale

    with pytest.raises(StageError, match="does not compute what the network does"):
        compare(network, Other(), [real_images(network)], one_by_one=False, fp16=False)


def test_large_networks_are_compared_on_fewer_images() -> None:
    assert [images_to_compare(macs) for macs in (0, 313_000_000, 15_500_000_000)] == [1000, 319, 16]
