"""`stabilize`: phase one of two-stage distillation; the classifier learns, the features stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal

from pbkd.data import DataInfo
from pbkd.engine import OptimizerSettings, Task
from pbkd.networks import BlockNetwork, NetworkSpec
from pbkd.stages.base import Context, Role, TrainingStage, label_objective, start_of


class Stabilize(TrainingStage):
    """Train the classifier on the labels, features frozen and BatchNorm in eval mode.

    Our reading of the first phase of Kozynets & Demkiv (2026), with the settings of LP-FT (Kumar et al., ICLR
    2022): SGD with momentum, no weight decay.
    """

    kind: Literal["stabilize"] = "stabilize"
    optimizer: OptimizerSettings = OptimizerSettings(weight_decay=0.0)

    def plan(self, inputs: Mapping[Role, NetworkSpec], info: DataInfo) -> NetworkSpec:
        """The architecture does not change."""
        return start_of(inputs, info, "the network to stabilize")

    def run(self, context: Context) -> BlockNetwork:
        """Train `classifier` behind the frozen features."""
        network = copy.deepcopy(context.inputs["from"])
        task = Task(
            trained=network.classifier,
            objective=label_objective,
            prefix=network.prefix(len(network.blocks)),
            training_mode=False,
        )
        context.train(network, task, self)
        return network
