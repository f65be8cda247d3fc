"""The training loop: resumable at every step, exact about what it changes, honest about failures."""

import itertools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from pbkd.data import Data
from pbkd.engine import (
    LocalSession,
    OptimizerSettings,
    Precision,
    Row,
    Session,
    Stopped,
    Task,
    TrainingSettings,
    fit,
)
from pbkd.errors import StageError
from pbkd.networks import BlockNetwork, build_block, fresh
from pbkd.objectives import cross_entropy, hinton, local_feature
from pbkd.stages.base import label_objective
from tests.unit.small_networks import digits, random_norms, small_resnet, small_vgg

STEPS = 9  # of 4 an epoch: two whole epochs and a part


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(limit=200)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def timeless(history: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if name != "time"} for row in history]


def stop_at(step: int) -> Callable[[], bool]:
    calls = itertools.count()
    return lambda: next(calls) == step


def train(
    data: Data,
    network: BlockNetwork,
    session: Session,
    precision: Precision | None = None,
    objective: Any = label_objective,
    **optimizer: Any,
) -> list[Row]:
    settings = TrainingSettings(steps=STEPS, optimizer=OptimizerSettings(**{"lr": 0.05} | optimizer))
    reader = data.reader("train", 50, 1, augment=True, shuffle=True)
    return fit(Task(trained=network, objective=objective), settings, reader, session, 1, precision)


RESUMABLE = {
    "momentum_dropout": (range(STEPS), Precision(), {"momentum": 0.9, "clip": 1.0}),
    "adamw_channels_last": ((1, 5), Precision(channels_last=True), {"name": "adamw", "lr": 0.003}),
    "bf16": ((3, 8), Precision(precision="bf16"), {"schedule": "step", "nesterov": True}),
    "fp16_scaled": ((4, 6), Precision(precision="fp16", channels_last=True), {"clip": 0.5, "warmup": 0.3}),
}


@pytest.mark.parametrize(("steps", "precision", "optimizer"), RESUMABLE.values(), ids=RESUMABLE)
def test_stopped_at_any_step_and_resumed_it_ends_the_same(
    data: Data, tmp_path: Path, steps: Iterable[int], precision: Precision, optimizer: dict[str, Any]
) -> None:
    spec = small_vgg(norm=True, dropout=0.3)
    whole = fresh(spec, 0)
    history = timeless(train(data, whole, LocalSession(), precision, **optimizer))
    assert [row["step"] for row in history] == [4, 8, 9]
    assert [row["epoch"] for row in history] == [1.0, 2.0, 2.25]
    for step in steps:
        folder = tmp_path / str(step)
        with pytest.raises(Stopped, match=f"stopped at step {step} of {STEPS}"):
            train(
                data, fresh(spec, 0), LocalSession(folder, should_stop=stop_at(step)), precision, **optimizer
            )
        torch.manual_seed(step)  # a new process has other random numbers
        resumed = fresh(spec, 1)  # and its weights come from the checkpoint
        assert timeless(train(data, resumed, LocalSession(folder), precision, **optimizer)) == history
        assert same(weights_of(resumed), weights_of(whole))


class Killed(BaseException):
    """As sudden as SIGKILL: nothing catches it, nothing is saved because of it."""


