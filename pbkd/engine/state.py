"""Resumable state and its files: all that a killed training needs to go on exactly where it was.

Order of samples, augmentation and torch's generators are pure functions of position, so the state holds only
weights, optimizer, scaler, step and history. On disk: safetensors and JSON, never a pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

log = logging.getLogger(__name__)
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


class CheckpointFolder:
    """Checkpoints of one training: `step-NNN/{state.safetensors,state.json}`, each written atomically.

    The newest two are kept. A checkpoint that does not match its own digest is passed over, with a warning.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: State) -> None:
        """Write a checkpoint: a crash at any moment leaves either all of it or nothing that is ever read."""
        final = self.folder / f"step-{state.step:09d}"
        partial = self.folder / f".partial-{os.getpid()}-{state.step}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        blob = save_tensors(state.tensors)
        header = {"step": state.step, "numbers": state.numbers, "history": state.history}
        header["digest"] = _digest(header, blob)
        _write(partial / "state.safetensors", blob)
        _write(partial / "state.json", json.dumps(header).encode())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in self._checkpoints()[:-2]:
            shutil.rmtree(old, ignore_errors=True)

    def restore(self) -> State | None:
        """The newest good checkpoint, or None."""
        for path in reversed(self._checkpoints()):
            try:
                blob = (path / "state.safetensors").read_bytes()
                header = json.loads((path / "state.json").read_bytes())
                if header.pop("digest") != _digest(header, blob):
                    raise ValueError("contents do not match their digest")
                return State(header["step"], load_tensors(blob), header["numbers"], header["history"])
            except (OSError, ValueError, KeyError) as error:
                log.warning("checkpoint %s is damaged (%s); the one before it is used", path, error)
        return None

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def _digest(header: Mapping[str, Any], blob: bytes) -> str:
    text = json.dumps({name: header[name] for name in ("step", "numbers", "history")}, sort_keys=True)
    return hashlib.sha256(text.encode() + blob).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
