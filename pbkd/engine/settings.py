"""How a stage trains: how long, with which optimizer, at which learning rate."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, field_validator, model_validator
from torch import nn


class Settings(BaseModel):
    """Base of all settings: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OptimizerSettings(Settings):
    """An optimizer and its learning-rate schedule; the rate is a pure function of the step.

    Attributes:
        name: `sgd` or `adamw`.
        lr: the highest learning rate.
        momentum, nesterov: SGD only.
        weight_decay: L2 (SGD) or decoupled (AdamW).
        schedule: `constant`; `step`: multiplied by `decay` at each of `milestones`; `cosine`: to zero at the
            end.
        milestones: shares of the training at which `step` lowers the rate, in (0, 1).
        decay: the factor of `step`.
        warmup: share of the training during which the rate rises linearly.
        clip: largest norm of the gradient, or null.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.01, gt=0.0)
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0.0)
    schedule: Literal["constant", "step", "cosine"] = "cosine"
    milestones: tuple[float, ...] = (0.5,)
    decay: float = Field(default=0.1, gt=0.0, le=1.0)
    warmup: float = Field(default=0.0, ge=0.0, lt=1.0)
    clip: float | None = Field(default=None, gt=0.0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if any(not 0.0 < share < 1.0 for share in self.milestones):
            raise ValueError(
                f"milestones are shares of the training between 0 and 1, found {list(self.milestones)}"
            )
        return self

    def rate(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return self.lr * (step + 1) / warm
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
        if self.schedule == "step":
            return self.lr * self.decay ** sum(step >= share * steps for share in self.milestones)
        return self.lr

    def build(self, module: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the parameters of `module` that are trained."""
        parameters = [p for p in module.parameters() if p.requires_grad]
        if self.name == "adamw":
            return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )


class TrainingSettings(Settings):
    """Length and optimizer of a training: either `epochs` or `steps` is given."""

    epochs: NonNegativeInt | None = None
    steps: NonNegativeInt | None = None
    optimizer: OptimizerSettings = OptimizerSettings()

    @field_validator("optimizer", mode="before")
    @classmethod
    def _over_the_defaults(cls, given: Any) -> Any:
        """What is not given keeps the default of this kind of training."""
        default: OptimizerSettings = cls.model_fields["optimizer"].default
        return default.model_dump(exclude_unset=True) | given if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give the length either as epochs or as steps")
        return self

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole training."""
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch


class Precision(Settings):
    """Number format and memory layout of training; evaluation is always fp32."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False

    def autocast(self, device: torch.device) -> torch.autocast:
        """The autocast context of one step."""
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(device.type, dtype=dtype, enabled=self.precision != "fp32")
