"""What a stage sees of the machine it runs on. The training loop cannot tell one session from another."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pbkd.engine.state import CheckpointFolder, Row, State


class Session(Protocol):
    """Rank and device of this process, and the ways out of it: reports, checkpoints, the wish to stop."""

    rank: int
    world_size: int
    device: torch.device

    def report(self, row: Row) -> None:
        """Tell the outside about an epoch."""

    def due(self) -> bool:
        """Whether it is time for a checkpoint."""

    def save(self, state: State) -> None:
        """Keep `state`; only rank 0 writes."""

    def restore(self) -> State | None:
        """The newest good state, or None."""

    def should_stop(self) -> bool:
        """Whether the run has been asked to end; the loop then saves and raises `Stopped`."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks."""

    def max(self, values: Tensor) -> Tensor:
        """The largest of each of `values` over all ranks."""


class Stopped(Exception):  # noqa: N818  # not an error: the run was asked to end
    """The training was asked to stop and has saved its state."""


class LocalSession:
    """A session in this process, alone or as one of `world_size` ranks of an initialized process group.

    Args:
        folder: where checkpoints and `progress.jsonl` go; None keeps nothing.
        device: where the stage computes.
        rank: of this process.
        world_size: number of ranks; above 1, `torch.distributed` must be initialized.
        checkpoint_seconds: time between checkpoints.
        should_stop: asked at every step.
    """

    def __init__(
        self,
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        checkpoint_seconds: float = 60.0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self._checkpoints = CheckpointFolder(folder) if folder else None
        self._progress = folder / "progress.jsonl" if folder else None
        self._interval, self._last_save = checkpoint_seconds, time.monotonic()
        self._should_stop = should_stop

    def report(self, row: Row) -> None:
        """Append the row to `progress.jsonl` (rank 0)."""
        if self.rank == 0 and self._progress is not None:
            self._progress.parent.mkdir(parents=True, exist_ok=True)
            with self._progress.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def due(self) -> bool:
        """Whether `checkpoint_seconds` have passed since the last checkpoint."""
        return self._checkpoints is not None and time.monotonic() - self._last_save >= self._interval

    def save(self, state: State) -> None:
        """Write a checkpoint (rank 0)."""
        if self.rank == 0 and self._checkpoints is not None:
            self._checkpoints.save(state)
        self._last_save = time.monotonic()

    def restore(self) -> State | None:
        """The newest good checkpoint."""
        return self._checkpoints.restore() if self._checkpoints is not None else None

    def should_stop(self) -> bool:
        """Whether the run has been asked to end."""
        return self._should_stop()

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce in place."""
        return self._reduce(values, torch.distributed.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """All-reduce in place."""
        return self._reduce(values, torch.distributed.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: torch.distributed.ReduceOp.RedOpType) -> Tensor:
        if self.world_size > 1:
            torch.distributed.all_reduce(values, operation)
        return values
