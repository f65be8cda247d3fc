"""`distill`: the network learns from the teacher; phase two of two-stage distillation, plain KD, AT, RKD."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pbkd.data import DataInfo
from pbkd.engine import Mask, Task
from pbkd.errors import UserError
from pbkd.networks import AnySpec, BlockNetwork, FeatureNetwork, Features, feature_shapes, fresh
from pbkd.objectives import angle_relation, attention, distance_relation, hinton, local_feature
from pbkd.stages.base import Context, Role, TrainingStage, start_of

Weight = Annotated[float, Field(ge=0.0)]


class Distill(TrainingStage):
    """Minimize (1 - a) CE + a T^2 KL(p_t^T || p_s^T) (Hinton et al. 2015) over all weights.

    Terms of other methods are added with their weights: attention transfer is `alpha: 0` and
    `attention_weight: 1000`, RKD `alpha: 0`, `distance_weight: 25` and `angle_weight: 50`.

    Attributes:
        alpha: weight a of the soft targets, in [0, 1].
        temperature: T.
        feature_weight: of the blocks' features: the mean over blocks of L_local in its `relative` unit
            (`pbkd.objectives.local_feature`), each network fed by its own blocks; ours.
        attention_weight: of the attention maps of all blocks (`pbkd.objectives.attention`).
        distance_weight, angle_weight: of the relations between the samples' penultimate features
            (`pbkd.objectives.relational`).
        weights: `keep` those of the `from` stage, or start `fresh` on its architecture (plain KD).
        keep_zeros: weights that are zero in the `from` stage's network stay zero.
    """

    kind: Literal["distill"] = "distill"
    alpha: float = Field(default=0.9, ge=0.0, le=1.0)
    temperature: float = Field(default=4.0, gt=0.0)
    feature_weight: Weight = 0.0
    attention_weight: Weight = 0.0
    distance_weight: Weight = 0.0
    angle_weight: Weight = 0.0
    weights: Literal["keep", "fresh"] = "keep"
    keep_zeros: bool = False

    @model_validator(mode="after")
    def _zeros_are_kept_with_weights(self) -> Self:
        if self.keep_zeros and self.weights == "fresh":
            raise ValueError("keep_zeros is for weights: keep; fresh weights have no zeros to keep")
        return self

    def plan(self, inputs: Mapping[Role, AnySpec], info: DataInfo) -> AnySpec:
        """The architecture does not change."""
        spec = start_of(inputs, info, "the network to distill into")
        if "teacher" not in inputs:
            raise UserError("distill: the recipe's teacher is made from this stage; name another as teacher")
        for name, first in (("feature_weight", 0), ("attention_weight", 1)):  # attention sums over channels
            if not getattr(self, name):
                continue
            own, others = feature_shapes(spec), feature_shapes(inputs["teacher"])
            if [shape[first:] for shape in own] != [shape[first:] for shape in others]:
                raise UserError(
                    f"{name}: the blocks of {spec.arch} give features of {_shapes(own)}, those of "
                    f"the teacher {_shapes(others)}; only equal ones compare: set {name}=0"
                )
        return spec

    def compares_features(self) -> bool:
        """The blocks' features or attention maps."""
        return self.feature_weight > 0 or self.attention_weight > 0

    def run(self, context: Context) -> BlockNetwork:
        """Train every layer against the teacher."""
        given, teacher = context.inputs["from"], context.inputs["teacher"]
        network = copy.deepcopy(given) if self.weights == "keep" else fresh(given.spec, context.seed)
        if self.feature_weight or self.attention_weight or self.distance_weight or self.angle_weight:
            task = Task(FeatureNetwork(network), self._with_features, teacher=FeatureNetwork(teacher))
        else:
            task = Task(network, self._soft_targets, teacher=teacher)
        if self.keep_zeros:
            task = replace(task, mask=Mask.of_zeros(task.trained))
        context.train(network, task, self)
        return network

    def _soft_targets(self, output: Tensor, logits: Any, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": hinton(output, target, labels, self.alpha, self.temperature)}

    def _with_features(
        self, output: Features, logits: Any, target: Features, labels: Tensor
    ) -> dict[str, Tensor]:
        soft = hinton(output.logits, target.logits, labels, self.alpha, self.temperature)
        losses = {"loss": soft, "soft_loss": soft}
        if self.feature_weight:
            pairs = list(zip(output.blocks, target.blocks, strict=True))
            local = torch.stack([local_feature(mine, theirs, "relative") for mine, theirs in pairs])
            losses["feature_loss"] = local.mean(0)
            losses["loss"] = losses["loss"] + self.feature_weight * losses["feature_loss"]
        if self.attention_weight:
            losses["attention_loss"] = attention(output.blocks, target.blocks)
            losses["loss"] = losses["loss"] + self.attention_weight * losses["attention_loss"]
        if self.distance_weight:
            losses["distance_loss"] = distance_relation(output.penultimate, target.penultimate)
            losses["loss"] = losses["loss"] + self.distance_weight * losses["distance_loss"]
        if self.angle_weight:
            losses["angle_loss"] = angle_relation(output.penultimate, target.penultimate)
            losses["loss"] = losses["loss"] + self.angle_weight * losses["angle_loss"]
        return losses


def _shapes(shapes: tuple[tuple[int, int, int], ...]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)