def test_killed_it_goes_on_from_the_newest_good_checkpoint(
    data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec = small_resnet(base_width=4)
    whole = fresh(spec, 0)
    history = timeless(train(data, whole, LocalSession()))

    calls = itertools.count()

    def kill() -> bool:
        if next(calls) == 6:
            raise Killed
        return False

    with pytest.raises(Killed):  # a checkpoint before every step
        train(data, fresh(spec, 0), LocalSession(tmp_path, checkpoint_seconds=0.0, should_stop=kill))
    (newest,) = tmp_path.glob("step-000000006-*")
    newest.write_bytes(b"torn")
    resumed = fresh(spec, 1)
    with caplog.at_level(logging.WARNING):
        found = train(data, resumed, LocalSession(tmp_path))
    assert "step-000000006 is damaged" in caplog.text
    assert timeless(found) == history
    assert same(weights_of(resumed), weights_of(whole))


def local_objective(output: Tensor, logits: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
    local, label = local_feature(output, target, "relative"), cross_entropy(logits, labels)
    return {"loss": local + label, "local_loss": local, "label_loss": label}


@pytest.mark.parametrize("spec", [small_vgg(norm=True, dropout=0.5), small_resnet(base_width=4)])
def test_only_the_trained_block_changes(data: Data, spec: Any) -> None:
    network = random_norms(fresh(spec, 0)).eval().requires_grad_(False)
    before = weights_of(network)
    index = 1
    teacher = network.blocks[index]
    student = build_block(spec.blocks[index])
    student.load_state_dict(teacher.state_dict())
    network.replace_block(index, spec.blocks[index], student)
    task = Task(
        trained=student,
        objective=local_objective,
        prefix=network.prefix(index),
        suffix=network.suffix(index),
        teacher=teacher,
        teacher_input="prefix",
    )
    reader = data.reader("train", 50, 1, shuffle=True)
    (row,) = fit(task, TrainingSettings(epochs=1), reader, LocalSession(), 0)
    assert row["train_loss"] == pytest.approx(row["train_local_loss"] + row["train_label_loss"])
    after = weights_of(network)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith(f"blocks.{index}.")}, (
        "weights and statistics"
    )
    assert same(
        weights_of(teacher), {n.removeprefix("blocks.1."): t for n, t in before.items() if "blocks.1." in n}
    )
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_without_training_mode_no_statistic_moves_and_no_dropout_is_drawn(data: Data) -> None:
    network = random_norms(fresh(small_vgg(norm=True, dropout=0.9), 0))
    before = weights_of(network)
    task = Task(trained=network, objective=label_objective, training_mode=False)
    reader = data.reader("train", 200, 1, shuffle=True)
    settings = TrainingSettings(steps=1, optimizer=OptimizerSettings(lr=1e-9))
    images, labels = next(iter(reader))
    with torch.no_grad():
        expected = float(cross_entropy(network.eval()(images), labels).mean())
    (row,) = fit(task, settings, reader, LocalSession(), 0)
    assert row["train_loss"] == pytest.approx(expected, rel=1e-5)
    after = weights_of(network)
    assert all(torch.equal(before[n], after[n]) for n in before if "running" in n or "tracked" in n)


def test_teacher_sees_images_and_stays_frozen(data: Data) -> None:
    teacher, student = (
        random_norms(fresh(small_resnet(base_width=4), 1)),
        fresh(small_resnet(base_width=4), 2),
    )
    before = weights_of(teacher)

    def soft(output: Tensor, logits: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
        assert not target.requires_grad
        return {"loss": hinton(logits, target, labels, 0.9, 4.0)}

    task = Task(trained=student, objective=soft, teacher=teacher)
    fit(task, TrainingSettings(epochs=1), data.reader("train", 50, 1, shuffle=True), LocalSession(), 0)
    assert same(weights_of(teacher), before)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping_bounds_the_step(data: Data, precision: str) -> None:
    network = fresh(small_vgg(norm=False), 0)
    before = weights_of(network)
    settings = TrainingSettings(
        steps=1, optimizer=OptimizerSettings(lr=1.0, clip=0.01, weight_decay=0.0, schedule="constant")
    )
    reader = data.reader("train", 50, 1, shuffle=True)
    task = Task(trained=network, objective=label_objective)
    fit(task, settings, reader, LocalSession(), 0, Precision.model_validate({"precision": precision}))
    moved = sum(
        float((tensor - before[name]).square().sum()) for name, tensor in network.state_dict().items()
    )
    assert moved**0.5 == pytest.approx(0.01, rel=1e-2), (
        "a gradient of any size above 0.01 is cut to 0.01, unscaled"
    )


def test_an_uneven_last_batch_counts_by_its_samples() -> None:
    uneven = digits(limit=130)
    network = fresh(small_vgg(norm=False), 0)
    settings = TrainingSettings(epochs=1, optimizer=OptimizerSettings(lr=1e-9))
    reader = uneven.reader("train", 100, 1, shuffle=True)
    (row,) = fit(Task(trained=network, objective=label_objective), settings, reader, LocalSession(), 0)
    images, labels = next(iter(uneven.reader("train", 130, 1, shuffle=True)))
    with torch.no_grad():
        assert row["train_loss"] == pytest.approx(
            float(cross_entropy(network(images), labels).mean()), rel=1e-5
        )


def test_a_diverging_training_stops_with_the_step_and_keeps_its_checkpoints(
    data: Data, tmp_path: Path
) -> None:
    calls = itertools.count()

    def diverging(output: Tensor, logits: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": cross_entropy(logits, labels) * (float("nan") if next(calls) >= 3 else 1.0)}

    session = LocalSession(tmp_path, checkpoint_seconds=0.0)
    with pytest.raises(StageError, match="the loss is not finite at step 3; lower the rate or clip"):
        train(data, fresh(small_vgg(norm=False), 0), session, objective=diverging)
    state = session.restore()
    assert state is not None
    assert state.step == 3
    assert all(tensor.isfinite().all() for tensor in state.tensors.values())


def test_an_overflowing_gradient_of_a_finite_loss_is_seen(data: Data, tmp_path: Path) -> None:
    def overflowing(output: Tensor, logits: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
        zero = (logits[:, 0] * 0.0).abs()
        return {"loss": cross_entropy(logits, labels) + (zero + 0.0).sqrt()}  # its derivative is infinite

    session = LocalSession(tmp_path, checkpoint_seconds=0.0)
    with pytest.raises(StageError, match="a weight is not finite after step 0"):
        train(data, fresh(small_vgg(norm=False), 0), session, objective=overflowing)


def test_validation_rows_and_reports(data: Data, tmp_path: Path) -> None:
    network = fresh(small_vgg(norm=False), 0)
    modes = []

    def validate() -> dict[str, float]:
        modes.append(network.training)
        return {"val_accuracy": 50.0}

    reader = data.reader("train", 50, 1, shuffle=True)
    task = Task(trained=network, objective=label_objective)
    history = fit(task, TrainingSettings(epochs=2), reader, LocalSession(tmp_path), 0, validate=validate)
    assert len((tmp_path / "progress.jsonl").read_text().splitlines()) == len(history) == 2
    assert all(row["val_accuracy"] == 50.0 for row in history)
    assert fit(task, TrainingSettings(epochs=0), reader, LocalSession(), 0) == []


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        ({"schedule": "step", "milestones": [0.5], "decay": 0.1}, [1.0, 1.0, 0.1, 0.1]),
        ({"schedule": "step", "milestones": [0.25, 0.75], "decay": 0.5}, [1.0, 0.5, 0.5, 0.25]),
        ({"schedule": "cosine"}, [1.0, 0.853553, 0.5, 0.146447]),
        ({"schedule": "constant", "warmup": 0.5}, [0.5, 1.0, 1.0, 1.0]),
        ({"schedule": "cosine", "warmup": 0.5}, [0.5, 1.0, 1.0, 0.5]),
    ],
)
def test_learning_rates(settings: dict[str, Any], expected: list[float]) -> None:
    optimizer = OptimizerSettings(lr=1.0, **settings)
    assert [optimizer.rate(step, 4) for step in range(4)] == pytest.approx(expected, abs=1e-6)


def test_the_papers_cifar_schedule_falls_after_three_of_six_epochs() -> None:
    optimizer = OptimizerSettings(lr=0.01, schedule="step", milestones=(0.5,), decay=0.1)
    rates = [optimizer.rate(step, 6 * 500) for step in range(6 * 500)]
    assert rates[1499] == 0.01
    assert rates[1500] == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (TrainingSettings, {}, "either as epochs or as steps"),
        (TrainingSettings, {"epochs": 1, "steps": 1}, "either as epochs or as steps"),
        (OptimizerSettings, {"nesterov": True, "momentum": 0.0}, "nesterov needs a momentum"),
        (OptimizerSettings, {"milestones": [3]}, "shares of the training between 0 and 1"),
        (OptimizerSettings, {"lr": 0}, "greater than 0"),
        (OptimizerSettings, {"learning_rate": 0.1}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model(**settings)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_is_drawn_anew_each_step_in_the_trained_part_and_never_in_a_frozen_one(
    dropout: float,
) -> None:
    network = fresh(small_vgg(norm=False, dropout=dropout), 0).eval()
    reader = digits(limit=50).reader("train", 50)  # the same batch in the same order, every epoch
    settings = TrainingSettings(epochs=2, optimizer=OptimizerSettings(lr=1e-9, weight_decay=0.0))
    images, labels = next(iter(reader))
    with torch.no_grad():
        undisturbed = pytest.approx(float(cross_entropy(network(images), labels).mean()), rel=1e-5)

    task = Task(network.blocks[1], label_objective, prefix=network.prefix(1), suffix=network.suffix(1))
    rows = fit(task, settings, reader, LocalSession(), 0)
    assert [row["train_loss"] for row in rows] == [undisturbed, undisturbed]

    first, second = fit(Task(network, label_objective), settings, reader, LocalSession(), 0)
    assert (first["train_loss"] == undisturbed) == (dropout == 0.0)
    assert (first["train_loss"] == pytest.approx(second["train_loss"], rel=1e-5)) == (dropout == 0.0)
