"""Run one stage and measure what came of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch

from pbkd.engine import Row
from pbkd.measure import evaluate, nonzero_macs, nonzero_params, peak_memory_mb, reset_peak_memory
from pbkd.networks import BlockNetwork, FeatureNetwork, cost_of, feature_shapes
from pbkd.objectives import local_feature
from pbkd.stages.base import Context, Stage, Unplanned

FEATURE_IMAGES = 128
FEATURE_BATCH = 16  # features of all blocks of two networks are held at once


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves: its network on the CPU, what was measured, and the history of its training."""

    network: BlockNetwork
    metrics: dict[str, float]
    history: list[Row]


def run_stage(stage: Stage, context: Context) -> StageResult:
    """Carry out `stage`; every rank calls it. Accuracy is the final one, in fp32, each sample once.

    A stage without a teacher makes the teacher, or what it is made from: it agrees with itself.
    """
    device = context.session.device
    reset_peak_memory(device)
    with suppress(Unplanned):  # what could not be planned before its inputs were known is refused now
        stage.plan({role: given.spec for role, given in context.inputs.items()}, context.data.info)
    network = stage.run(context)
    network = network.to(device).eval().requires_grad_(False)
    teacher = context.inputs.get("teacher")
    metrics: dict[str, float] = dict(context.metrics)
    splits = {"test": "test_", "val": "val_"} if context.data.sizes["val"] else {"test": "test_"}
    for split, prefix in splits.items():
        reader = context.reader(split)
        try:
            found = evaluate(
                network,
                reader,
                teacher=teacher.to(device) if teacher is not None and split == "test" else None,
                device=device,
                reduce=context.session.sum,
            )
        finally:
            reader.close()
        metrics |= {f"{prefix}accuracy": found.top1, f"{prefix}top5": found.top5, f"{prefix}loss": found.loss}
        if split == "test":
            metrics |= {"nll": found.nll, "ece": found.ece, "agreement": 100.0, "kl": 0.0}
            if found.agreement is not None and found.kl is not None:
                metrics |= {"agreement": found.agreement, "kl": found.kl}
    cost = cost_of(network.spec)
    metrics |= {
        "params": cost.params,
        "macs": cost.macs,
        "nonzero_params": nonzero_params(network),
        "nonzero_macs": nonzero_macs(network, network.spec.input_shape),
    }
    if teacher is not None:
        original = cost_of(teacher.spec)
        metrics |= {"macs_ratio": original.macs / cost.macs, "params_ratio": original.params / cost.params}
    else:
        metrics |= {"macs_ratio": 1.0, "params_ratio": 1.0}
    peak = torch.tensor(peak_memory_mb(device), dtype=torch.float64, device=device)
    metrics["memory_peak_mb"] = float(context.session.max(peak))
    if teacher is not None:  # last: what it needs is not what the stage needed
        metrics |= _feature_errors(network, teacher, context)
    return StageResult(network.cpu(), metrics, context.history)


@torch.inference_mode()
def _feature_errors(network: BlockNetwork, teacher: BlockNetwork, context: Context) -> dict[str, float]:
    """`feature_error_K` of every block K: L_local in the unit `relative`, mean of the same test images.

    Each network is fed by its own blocks. Empty where their features have other shapes.
    """
    if feature_shapes(network.spec) != feature_shapes(teacher.spec):
        return {}
    count = min(FEATURE_IMAGES, context.data.sizes["test"])
    # Shuffled, as the files of a folder come class after class; by seed 0, so that stages compare.
    reader = context.data.reader("test", count, 0, device=context.session.device, shuffle=True)
    try:
        images, _ = next(iter(reader))
    finally:
        reader.close()
    student, original = FeatureNetwork(network), FeatureNetwork(teacher)
    sums = torch.zeros(len(network.blocks), device=images.device)
    for batch in images.split(FEATURE_BATCH):
        pairs = zip(student(batch).blocks, original(batch).blocks, strict=True)
        sums += torch.stack([local_feature(mine, theirs, "relative").sum() for mine, theirs in pairs])
    return {f"feature_error_{block}": value / count for block, value in enumerate(sums.tolist(), 1)}
