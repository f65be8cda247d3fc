"""A student block that looks different from outside is refused before anything is trained."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pbkd.data import DataSettings
from pbkd.errors import UserError
from pbkd.networks import BlockSpec, NetworkSpec, TracedPart, TracedSpec, architecture, settings_of
from pbkd.networks.spec import PlainUnit, ResidualUnit, layers_of
from pbkd.stages import Assemble, Block, Progressive
from pbkd.students import StudentSettings, interface, narrow_block, require_interchangeable, student_block
from tests.unit.small_networks import small_bottleneck, small_resnet, small_vgg

info = DataSettings(name="digits").describe()
NAMES = ["vgg", "resnet", "bottleneck"]
OURS = [small_vgg(norm=True), small_resnet(), small_bottleneck()]


def with_first_layer(block: BlockSpec, **changes: int) -> BlockSpec:
    """`block` with another convolution at its beginning."""
    unit = block.units[0]
    first, *others = layers_of(unit)
    layers = (first.model_copy(update=changes), *others)
    where = "branch" if isinstance(unit, ResidualUnit) else "layers"
    return BlockSpec(units=(unit.model_copy(update={where: layers}), *block.units[1:]))


def refused(error: pytest.ExceptionInfo[UserError], *words: str) -> str:
    message = str(error.value)
    assert len(message.splitlines()) <= 3, message
    for word in (*words, "use another width, or keep the teacher block"):
        assert word in message, message
    return message


@pytest.mark.parametrize("network", OURS, ids=NAMES)
@pytest.mark.parametrize("width", [0.25, 0.5, 1.0])
def test_student_blocks_of_our_networks_are_interchangeable(network: NetworkSpec, width: float) -> None:
    for index, block in enumerate(network.blocks):
        require_interchangeable(network, index, student_block(block, StudentSettings(width=width)))


CHANGES = [{"kernel": 5}, {"kernel": 5, "padding": 2}, {"dilation": 2, "padding": 2}, {"padding": 2}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_our_block_with_another_receptive_field_is_refused(changes: dict[str, int]) -> None:
    network = small_vgg(norm=True)
    changed = with_first_layer(student_block(network.blocks[1], StudentSettings()), **changes)
    with pytest.raises(UserError) as error:
        require_interchangeable(network, 1, changed)
    message = refused(
        error, "network vgg-small: block 2 and its student block have different receptive fields"
    )
    teacher, student = message.splitlines()[1:]
    before = "size 5, stride 1, offset -2"
    assert teacher == f"teacher block: height: {before}; width: {before}"
    size = 5 + 2 * (changes.get("kernel") == 5 or changes.get("dilation") == 2)
    after = f"size {size}, stride 1, offset {-1 - changes.get('padding', 1)}"
    assert student == f"student block: height: {after}; width: {after}"


def test_the_field_of_a_residual_block_is_that_of_both_paths() -> None:
    network = small_resnet()
    changed = with_first_layer(network.blocks[0], kernel=5, padding=2)
    with pytest.raises(UserError, match="network resnet20: block 1 and its student block have different rec"):
        require_interchangeable(network, 0, changed)


def test_our_block_with_another_interface_is_refused() -> None:
    network = small_vgg(norm=True)
    (unit,) = network.blocks[0].units
    assert isinstance(unit, PlainUnit)
    wider = BlockSpec(units=(PlainUnit(layers=(unit.layers[0].model_copy(update={"out_channels": 9}),)),))
    with pytest.raises(UserError) as error:
        require_interchangeable(network, 0, wider)
    refused(error, "block 1 and its student block have different interfaces: (1, 8) and (1, 9)")


@pytest.mark.parametrize(
    "kind", [Block(block=2, epochs=1), Progressive(epochs=1)], ids=["block", "progressive"]
)
def test_stages_refuse_it_when_they_are_planned(
    kind: Block | Progressive, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dilated(teacher: BlockSpec, settings: StudentSettings) -> BlockSpec:
        return with_first_layer(student_block(teacher, settings), dilation=2, padding=2)

    network = small_vgg(norm=True)
    blocks = kind.expand(network) if isinstance(kind, Progressive) else [kind]
    planned = [block.plan({"from": network, "teacher": network}, info) for block in blocks]
    assert all(spec != network for spec in planned)
    monkeypatch.setattr("pbkd.stages.block.student_block", dilated)
    for block in blocks:
        with pytest.raises(UserError, match="have different receptive fields"):
            block.plan({"from": network, "teacher": network}, info)


def test_blocks_that_are_put_together_are_compared_too() -> None:
    network = small_vgg(norm=True)
    student = student_block(network.blocks[1], StudentSettings())
    given = network.with_block(1, student)
    planned = Assemble().plan({"from": network, "block.2": given}, info)
    assert planned == given
    changed = network.with_block(1, with_first_layer(student, kernel=5))
    with pytest.raises(UserError, match="block 2 and its student block have different receptive fields"):
        Assemble().plan({"from": network, "block.2": changed}, info)


# What `inner` does between two convolutions depends on the number of channels; at 32 and 16 it does the same.
MODULE = """
from torch import nn
from torch.nn import functional

