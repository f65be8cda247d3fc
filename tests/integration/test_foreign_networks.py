"""Networks of torchvision and timm: divided exactly, narrowed, trained, pruned, saved, loaded elsewhere."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pbkd import artifact
from pbkd.data import Data, DataSettings, open_data
from pbkd.engine import LocalSession, Precision
from pbkd.errors import UserError
from pbkd.networks import AnySpec, BlockNetwork, TracedSpec, architecture, fresh, on_meta, settings_of
from pbkd.networks.channels import inner_groups, original_tensors
from pbkd.networks.equality import require_exact
from pbkd.networks.spec import TracedPart
from pbkd.stages import Block, Context, Prune, run_stage
from pbkd.stages.base import Stage
from pbkd.students import (
    Init,
    narrow_block,
    narrowable_blocks,
    narrowed_copy,
    start_narrowed,
    traced_receptive_field,
)

SIZE, CLASSES = 64, 3

# architecture -> the init of the student block and of pruning that is tried on it
SUPPORTED: dict[str, Init] = {
    # plain
    "timm/repvgg_a0": "inherit",
    # residual
    "timm/gernet_s": "inherit",
    "torchvision/resnet18": "inherit",
    "timm/resnet10t": "inherit",
    "timm/seresnet18": "inherit",
    # bottleneck, also with groups
    "timm/test_resnet": "least_squares",
    "timm/test_byobnet": "least_squares",
    "timm/regnetx_002": "inherit",
    "timm/resnext26ts": "inherit",
    # depthwise
    "torchvision/mobilenet_v2": "inherit",
    "torchvision/mnasnet0_5": "least_squares",
    "timm/fasternet_t0": "inherit",
    "timm/convnext_atto": "least_squares",
    "timm/test_convnext": "inherit",
    # squeeze-and-excitation
    "torchvision/mobilenet_v3_small": "least_squares",
    "timm/mobilenetv3_small_050": "inherit",
    "timm/lcnet_035": "least_squares",
    "timm/test_efficientnet": "least_squares",
    # dense, and branches that are concatenated
    "timm/densenet121": "inherit",
    "timm/ese_vovnet19b_slim": "inherit",
    "timm/ghostnet_050": "inherit",
    # that end in a 1x1 convolution
    "torchvision/squeezenet1_1": "least_squares",
    "timm/resnetv2_50": "inherit",
}

# One of each sort is tried on every run; the others by `make proof`.
EVERY_RUN = {
    "torchvision/resnet18", "timm/test_resnet", "timm/test_byobnet", "timm/test_convnext",
    "torchvision/mobilenet_v3_small", "timm/test_efficientnet", "timm/ese_vovnet19b_slim",
    "torchvision/squeezenet1_1",
}  # fmt: skip

# architecture -> why it cannot be divided into blocks
UNSUPPORTED = {
    "torchvision/vit_b_16": "cuts images into patches, as a transformer does",
    "timm/vit_tiny_patch16_224": "cuts images into patches, as a transformer does",
    "timm/test_vit": "cuts images into patches, as a transformer does",
}

# architecture -> a block that is divided off exactly, but whose channels Torch-Pruning cannot follow
UNNARROWED = {"torchvision/shufflenet_v2_x0_5": 1, "timm/cs3darknet_s": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A folder of noise: what is tested holds for any images."""
    root, random = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    settings = DataSettings(name="folder", root=root, image_size=SIZE, num_classes=CLASSES, batch_size=6)
    return open_data(settings)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[subprocess.Popen[str]]:
    """A process that has built none of the networks; given a folder, it gives the logits of the artifact."""
    program = """
import json, sys, torch
from pathlib import Path
from pbkd import artifact
torch.set_num_threads(1)
for line in sys.stdin:
    network = artifact.load(Path(line.strip()))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        print(json.dumps(network(images).tolist()), flush=True)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process


def spec_of(arch: str) -> TracedSpec:
    spec = architecture(settings_of(arch), (3, SIZE, SIZE), CLASSES)
    assert isinstance(spec, TracedSpec)
    return spec


def outcome(stage: Stage, network: BlockNetwork, data: Data, folder: Path) -> BlockNetwork:
    """What `stage` makes of `network`, which is also the teacher; it is what was planned."""
    specs: dict[str, AnySpec] = {"from": network.spec, "teacher": network.spec}
    planned = stage.plan(specs, data.info)
    session = LocalSession(folder, torch.device("cpu"), 0, 1, 60.0)
    inputs = {"from": network, "teacher": network}
    result = run_stage(stage, Context(session, inputs, data, 0, Precision()))
    assert result.network.spec == planned
    assert result.metrics["macs_ratio"] > 1
    return result.network


def check_training(
    trained: BlockNetwork, network: BlockNetwork, index: int, init: Init, data: Data, folder: Path
) -> None:
    """One step has moved the student block from where `init` began, and nothing else."""
    session = LocalSession(folder, torch.device("cpu"), 0, 1, 60.0)
    images = Context(session, {}, data, 0, Precision()).images(12)
    teacher, part = network.blocks[index], trained.spec.blocks[index]
    assert isinstance(part, TracedPart) and isinstance(network.spec, TracedSpec)
    groups = inner_groups(network.spec, index)
    with torch.no_grad():
        given = network.prefix(index)(images)
        wanted = teacher(given)

    def started(init: Init) -> tuple[nn.Module, float]:
        student = narrowed_copy(teacher, part)
        start_narrowed(student, teacher, groups, init, lambda: (given, given), 0)
        with torch.no_grad():
            return student, float((student.eval()(given) - wanted).square().mean())

    student, error = started(init)
    if init == "least_squares":
        assert error < 0.9 * started("inherit")[1]
    own = dict(trained.blocks[index].named_parameters())
    begun = dict(student.named_parameters())
    moved = [name for name in own if not torch.equal(own[name], begun[name])]
    assert len(moved) > len(own) / 2
    before, after = network.state_dict(), trained.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        if not name.startswith(f"blocks.{index}."):
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, marks=() if arch in EVERY_RUN else pytest.mark.proof) for arch in SUPPORTED],
)
def test_a_network_is_divided_narrowed_trained_pruned_and_loaded_elsewhere(
    arch: str, data: Data, elsewhere: subprocess.Popen[str], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    spec = spec_of(arch)
    require_exact(spec)

    x = torch.empty(1, 3, SIZE, SIZE, device="meta")
    meta = on_meta(spec).eval()
    possible = narrowable_blocks(spec)
    assert len(possible) >= len(spec.blocks) - 2
    for number in possible:
        student = on_meta(spec.with_block(number - 1, narrow_block(spec, number - 1, 0.5))).eval()
        given = meta.prefix(number - 1)(x)
        teacher_block, student_block = meta.blocks[number - 1], student.blocks[number - 1]
        assert student_block(given).shape == teacher_block(given).shape
        field = traced_receptive_field(teacher_block, given)
        assert field is not None and traced_receptive_field(student_block, given) == field
        assert sum(p.numel() for p in student_block.parameters()) < sum(
            p.numel() for p in teacher_block.parameters()
        )

    init = SUPPORTED[arch]
    network = fresh(spec, 0).eval().requires_grad_(False)
    block = Block.model_validate(
        {"kind": "block", "block": possible[0], "init": init, "init_images": 12, "steps": 1}
    )
    trained = outcome(block, network, data, tmp_path / "block")
    check_training(trained, network, possible[0] - 1, init, data, tmp_path / "started")

    settings = {"ratio": 0.3, "round_to": 1, "init": init, "init_images": 12, "recalibrate_images": 4}
    pruned = outcome(Prune.model_validate({"kind": "prune", **settings}), network, data, tmp_path / "prune")
    artifact.save(pruned, tmp_path / "artifact")
    assert artifact.read(tmp_path / "artifact").spec == pruned.spec
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = pruned(images).tolist()
    assert answer(elsewhere, tmp_path / "artifact") == expected


@pytest.mark.parametrize("criterion", ["l1", "group_norm", "bn_scale"])
def test_the_least_important_channels_go(criterion: str, data: Data, tmp_path: Path) -> None:
    network = fresh(spec_of("torchvision/resnet18"), 0).eval().requires_grad_(False)
    tensors = original_tensors(network)
    for name in ("conv1", "bn1", "conv2"):  # all alike, and then some of them large
        tensors[f"layer1.0.{name}.weight"].fill_(0.01)
    large = torch.arange(0, 64, 2)
    if criterion == "bn_scale":
        tensors["layer1.0.bn1.weight"][large] = 1 + large / 64
    else:
        tensors["layer1.0.conv1.weight"][large] = 1 + large.view(-1, 1, 1, 1) / 64
    tensors["layer1.0.bn1.bias"].copy_(torch.arange(64))  # tells the channels apart
    settings = {"ratio": 0.5, "criterion": criterion, "recalibrate_images": 0}
    pruned = outcome(Prune.model_validate({"kind": "prune", **settings}), network, data, tmp_path)
    assert original_tensors(pruned)["layer1.0.bn1.bias"].tolist() == large.tolist()


@pytest.mark.parametrize("scope", ["interior", "all"])
@pytest.mark.parametrize("arch", ["torchvision/resnet18", "torchvision/mobilenet_v2"])
def test_a_network_is_pruned_to_a_share_of_its_macs(
    arch: str, scope: str, data: Data, elsewhere: subprocess.Popen[str], tmp_path: Path
) -> None:
    """By a ranking of the whole network, with and without the interfaces of its blocks."""
    torch.set_num_threads(1)
    network = fresh(spec_of(arch), 0).eval().requires_grad_(False)
    settings = {"macs": 0.6, "criterion": "group_norm", "ranking": "global", "scope": scope, "round_to": 4}
    stage = Prune.model_validate({"kind": "prune", **settings, "recalibrate_images": 4})
    session = LocalSession(tmp_path / "prune", torch.device("cpu"), 0, 1, 60.0)
    inputs = {"from": network, "teacher": network}
    result = run_stage(stage, Context(session, inputs, data, 0, Precision()))
    assert 0.5 < 1 / result.metrics["macs_ratio"] <= 0.6
    artifact.save(result.network, tmp_path / "artifact")
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = result.network(images).tolist()
    assert answer(elsewhere, tmp_path / "artifact") == expected


def answer(process: subprocess.Popen[str], folder: Path) -> object:
    given, got = process.stdin, process.stdout
    assert given is not None and got is not None
    given.write(f"{folder}\n")
    given.flush()
    return json.loads(got.readline())


@pytest.mark.parametrize("arch", UNSUPPORTED)
def test_what_cannot_be_divided_says_why(arch: str) -> None:
    with pytest.raises(UserError) as error:
        spec_of(arch)
    assert arch in str(error.value) and UNSUPPORTED[arch] in str(error.value)


@pytest.mark.parametrize("arch", UNNARROWED)
def test_channels_that_are_shuffled_can_teach_but_not_be_narrowed(arch: str) -> None:
    spec = spec_of(arch)
    require_exact(spec)
    with pytest.raises(UserError, match="it can teach, but not be narrowed"):
        narrow_block(spec, UNNARROWED[arch] - 1, 0.5)
