"""`distill`: the network learns the teacher's soft targets; phase two of two-stage distillation, plain KD."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor

from pbkd.data import DataInfo
from pbkd.engine import Task
from pbkd.networks import BlockNetwork, NetworkSpec, fresh
from pbkd.objectives import hinton
from pbkd.stages.base import Context, Role, TrainingStage, same_task


class Distill(TrainingStage):
    """Minimize (1 - a) CE + a T^2 KL(p_t^T || p_s^T) over all weights (Hinton et al. 2015).

    Attributes:
        alpha: weight a of the soft targets, in [0, 1].
        temperature: T.
        weights: `keep` those of the `from` stage, or start `fresh` on its architecture (plain KD).
    """

    kind: Literal["distill"] = "distill"
    alpha: float = Field(default=0.9, ge=0.0, le=1.0)
    temperature: float = Field(default=4.0, gt=0.0)
    weights: Literal["keep", "fresh"] = "keep"

    def plan(self, inputs: Mapping[Role, NetworkSpec], info: DataInfo) -> NetworkSpec:
        """The architecture does not change."""
        if "teacher" in inputs:
            same_task(inputs["teacher"], info, "the teacher")
        return same_task(inputs["from"], info, "the network to distill into")

    def run(self, context: Context) -> BlockNetwork:
        """Train every layer against the teacher's logits."""
        given = context.inputs["from"]
        network = copy.deepcopy(given) if self.weights == "keep" else fresh(given.spec, context.seed)
        objective = partial(_soft_targets, alpha=self.alpha, temperature=self.temperature)
        context.train(
            network, Task(trained=network, objective=objective, teacher=context.inputs["teacher"]), self
        )
        return network


def _soft_targets(
    output: Tensor, logits: Tensor, target: Tensor, labels: Tensor, alpha: float, temperature: float
) -> dict[str, Tensor]:
    return {"loss": hinton(logits, target, labels, alpha, temperature)}
