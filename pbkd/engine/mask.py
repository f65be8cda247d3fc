"""Weights that stay exactly zero while the others are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pbkd.networks import maskable_weights


@dataclass(frozen=True)
class Mask:
    """Which weights are kept, and from when on.

    Attributes:
        kept: parameter of the trained part -> boolean tensor of its shape, False where it is to be zero.
        from_step: trained densely before this step.
    """

    kept: Mapping[str, Tensor]
    from_step: int = 0

    @classmethod
    def of_zeros(cls, network: nn.Module, from_step: int = 0) -> Mask:
        """What is zero in the weights of convolutions and linear layers of `network` is to stay so."""
        weights = maskable_weights(network)
        return cls({name: weight != 0 for name, weight in weights.items()}, from_step)


class Masking:
    """A mask at work on a training's parameters.

    A weight at zero with a gradient and momenta of zero stays exactly there, under weight decay too.
    """

    def __init__(self, mask: Mask, trained: nn.Module) -> None:
        parameters = dict(trained.named_parameters())
        self._from_step = mask.from_step
        self._kept = [
            (parameters[name], kept.to(parameters[name].device)) for name, kept in mask.kept.items()
        ]

    @torch.no_grad()
    def begin(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Set weights and momenta to zero, if `step` is the first one with the mask."""
        if step != self._from_step:
            return
        for parameter, kept in self._kept:
            parameter.mul_(kept)
            for value in optimizer.state[parameter].values():
                if isinstance(value, Tensor) and value.shape == kept.shape:
                    value.mul_(kept)

    def gradients(self, step: int) -> None:
        """Set the gradients of step `step` to zero where the mask does."""
        if step >= self._from_step:
            for parameter, kept in self._kept:
                assert parameter.grad is not None
                parameter.grad.mul_(kept)
