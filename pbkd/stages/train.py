"""`train`: supervised training; a teacher of one's own, and the baselines without distillation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import model_validator

from pbkd.data import DataInfo
from pbkd.engine import Task
from pbkd.networks import BlockNetwork, NetworkSettings, NetworkSpec, architecture, fresh
from pbkd.stages.base import Context, Role, TrainingStage, label_objective, start_of


class Train(TrainingStage):
    """Train a whole network on the labels alone.

    Attributes:
        network: a named architecture, with fresh weights; without it, that of the `from` stage.
        weights: `fresh`, or `keep` those of the `from` stage (fine-tuning).
    """

    kind: Literal["train"] = "train"
    network: NetworkSettings | None = None
    weights: Literal["fresh", "keep"] = "fresh"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.network is not None and (self.from_ is not None or self.weights == "keep"):
            raise ValueError("give either network (fresh weights) or from (another stage's), not both")
        return self

    def needs_from(self) -> bool:
        """Only without a named architecture."""
        return self.network is None

    def plan(self, inputs: Mapping[Role, NetworkSpec], info: DataInfo) -> NetworkSpec:
        """The named architecture, or that of `from`."""
        if self.network is None:
            return start_of(inputs, info, "the network to train")
        return architecture(self.network, info.input_shape, info.num_classes)

    def run(self, context: Context) -> BlockNetwork:
        """Train every layer."""
        if self.weights == "keep":
            network = copy.deepcopy(context.inputs["from"])
        else:
            specs = {role: given.spec for role, given in context.inputs.items()}
            network = fresh(self.plan(specs, context.data.info), context.seed)
        context.train(network, Task(trained=network, objective=label_objective), self)
        return network
