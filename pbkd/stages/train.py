"""`train`: supervised training; a teacher of one's own, and the baselines without distillation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import NonNegativeInt, model_validator

from pbkd.data import DataInfo
from pbkd.engine import Mask, Task
from pbkd.networks import (
    AnyNetworkSettings,
    AnySpec,
    BlockNetwork,
    ForeignSettings,
    TracedSpec,
    architecture,
    fresh,
)
from pbkd.networks.equality import BATCHES, require_equal
from pbkd.stages.base import SMOKE_STEPS, Context, Role, TrainingStage, label_objective, start_of


class Train(TrainingStage):
    """Train a whole network on the labels alone.

    Attributes:
        network: a named architecture, with fresh weights; without it, that of the `from` stage.
        weights: `fresh`, or `keep` those of the `from` stage (fine-tuning).
        rewind: weights that are zero in the `from` stage's network become and stay zero from this step on:
            a lottery ticket. With the settings of the stage that first trained the network the steps before
            are that stage's own, bit for bit, so they lead to the very weights to rewind to (Frankle et al.,
            ICML 2020); 0 rewinds to the initial ones (Frankle & Carbin, ICLR 2019).
        keep_zeros: weights that are zero in the `from` stage's network stay zero while the others, kept, are
            trained further.
    """

    kind: Literal["train"] = "train"
    network: AnyNetworkSettings | None = None
    weights: Literal["fresh", "keep"] = "fresh"
    rewind: NonNegativeInt | None = None
    keep_zeros: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.network is not None and (self.from_ is not None or self.weights == "keep"):
            raise ValueError("give either network (fresh weights) or from (another stage's), not both")
        if self.rewind is not None and (self.network is not None or self.weights == "keep"):
            raise ValueError("rewind starts over: give weights: fresh, and the pruned network as from")
        if self.keep_zeros and self.weights == "fresh":
            raise ValueError("keep_zeros is for weights: keep; fresh weights take those zeros with rewind: 0")
        return self

    def smoke(self) -> Self:
        """A few steps, rewound to an even earlier one."""
        rewind = None if self.rewind is None else min(self.rewind, SMOKE_STEPS // 2)
        return super().smoke().model_copy(update={"rewind": rewind})

    def semantic(self) -> dict[str, Any]:
        """The user's own code counts by its content."""
        settings = super().semantic()
        if isinstance(self.network, ForeignSettings) and (code := self.network.code_digest()) is not None:
            settings["code"] = code
        return settings

    def needs_from(self) -> bool:
        """Only without a named architecture."""
        return self.network is None

    def plan(self, inputs: Mapping[Role, AnySpec], info: DataInfo) -> AnySpec:
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
            if self.network is not None and isinstance(network.spec, TracedSpec):
                require_equal(network, network.spec, context.images(max(BATCHES)).cpu())
        mask = None
        if self.rewind is not None or self.keep_zeros:
            mask = Mask.of_zeros(context.inputs["from"], self.rewind or 0)
        context.train(network, Task(trained=network, objective=label_objective, mask=mask), self)
        return network
