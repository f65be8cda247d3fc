"""Gradient shock: CKA is its equation; recording it disturbs nothing and survives resumption."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from pbkd.engine import LocalSession, Precision, Stopped
from pbkd.measure import FeatureDrift, linear_cka
from pbkd.networks import BlockNetwork, fresh, weights_digest
from pbkd.stages import Context, Distill, Stabilize, Stage, StageResult, Train, run_stage
from tests.unit.small_networks import digits, random_norms, small_resnet, small_vgg

pytestmark = pytest.mark.slow

RESNET = small_resnet(base_width=4)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_cka_is_its_equation(seed: int, samples: int, dimensions: int) -> None:
    x, y = normal(seed, samples, dimensions).double(), normal(seed + 1, samples, dimensions + 1).double()
    x_, y_ = x - x.mean(0), y - y.mean(0)
    expected = (y_.T @ x_).norm() ** 2 / ((x_.T @ x_).norm() * (y_.T @ y_).norm())
    assert linear_cka(x, y) == pytest.approx(float(expected), rel=1e-9)
    rotation = torch.linalg.qr(normal(seed + 2, dimensions, dimensions).double())[0]
    assert linear_cka(x, 3 * x @ rotation + 2) == pytest.approx(1.0)
    assert linear_cka(x, torch.ones(samples, 2)) == 0.0


def test_drift_begins_at_one_and_leaves_modes_alone() -> None:
    network = random_norms(fresh(small_vgg(norm=True), 0)).train()
    drift = FeatureDrift(network, network.features, normal(0, 20, 1, 8, 8))
    assert drift() == {"feature_cka": pytest.approx(1.0)}
    with torch.no_grad():
        network.blocks[0][0][0].conv.weight += normal(1, *network.blocks[0][0][0].conv.weight.shape)
    assert drift()["feature_cka"] < 0.99
    assert all(module.training for module in network.modules())


def network_of(seed: int) -> BlockNetwork:
    return random_norms(fresh(RESNET, seed)).eval().requires_grad_(False)


def run(stage: Stage, session: LocalSession | None = None, precision: Precision | None = None) -> StageResult:
    inputs = {"from": network_of(0), "teacher": network_of(1)}
    context = Context(session or LocalSession(), inputs, digits(limit=100), 3, precision or Precision())
    return run_stage(stage, context)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_recording_disturbs_nothing(precision: str) -> None:
    settings: dict[str, Any] = {"epochs": 3, "optimizer": {"clip": 0.1}}
    numbers = Precision.model_validate({"precision": precision})
    plain = run(Distill.model_validate(settings), precision=numbers)
    recorded = run(Distill.model_validate({**settings, "shock": True}), precision=numbers)
    assert weights_digest(plain.network.state_dict()) == weights_digest(recorded.network.state_dict())
    assert [row["step"] for row in recorded.history] == [1, 2, 3, 4, 5, 6]
    assert all(row["gradient_norm"] > 0 for row in recorded.history)
    assert [row["step"] for row in recorded.history if "feature_cka" in row] == [1, 2, 4, 6]
    epochs = [row for row in recorded.history if "train_loss" in row]
    for row, expected in zip(epochs, plain.history, strict=True):
        assert {name: row[name] for name in expected if name != "time"} == {
            name: value for name, value in expected.items() if name != "time"
        }
    assert "gradient_norm" not in plain.history[0]
    norms = [row["gradient_norm"] for row in recorded.history]
    assert (recorded.metrics["gradient_norm"], recorded.metrics["gradient_norm_max"]) == (
        norms[-1],
        max(norms),
    )
    assert recorded.metrics["feature_cka"] == recorded.history[-1]["feature_cka"]


def test_the_norm_is_that_of_the_feature_extractor_before_clipping() -> None:
    stage = Train.model_validate({"weights": "keep", "steps": 1, "shock": True, "optimizer": {"clip": 1e-3}})
    (row,) = run(stage).history
    network = network_of(0).train().requires_grad_(True)
    images, labels = next(iter(digits(limit=100).reader("train", 50, 3, shuffle=True, augment=True)))
    cross_entropy(network(images), labels).backward()
    parts = [*network.stem.parameters(), *network.blocks.parameters()]
    expected = sum(float(part.grad.square().sum()) for part in parts if part.grad is not None) ** 0.5
    assert row["gradient_norm"] == pytest.approx(expected, rel=1e-4)


def test_stabilizing_shocks_no_feature() -> None:
    history = run(Stabilize(steps=3, shock=True)).history
    assert [row["gradient_norm"] for row in history] == [0.0, 0.0, 0.0]
    assert all(row["feature_cka"] == pytest.approx(1.0) for row in history if "feature_cka" in row)


def test_a_resumed_training_has_the_same_record(tmp_path: Path) -> None:
    stage = Distill(epochs=3, shock=True)
    whole = run(stage)
    for step in (1, 2, 5):
        calls = itertools.count()
        folder = tmp_path / str(step)
        session = LocalSession(folder, should_stop=lambda calls=calls, step=step: next(calls) == step)
        with pytest.raises(Stopped):
            run(stage, session)
        resumed = run(stage, LocalSession(folder))
        for row, expected in zip(resumed.history, whole.history, strict=True):
            assert {**row, "time": 0} == {**expected, "time": 0}
