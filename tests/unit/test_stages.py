"""Stages: each gives the architecture it planned, changes only what it says, and says what it measured."""

import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file

from pbkd.data import DataSettings
from pbkd.engine import LocalSession, Precision, Stopped
from pbkd.errors import UserError
from pbkd.networks import (
    BlockNetwork,
    FeatureNetwork,
    NetworkSettings,
    architecture,
    fresh,
    weights_digest,
)
from pbkd.objectives import local_feature
from pbkd.stages import (
    AnyStage,
    Block,
    Context,
    Distill,
    Load,
    Progressive,
    Prune,
    Stabilize,
    Stage,
    StageResult,
    Train,
    run_stage,
)
from pbkd.stages.block import _local_and_labels
from pbkd.stages.run import FEATURE_IMAGES
from tests.unit.small_networks import digits, random_norms, small_bottleneck, small_resnet, small_vgg

info = DataSettings(name="digits").describe()
SPECS = {"vgg": small_vgg(norm=True, dropout=0.2), "resnet": small_resnet(), "bottleneck": small_bottleneck()}


def network_of(kind: str = "resnet", seed: int = 0) -> BlockNetwork:
    return random_norms(fresh(SPECS[kind], seed)).eval().requires_grad_(False)


def run(
    stage: Stage, seed: int = 3, precision: Precision | None = None, **inputs: BlockNetwork
) -> StageResult:
    roles = {role.removesuffix("_"): network for role, network in inputs.items()}
    return run_stage(stage, Context(LocalSession(), roles, digits(limit=100), seed, precision or Precision()))


def changed(before: BlockNetwork, after: BlockNetwork) -> set[str]:
    """Modules, to two levels, of which a weight or statistic is not bitwise the same."""
    old, new = before.state_dict(), after.state_dict()
    names = {
        n for n in old.keys() | new.keys() if n not in old or n not in new or not torch.equal(old[n], new[n])
    }
    return {
        ".".join(name.split(".")[:2]) if name.startswith("blocks") else name.split(".")[0] for name in names
    }


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("init", ["kaiming", "inherit", "least_squares"])
def test_block_replaces_one_block_and_leaves_the_rest_bitwise(kind: str, init: str) -> None:
    teacher = network_of(kind)
    stage = Block.model_validate({"block": 2, "init": init, "init_images": 40, "steps": 3})
    result = run(stage, from_=teacher, teacher=teacher)
    assert result.network.spec == stage.plan({"from": teacher.spec, "teacher": teacher.spec}, info)
    assert changed(teacher, result.network) == {"blocks.1"}
    assert weights_digest(teacher.state_dict()) == weights_digest(network_of(kind).state_dict())
    assert result.metrics["macs_ratio"] > 1
    assert {
        "test_accuracy",
        "test_top5",
        "val_accuracy",
        "agreement",
        "kl",
        "nll",
        "ece",
        "params",
        "macs",
        "memory_peak_mb",
    } <= result.metrics.keys()
    assert {"train_loss", "train_local_loss", "train_label_loss", "val_loss"} <= result.history[0].keys()
    assert (
        run(stage, from_=teacher, teacher=teacher).network.state_dict().keys()
        == result.network.state_dict().keys()
    )


def test_the_features_of_every_block_are_compared_with_the_teachers() -> None:
    teacher, data = network_of(), digits(limit=100)
    result = run(Block(block=2, epochs=0, init_images=40), from_=teacher, teacher=teacher)
    reader = data.reader("test", data.sizes["test"], 0)
    images, _ = next(iter(reader))
    reader.close()
    mine, theirs = (FeatureNetwork(network)(images).blocks for network in (result.network, teacher))
    expected = {
        f"feature_error_{block}": pytest.approx(float(local_feature(*pair, "relative").mean()), rel=1e-4)
        for block, pair in enumerate(zip(mine, theirs, strict=True), 1)
    }
    found = {name: value for name, value in result.metrics.items() if name.startswith("feature_error")}
    assert len(images) <= FEATURE_IMAGES and found == expected
    assert found["feature_error_1"] == 0 < found["feature_error_2"]
    pruned = run(Prune(macs=0.5, scope="all", recalibrate_images=40), from_=teacher, teacher=teacher)
    assert not any(name.startswith("feature_error") for name in pruned.metrics), "channels differ"


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    teacher = network_of("vgg")
    stage = Block(block=1, steps=4, init_images=40)
    digests = [
        weights_digest(run(stage, seed, from_=teacher, teacher=teacher).network.state_dict())
        for seed in (3, 3, 4)
    ]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_train_and_keep_float32_weights(precision: str) -> None:
    teacher = network_of()
    settings = Precision.model_validate({"precision": precision, "channels_last": True})
    result = run(Distill(steps=3), precision=settings, from_=teacher, teacher=network_of(seed=1))
    assert all(
        tensor.dtype in (torch.float32, torch.int64) for tensor in result.network.state_dict().values()
    )
    assert all(tensor.is_contiguous() for tensor in result.network.state_dict().values())


