"""Resumable state: all that a killed training needs to go on exactly where it was.

Order of samples, augmentation and torch's generators are pure functions of position, so the state holds only
weights, optimizer, scaler, step and history.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Row = dict[str, float]


@dataclass
class State:
    """A training after `step` optimizer steps; `history` holds one row per report."""

    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)
    history: list[Row] = field(default_factory=list)


def capture(
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    history: list[Row],
) -> State:
    """The state of a training, on the CPU, independent of what happens to it afterwards."""
    tensors = {f"module/{name}": tensor for name, tensor in module.state_dict().items()}
    optimizer_state = optimizer.state_dict()
    numbers: dict[str, Any] = {"scaler": scaler.state_dict()}
    for index, entries in optimizer_state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{name}"] = value
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return State(step, copies, numbers, [dict(row) for row in history])


def apply(
    state: State, module: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Put a captured state back, in place."""
    module.load_state_dict(_below(state.tensors, "module/"))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _below(state.tensors, "optimizer/").items():
        number, _, entry = name.partition("/")
        like = parameters[int(number)]
        if tensor.shape == like.shape:  # back into the memory layout of its parameter
            tensor = torch.empty_like(like).copy_(tensor)
        entries.setdefault(int(number), {})[entry] = tensor
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    if state.numbers["scaler"]:
        scaler.load_state_dict(state.numbers["scaler"])


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
