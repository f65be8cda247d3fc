"""What a training records step by step, when asked to: gradient norms, and a measurement now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pbkd.engine.state import Row


@dataclass(frozen=True)
class Watch:
    """What to record.

    Attributes:
        module: the norm of whose gradient is recorded at every step, before clipping; 0 if it has none.
        probe: measured after 1, 2, 4, 8, ... steps, as most happens early, and after every epoch.
    """

    module: nn.Module
    probe: Callable[[], dict[str, float]]


class StepRecord:
    """The steps of an epoch under way, by their number from 1; read from the device once, by `rows`."""

    def __init__(self, watch: Watch, device: torch.device) -> None:
        self._parameters, self._probe = list(watch.module.parameters()), watch.probe
        self._none = torch.zeros((), device=device)
        self._norms: dict[int, Tensor] = {}
        self._probed: dict[int, dict[str, float]] = {}

    def gradient(self, step: int) -> None:
        """Record the gradient of step `step` as it is now."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        self._norms[step] = nn.utils.get_total_norm(gradients) if gradients else self._none

    def finished(self, step: int, *, epoch_ends: bool = False) -> None:
        """Measure after step `step`, if it is time to."""
        if step not in self._probed and (epoch_ends or step & (step - 1) == 0):
            self._probed[step] = self._probe()

    def rows(self, steps_per_epoch: int) -> list[Row]:
        """A row a step; begins anew."""
        values = torch.stack(list(self._norms.values())).tolist()
        now = time.time()
        rows = [
            {"time": now, "step": step, "epoch": round(step / steps_per_epoch, 4), "gradient_norm": value}
            | self._probed.get(step, {})
            for step, value in zip(self._norms, values, strict=True)
        ]
        self._norms, self._probed = {}, {}
        return rows

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "norms": [(step, float(norm)) for step, norm in self._norms.items()],
            "probed": list(self._probed.items()),
        }

    def restore(self, numbers: Mapping[str, Any]) -> None:
        """Go on from `numbers`."""
        self._norms = {step: self._none + norm for step, norm in numbers["norms"]}
        self._probed = dict(numbers["probed"])
