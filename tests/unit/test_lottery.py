"""Lottery tickets: the smallest weights go and never come back; the steps before are the dense ones."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pbkd.engine import LocalSession, Precision, Stopped
from pbkd.errors import UserError
from pbkd.networks import BlockNetwork, fresh, maskable_weights, weights_digest
from pbkd.stages import Context, Distill, Prune, Stage, StageResult, Train, run_stage
from pbkd.stages.prune import zero_smallest
from tests.unit.small_networks import digits, small_resnet, small_vgg

pytestmark = pytest.mark.slow

SPEC = small_resnet(base_width=4)
SPARSE = Prune(sparsity=0.6, recalibrate_images=40)


def run(
    stage: Stage, given_: BlockNetwork, session: LocalSession | None = None, precision: str = "fp32"
) -> StageResult:
    inputs = {"from": given_, "teacher": fresh(SPEC, 8).eval().requires_grad_(False)}
    numbers = Precision.model_validate({"precision": precision})
    return run_stage(stage, Context(session or LocalSession(), inputs, digits(limit=100), 3, numbers))


def flat(network: BlockNetwork) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(maskable_weights(network).values())


@given(st.lists(st.floats(0.01, 0.9), min_size=1, max_size=4), st.booleans())
@settings(max_examples=15, deadline=None)
def test_the_smallest_of_the_remaining_weights_go_level_by_level(shares: list[float], norm: bool) -> None:
    network = fresh(small_vgg(norm), 0)
    before, others = flat(network).clone(), weights_digest(others_of(network))
    left = len(before)
    for share in shares:
        zero_smallest(network, share)
        left -= int(share * left)
        after = flat(network)
        kept = after != 0
        assert int(kept.sum()) == left
        assert torch.equal(after[kept], before[kept])
        assert before[kept].abs().min() >= before[~kept].abs().max()
    assert weights_digest(others_of(network)) == others


def others_of(network: BlockNetwork) -> dict[str, torch.Tensor]:
    weights = maskable_weights(network).keys()
    return {name: value for name, value in network.state_dict().items() if name not in weights}


def ticket(rewind: int, **settings: Any) -> Train:
    return Train.model_validate({"epochs": 3, "rewind": rewind, **settings})


@pytest.mark.parametrize("rewind", [0, 3])
@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("fp32", {"clip": 1.0}), ("fp16", {"name": "adamw", "weight_decay": 0.1}), ("bf16", {"nesterov": True})],
)
def test_zeros_stay_exactly_zero(rewind: int, precision: str, optimizer: dict[str, Any]) -> None:
    sparse = run(SPARSE, fresh(SPEC, 1)).network
    result = run(ticket(rewind, optimizer=optimizer), sparse, precision=precision)
    assert torch.equal(flat(result.network) != 0, flat(sparse) != 0)
    metrics, zeros = result.metrics, int((flat(sparse) == 0).sum())
    assert metrics["nonzero_params"] == metrics["params"] - zeros
    assert 0.2 < metrics["nonzero_macs"] / metrics["macs"] < 0.6


@pytest.mark.parametrize(
    "stage",
    [
        Train(weights="keep", keep_zeros=True, epochs=2),
        Distill(keep_zeros=True, epochs=2),
        Distill(keep_zeros=True, epochs=2, distance_weight=1.0),
    ],
)
def test_kept_weights_go_on_with_their_zeros(stage: Stage) -> None:
    sparse = run(SPARSE, fresh(SPEC, 1)).network
    after = run(stage, sparse).network
    assert torch.equal(flat(after) != 0, flat(sparse) != 0)
    assert not torch.equal(flat(after), flat(sparse))
    dense = run(stage.model_copy(update={"keep_zeros": False}), sparse).network
    assert (flat(dense) != 0).all()


def test_the_steps_before_rewinding_are_those_of_the_dense_training(tmp_path: Path) -> None:
    dense = run(Train(epochs=3), fresh(SPEC, 1)).network
    everything_kept = run(ticket(4), fresh(SPEC, 2)).network
    assert weights_digest(everything_kept.state_dict()) == weights_digest(dense.state_dict())
    sparse = run(SPARSE, dense).network

    def stopped_at(step: int, stage: Stage, folder: Path) -> torch.Tensor:
        calls = itertools.count()
        session = LocalSession(folder, should_stop=lambda: next(calls) == step)
        with pytest.raises(Stopped):
            run(stage, sparse, session)
        state = LocalSession(folder).restore()
        assert state is not None
        return state.tensors["module/stem.0.conv.weight"]

    early = stopped_at(4, Train(epochs=3), tmp_path / "dense")
    assert torch.equal(stopped_at(4, ticket(4), tmp_path / "4"), early)
    whole = run(ticket(4), sparse).network
    for step in (2, 4, 5):
        stopped_at(step, ticket(4), tmp_path / f"at-{step}")
        resumed = run(ticket(4), sparse, LocalSession(tmp_path / f"at-{step}")).network
        assert weights_digest(resumed.state_dict()) == weights_digest(whole.state_dict())


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UserError, match="rewind=6: the training is over after 6 steps; lower it"):
        run(ticket(6), fresh(SPEC, 1))
    for wrong in ({"weights": "keep"}, {"network": {"arch": "resnet20"}}, {"rewind": -1}):
        with pytest.raises(ValidationError):
            ticket(**{"rewind": 0, **wrong})
    for kind in (Train, Distill):
        with pytest.raises(ValidationError, match="keep_zeros is for weights: keep"):
            kind(epochs=1, weights="fresh", keep_zeros=True)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(ValidationError):
            Prune(sparsity=share)
    for other in ({"ratio": 0.5}, {"macs": 0.5}, {"criterion": "bn_scale"}, {"scope": "all"}):
        with pytest.raises(ValidationError, match="sparsity"):
            Prune.model_validate({"sparsity": 0.2, **other})
    assert ticket(500).smoke().rewind == 2