class Net(nn.Module):
    def __init__(self, classes, kind):
        super().__init__()
        self.kind = kind
        self.enter = nn.Conv2d(1, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 16, 3, stride=2, padding=1)
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.fourth = nn.Conv2d(16, 16, 3, padding=1)
        self.classify = nn.Linear(16, classes)

    def inner(self, x):
        reach = 8 // x.shape[1]
        if self.kind == "field":
            return functional.avg_pool2d(x, 2 * reach + 1, 1, reach)
        if self.kind == "map":
            return x[:, :, :: 1 + reach]
        if self.kind == "failure":
            return x + 0 // (x.shape[1] // 16)
        if self.kind == "unknown":
            return x.flip(2)
        return x

    def forward(self, x):
        x = self.second(self.inner(self.first(self.enter(x))).relu()).relu()
        x = self.fourth(self.third(x).relu()).relu()
        return self.classify(x.mean((2, 3)))

def build(num_classes, kind="plain"):
    return Net(num_classes, kind)

def field(num_classes):
    return Net(num_classes, "field")
"""


@pytest.fixture
def _own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_reach.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PBKD_ALLOW_IMPORT", "1")


def foreign(kind: str) -> TracedSpec:
    settings = settings_of("own_reach:build", arguments={"kind": kind}, cuts=("second", "fourth"))
    spec = architecture(settings, (1, 8, 8), 10)
    assert isinstance(spec, TracedSpec)
    return spec


def plan(spec: TracedSpec, **settings: Any) -> Any:
    return Block.model_validate({"block": 1, "epochs": 1, **settings}).plan(
        {"from": spec, "teacher": spec}, info
    )


@pytest.mark.usefixtures("_own_module")
@pytest.mark.parametrize("kind", ["plain", "field", "map", "failure", "unknown"])
def test_a_foreign_block_is_narrowed_where_that_leaves_its_field(kind: str) -> None:
    spec = foreign(kind)
    assert plan(spec).blocks[0] == narrow_block(spec, 0, 0.5)
    if kind in ("plain", "unknown"):
        assert plan(spec, width=0.25).blocks[0] == narrow_block(spec, 0, 0.25)


REFUSED = {
    "field": "have different receptive fields",
    "map": "have different interfaces: (16, 4, 4) and (16, 2, 4)",
    "failure": "fails with so few channels",
}


@pytest.mark.usefixtures("_own_module")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_foreign_block_whose_forward_depends_on_its_channels_is_refused(kind: str) -> None:
    with pytest.raises(UserError) as error:
        plan(foreign(kind), width=0.25)
    message = refused(error, "network own_reach:build: block 1, which ends at 'second',", REFUSED[kind])
    if kind == "field":
        teacher, student = message.splitlines()[1:]
        assert teacher.endswith("width: size 7, stride 2, offset -3")
        assert student.endswith("width: size 9, stride 2, offset -4")


@pytest.mark.usefixtures("_own_module")
def test_inspect_says_why_there_is_no_student_of_that_width() -> None:
    from pipelines.inspection import inspect_network

    found = inspect_network("own_reach:field", 8, 10, ["second", "fourth"], widths=(0.25, 0.5), channels=1)
    reason = found.blocks[0].students[0.25]
    assert isinstance(reason, str) and "have different receptive fields" in reason
    assert not isinstance(found.blocks[0].students[0.5], str)


@pytest.mark.usefixtures("_own_module")
def test_the_plan_of_a_recipe_refuses_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from pipelines.cli import main

    monkeypatch.setenv("PBKD_STORE", str(tmp_path / "store"))
    (tmp_path / "recipe.yaml").write_text(
        "name: reach\ndata: {name: digits}\nteacher: teacher\nstudent: blocks\nstages:\n"
        "  teacher: {kind: train, network: {arch: 'own_reach:build', arguments: {kind: field}, "
        "cuts: [second, fourth]}, epochs: 1}\n"
        "  blocks: {kind: progressive, blocks: [1], width: 0.25, epochs: 1}\n"
    )
    assert main(["plan", str(tmp_path / "recipe.yaml"), "stages.blocks.width=0.5"]) == 0
    capfd.readouterr()
    assert main(["plan", str(tmp_path / "recipe.yaml")]) == 2
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err
    assert re.search(r"stages\.blocks: network own_reach:build: block 1, .* different receptive fields", err)
    assert len(err.splitlines()) <= 3


def test_a_library_s_block_with_another_dilation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = architecture(settings_of("torchvision/resnet18"), (3, 32, 32), 10)
    assert isinstance(spec, TracedSpec)
    part, copies = narrow_block(spec, 1, 0.5), []

    def dilated(block: nn.Module, part: TracedPart) -> nn.Module:
        copy = narrowed(block, part)
        copies.append(copy)
        (conv, *_) = (
            layer for layer in copy.modules() if isinstance(layer, nn.Conv2d) and layer.stride == (1, 1)
        )
        conv.dilation, conv.padding = (2, 1), (2, 1)
        return copy

    narrowed = interface.narrowed_copy
    interface._traced_outside.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(interface, "narrowed_copy", dilated)
        with pytest.raises(UserError) as error:
            require_interchangeable(spec, 1, part)
    message = refused(error, f"block 2, which ends at '{spec.blocks[1].end}',", "different receptive fields")
    teacher, student = (line.partition("height: ")[2].split("; width: ") for line in message.splitlines()[1:])
    assert teacher[0] != student[0], "the changed direction"
    assert teacher[1] == student[1]
    assert all(tensor.device == torch.device("meta") for tensor in copies[0].parameters())
    interface._traced_outside.cache_clear()
    require_interchangeable(spec, 1, part)
    monkeypatch.setattr(interface, "narrowed_copy", None)  # nothing is built twice
    require_interchangeable(spec, 1, part)