def test_no_epochs_is_the_closed_form_start_alone() -> None:
    teacher = network_of()
    result = run(Block(block=1, epochs=0, init_images=40), from_=teacher, teacher=teacher)
    assert result.history == []
    assert changed(teacher, result.network) == {"blocks.0"}
    assert not any(module.training for module in result.network.modules())
    assert not any(parameter.requires_grad for parameter in result.network.parameters())


@pytest.mark.parametrize("kind", SPECS)
def test_stabilize_moves_the_classifier_alone(kind: str) -> None:
    network, teacher = network_of(kind), network_of(kind, seed=1)
    result = run(Stabilize(steps=3), from_=network, teacher=teacher)
    assert changed(network, result.network) == {"classifier"}


def test_stabilize_ends_at_a_plateau_wherever_it_is_interrupted(tmp_path: Path) -> None:
    network, teacher = network_of(), network_of(seed=1)
    roles = {"from": network, "teacher": teacher}

    def stabilize(session: LocalSession, **settings: Any) -> StageResult:
        optimizer = {"lr": 0.5, "schedule": "constant", "weight_decay": 0.0}  # so high that it soon rises
        stage = Stabilize.model_validate({"epochs": 12, "optimizer": optimizer, **settings})
        return run_stage(stage, Context(session, roles, digits(limit=100), 3, Precision()))

    losses = [row["val_loss"] for row in stabilize(LocalSession()).history]
    assert len(losses) == 12
    ended = stabilize(LocalSession(), patience=2)
    expected = next(n for n in range(3, 13) if min(losses[:n]) < min(losses[n - 2 : n]))
    assert [row["val_loss"] for row in ended.history] == losses[:expected]
    assert expected < 12, "or this test tests nothing"

    stops = itertools.count()
    session = LocalSession(tmp_path, should_stop=lambda: next(stops) == 2 * expected - 1)
    with pytest.raises(Stopped):
        stabilize(session, patience=2)
    resumed = stabilize(LocalSession(tmp_path), patience=2)
    assert weights_digest(resumed.network.state_dict()) == weights_digest(ended.network.state_dict())
    assert len(resumed.history) == expected


def test_a_plateau_needs_a_validation_split() -> None:
    stage, inputs = Stabilize(epochs=9, patience=2), {"from": network_of().spec}
    without = dataclasses.replace(DataSettings(name="digits").describe(), has_val=False)
    with pytest.raises(UserError, match="patience=2: there is no validation split"):
        stage.plan(inputs, without)


def test_distill_moves_everything_and_the_teacher_nothing() -> None:
    network, teacher = network_of(), network_of(seed=1)
    result = run(Distill(steps=3), from_=network, teacher=teacher)
    assert changed(network, result.network) == {"stem", "blocks.0", "blocks.1", "blocks.2", "classifier"}
    assert changed(teacher, network_of(seed=1)) == set()
    fresh_one = run(Distill(steps=3, weights="fresh"), from_=network, teacher=teacher)
    assert fresh_one.network.spec == network.spec
    assert weights_digest(fresh_one.network.state_dict()) != weights_digest(result.network.state_dict())


