"""`stabilize`: phase one of two-stage distillation; the classifier learns, the features stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import PositiveInt

from pbkd.data import DataInfo
from pbkd.engine import OptimizerSettings, Row, Task
from pbkd.errors import UserError
from pbkd.networks import AnySpec, BlockNetwork
from pbkd.stages.base import Context, Role, TrainingStage, label_objective, start_of


class Stabilize(TrainingStage):
    """Train the classifier on the labels, features frozen and BatchNorm in eval mode.

    Our reading of the first phase of Kozynets & Demkiv (2026), with the settings of LP-FT (Kumar et al., ICLR
    2022): SGD with momentum, no weight decay.

    Attributes:
        patience: end when the validation loss has not fallen for so many epochs; null: only with `epochs` or
            `steps`, which remain the longest it may take and what the learning rate is a schedule over.
    """

    kind: Literal["stabilize"] = "stabilize"
    optimizer: OptimizerSettings = OptimizerSettings(weight_decay=0.0)
    patience: PositiveInt | None = None

    def plan(self, inputs: Mapping[Role, AnySpec], info: DataInfo) -> AnySpec:
        """The architecture does not change."""
        if self.patience is not None and not info.has_val:
            raise UserError(
                f"patience={self.patience}: there is no validation split to see a plateau on; "
                "set data.val_fraction, or leave patience out"
            )
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
        context.train(network, task, self, self._has_plateaued)
        return network

    def _has_plateaued(self, history: Sequence[Row]) -> bool:
        losses = [row["val_loss"] for row in history if "val_loss" in row]
        if self.patience is None or not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.patience
