"""Distilling by features: reached by every precision, refused where features cannot be compared."""

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from pbkd.data import DataSettings
from pbkd.engine import LocalSession, Precision
from pbkd.errors import UserError
from pbkd.networks import BlockNetwork, fresh, weights_digest
from pbkd.stages import AnyStage, Block, Context, Distill, Prune, Stabilize, Stage, Train, run_stage
from tests.unit.small_networks import digits, random_norms, small_resnet, small_vgg

info = DataSettings(name="digits").describe()
RESNET = small_resnet(base_width=4)


def network_of(seed: int) -> BlockNetwork:
    return random_norms(fresh(RESNET, seed)).eval().requires_grad_(False)


def distill(precision: Precision | None = None, **settings: Any) -> tuple[str, dict[str, float]]:
    """The digest of the weights, and the last row."""
    stage = Distill.model_validate({"steps": 3, **settings})
    inputs = {"from": network_of(0), "teacher": network_of(1)}
    context = Context(LocalSession(), inputs, digits(limit=100), 3, precision or Precision())
    result = run_stage(stage, context)
    return weights_digest(result.network.state_dict()), result.history[-1]


@pytest.mark.parametrize(
    "precision", [Precision(), Precision(precision="bf16", channels_last=True)], ids=["fp32", "bf16"]
)
def test_every_term_is_reported_and_weighted(precision: Precision) -> None:
    weights = {"feature_weight": 20, "attention_weight": 1000, "distance_weight": 25, "angle_weight": 50}
    digest, row = distill(precision, alpha=0.5, **weights)
    terms = sum(
        weight * row[f"train_{name.removesuffix('_weight')}_loss"] for name, weight in weights.items()
    )
    assert row["train_loss"] == pytest.approx(row["train_soft_loss"] + terms, rel=1e-5)
    for name in weights:
        other, _ = distill(precision, alpha=0.5, **{**weights, name: 0})
        assert other != digest, f"{name} changes the result"


def test_features_that_are_not_asked_for_change_nothing() -> None:
    digest, row = distill()
    assert row.keys().isdisjoint({"train_soft_loss", "train_attention_loss"})
    nearly, _ = distill(attention_weight=1e-30)
    assert nearly == digest, "the same training, through a network that gives its features"


def test_features_of_different_shapes_are_refused() -> None:
    attention, features = Distill(epochs=1, attention_weight=1000), Distill(epochs=1, feature_weight=20)
    with pytest.raises(UserError, match=r"attention_weight: .* features of 4x8x8, 8x4x4, 16x2x2, those of"):
        attention.plan({"from": RESNET, "teacher": small_vgg(norm=True)}, info)
    wider = small_resnet(base_width=8)
    assert attention.plan({"from": RESNET, "teacher": wider}, info) == RESNET
    with pytest.raises(UserError, match=r"feature_weight: .* those of the teacher 8x8x8, 16x4x4, 32x2x2"):
        features.plan({"from": RESNET, "teacher": wider}, info)
    relations = Distill(epochs=1, distance_weight=25, angle_weight=50)
    assert relations.plan({"from": RESNET, "teacher": small_vgg(norm=True)}, info) == RESNET


def test_nobody_to_learn_from_is_refused() -> None:
    with pytest.raises(UserError, match="name another as teacher"):
        Distill(epochs=1).plan({"from": RESNET}, info)


@pytest.mark.parametrize(
    "stage",
    [
        Block(block=1, epochs=1),
        Distill(epochs=1, attention_weight=1.0),
        Distill(epochs=1, feature_weight=1.0),
    ],
)
def test_features_are_not_compared_across_changed_interfaces(stage: Stage) -> None:
    kept, changed = Prune(ratio=0.5), Prune(ratio=0.5, scope="all")
    stage.check_lineage([kept, Stabilize(epochs=1)])
    with pytest.raises(UserError, match=r"prune with scope=all changed .* prune with scope=interior"):
        stage.check_lineage([kept, changed, Stabilize(epochs=1)])
    for logits_alone in (Distill(epochs=1, angle_weight=50), Train(epochs=1), Stabilize(epochs=1)):
        logits_alone.check_lineage([changed])


@pytest.mark.parametrize("name", ["feature_weight", "attention_weight", "distance_weight", "temperature"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_weights_out_of_range_are_refused(name: str, value: float) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(AnyStage)
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "distill", "epochs": 1, name: value})