def test_train_from_a_name_from_a_stage_and_from_its_weights() -> None:
    named = Train(network=NetworkSettings(arch="resnet20", base_width=4), steps=3)
    result = run(named)
    assert result.network.spec == named.plan({}, info)
    assert (result.metrics["agreement"], result.metrics["macs_ratio"]) == (100.0, 1.0)
    assert result.metrics["kl"] == 0 and result.metrics["nll"] == result.metrics["test_loss"]
    student = network_of("vgg")
    scratch = run(Train(steps=1), from_=student, teacher=student)
    kept = run(
        Train.model_validate({"weights": "keep", "steps": 1, "optimizer": {"lr": 1e-9}}),
        from_=student,
        teacher=student,
    )
    assert scratch.network.spec == kept.network.spec == student.spec
    torch.testing.assert_close(kept.network.classifier.fc1.weight, student.classifier.fc1.weight)
    assert kept.metrics["agreement"] > scratch.metrics["agreement"]


def test_load_reads_a_file_and_its_key_follows_the_content(tmp_path: Path) -> None:
    given = random_norms(fresh(small_resnet(), 4)).eval()
    file, copy = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(given.state_dict(), file)
    save_file(given.state_dict(), copy)
    settings = NetworkSettings(arch="resnet20", shortcut="B", base_width=8)
    result = run(Load(network=settings, weights=file))
    assert changed(given, result.network) == set()
    assert Load(network=settings, weights=file).semantic() == Load(network=settings, weights=copy).semantic()
    save_file(fresh(small_resnet(), 5).state_dict(), copy)
    assert Load(network=settings, weights=file).semantic() != Load(network=settings, weights=copy).semantic()
    with pytest.raises(UserError, match=r"gone\.safetensors cannot be read"):
        Load(network=settings, weights=tmp_path / "gone.safetensors").semantic()


def test_pruning_reports_each_of_its_steps() -> None:
    network = network_of()
    result = run(Prune(ratio=0.5, round_to=2, recalibrate_images=40), from_=network, teacher=network)
    assert result.metrics.keys() >= {
        "val_accuracy_before",
        "val_accuracy_pruned",
        "val_accuracy",
        "test_accuracy",
    }
    assert result.network.spec != network.spec


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [(1, 0.5), (2, 0.5), (3, 0.5)]),
        ({"order": "top_down"}, [(3, 0.5), (2, 0.5), (1, 0.5)]),
        ({"blocks": [3, 1], "width": [0.25, 0.75]}, [(1, 0.75), (3, 0.25)]),
        ({"blocks": [3, 1], "width": [0.25, 0.75], "order": "listed"}, [(3, 0.25), (1, 0.75)]),
        ({"blocks": [3, 1], "width": 0.3, "order": "top_down"}, [(3, 0.3), (1, 0.3)]),
    ],
)
def test_progressive_expands_in_its_order(
    settings: dict[str, Any], expected: list[tuple[int, float]]
) -> None:
    stage = Progressive.model_validate({"epochs": 2, "reduction": "mean", "local_weight": 7.0} | settings)
    stages = stage.expand(SPECS["resnet"])
    assert [(block.block, block.width) for block in stages] == expected
    assert all((block.epochs, block.reduction, block.local_weight) == (2, "mean", 7.0) for block in stages)


def test_a_chain_of_blocks_ends_without_teacher_blocks() -> None:
    teacher = auxiliary = network_of()
    for stage in Progressive(epochs=0, init_images=40).expand(teacher.spec):
        auxiliary = run(stage, from_=auxiliary, teacher=teacher).network
    assert all(mine != given for mine, given in zip(auxiliary.spec.blocks, teacher.spec.blocks, strict=True))
    assert {"stem", "classifier"}.isdisjoint(changed(teacher, auxiliary))
    with pytest.raises(UserError, match="block 1 is not the teacher's any more"):
        Block(block=1, epochs=1).plan({"from": auxiliary.spec, "teacher": teacher.spec}, info)


