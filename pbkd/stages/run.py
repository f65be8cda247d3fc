"""Run one stage and measure what came of it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch

from pbkd.engine import Row
from pbkd.measure import evaluate, nonzero_macs, nonzero_params, peak_memory_mb, reset_peak_memory
from pbkd.networks import BlockNetwork, cost_of
from pbkd.stages.base import Context, Stage, Unplanned


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
    return StageResult(network.cpu(), metrics, context.history)