def test_what_does_not_fit_is_refused_before_it_runs() -> None:
    resnet = SPECS["resnet"]
    hundred = architecture(NetworkSettings(arch="resnet20"), (1, 8, 8), 100)
    colour = architecture(NetworkSettings(arch="resnet20"), (3, 32, 32), 10)
    with pytest.raises(UserError, match="block 4: resnet20 has blocks 1 to 3"):
        Block(block=4, epochs=1).plan({"from": resnet}, info)
    with pytest.raises(UserError, match="the teacher has 100 classes, but digits has 10"):
        Distill(epochs=1).plan({"from": resnet, "teacher": hundred}, info)
    with pytest.raises(
        UserError, match=r"the network to stabilize takes images \(3, 32, 32\), but digits has \(1, 8, 8\)"
    ):
        Stabilize(epochs=1).plan({"from": colour}, info)
    with pytest.raises(UserError, match="the network to train has 100 classes"):
        Train(epochs=1).plan({"from": hundred}, info)
    for stage in (Block(block=1, epochs=1), Stabilize(epochs=1), Train(epochs=1), Prune(ratio=0.5)):
        with pytest.raises(UserError, match="the teacher has 100 classes, but digits has 10"):
            stage.plan({"from": resnet, "teacher": hundred}, info)
    with pytest.raises(UserError, match="block 3 is not the teacher's any more"):
        Block(block=3, epochs=1).plan({"from": resnet, "teacher": SPECS["vgg"]}, info)
    with pytest.raises(UserError, match="without any; take at least"):
        Block(block=1, epochs=1, width=0.01).plan({"from": resnet}, info)
    with pytest.raises(UserError, match="list the blocks"):
        Progressive(epochs=1).expand(None)
    with pytest.raises(UserError, match="2 widths for 3 blocks"):
        Progressive(epochs=1, width=(0.5, 0.5)).expand(resnet)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "distill", "epochs": 1, "alpha": 1.5},
        {"kind": "distill", "epochs": 1, "temperature": 0},
        {"kind": "block", "block": 0, "epochs": 1},
        {"kind": "block", "block": 1, "width": 1.5, "epochs": 1},
        {"kind": "block", "block": 1},
        {"kind": "progressive", "blocks": [1, 1], "epochs": 1},
        {"kind": "train", "network": {"arch": "resnet20"}, "weights": "keep", "epochs": 1},
        {"kind": "stabilize", "epochs": 1, "colour": "red"},
        {"kind": "magic"},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyStage)
    with pytest.raises(ValidationError):
        adapter.validate_python(wrong)


def test_names_of_stages_are_not_part_of_what_a_stage_does() -> None:
    first = Distill.model_validate({"epochs": 1, "from": "a", "teacher": "b"})
    assert first.semantic() == Distill(epochs=1).semantic()
    assert first.semantic() != Distill(epochs=2).semantic()
    assert first.model_dump()["from"] == "a"


def test_smoke_is_a_few_steps_of_the_same() -> None:
    assert Distill(epochs=100).smoke().steps == 4
    assert Distill(steps=2).smoke() == Distill(steps=2)
    assert Block(block=1, epochs=0).smoke().epochs == 0
    assert Block(block=1, epochs=9).smoke().init_images == 32
    assert Prune(ratio=0.5, recalibrate_images=0).smoke().recalibrate_images == 0


def test_a_block_minimizes_lambda_times_the_local_loss_plus_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    output, target = torch.rand(2, 3, 4, 5, 5, generator=generator, dtype=torch.float64).unbind()
    logits = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    labels = torch.tensor([1, 0, 9])
    found = _local_and_labels(output, logits, target, labels, weight=7.0, reduction="frobenius")["loss"]
    for n in range(3):
        local = 0.5 * sum(float(d) ** 2 for d in (output[n] - target[n]).flatten())
        label = math.log(sum(math.exp(float(z)) for z in logits[n])) - float(logits[n, labels[n]])
        assert float(found[n]) == pytest.approx(7.0 * local + label)


def test_an_optimizer_keeps_the_defaults_of_its_kind_of_stage() -> None:
    assert Stabilize.model_validate({"epochs": 1, "optimizer": {"lr": 0.1}}).optimizer.weight_decay == 0.0
    given = {"epochs": 1, "optimizer": {"lr": 0.1, "weight_decay": 1e-4}}
    assert Stabilize.model_validate(given).optimizer.weight_decay == 1e-4
    assert Distill.model_validate({"epochs": 1, "optimizer": {"lr": 0.1}}).optimizer.weight_decay == 5e-4
