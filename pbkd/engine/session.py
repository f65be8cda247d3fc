"""What a stage sees of the machine it runs on. The training loop cannot tell one session from another."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pbkd.engine.checkpoints import Checkpoints, CheckpointWriter
from pbkd.engine.state import Row, State
from pbkd.storage import Folder, Storage


class Session(Protocol):
    """Rank and device of this process, and the ways out of it: reports, checkpoints, the wish to stop."""

    rank: int
    world_size: int
    device: torch.device

    def report(self, row: Row) -> None:
        """Tell the outside about an epoch."""

    def due(self, step: int) -> bool:
        """Whether it is time for a checkpoint, before step `step`."""

    def save(self, state: State) -> None:
        """Begin to keep `state`, without waiting; only rank 0 writes, and only while the training is its."""

    def commit(self) -> None:
        """Wait until what was saved is safe. Raises OSError if it could not be written."""

    def restore(self) -> State | None:
        """The newest good state, or None."""

    def should_stop(self) -> bool:
        """Whether the run has been asked to end; the loop then saves and raises `Stopped`."""

    def pause(self) -> None:
        """Hear that no step is under way until `should_stop` is asked again."""

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks."""

    def max(self, values: Tensor) -> Tensor:
        """The largest of each of `values` over all ranks."""


class Stopped(Exception):  # noqa: N818  # not an error: the run was asked to end
    """The training was asked to stop and has saved its state."""


class LocalSession:
    """A session in this process, alone or as one of `world_size` ranks of an initialized process group.

    Args:
        storage: where checkpoints and `progress.jsonl` go, a folder or what is like one; None keeps nothing.
        device: where the stage computes.
        rank: of this process.
        world_size: number of ranks; above 1, `torch.distributed` must be initialized.
        checkpoint_seconds: time between checkpoints.
        checkpoint_steps: killed, a training repeats no more optimizer steps than these: checkpoints are begun
            twice as often, as one may still be being written. None: time alone decides.
        should_stop: asked before every step.
        pause: told when no step is under way any more.
        may_save: asked before each checkpoint; no: the training has another owner now, who writes them.
    """

    def __init__(
        self,
        storage: Storage | Path | None = None,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        checkpoint_seconds: float = 60.0,
        should_stop: Callable[[], bool] = lambda: False,
        checkpoint_steps: int | None = None,
        pause: Callable[[], None] = lambda: None,
        may_save: Callable[[], bool] = lambda: True,
    ) -> None:
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self._storage = Folder(storage) if isinstance(storage, Path) else storage
        self._checkpoints = Checkpoints(self._storage, may_save) if self._storage else None
        self._writer = CheckpointWriter(self._checkpoints) if self._checkpoints else None
        self._seconds, self._steps = checkpoint_seconds, checkpoint_steps
        self._saved_at, self._saved_step = time.monotonic(), 0
        self._should_stop, self._pause = should_stop, pause

    def report(self, row: Row) -> None:
        """Append the row to `progress.jsonl` (rank 0)."""
        if self.rank == 0 and self._storage is not None:
            self._storage.append("progress.jsonl", json.dumps(row).encode() + b"\n", sync=False)

    def due(self, step: int) -> bool:
        """Whether enough seconds or steps have passed since the last checkpoint (rank 0)."""
        if self._checkpoints is None or self.rank != 0:
            return False
        if self._steps is not None and step - self._saved_step >= max(1, self._steps // 2):
            return True
        return time.monotonic() - self._saved_at >= self._seconds

    def save(self, state: State) -> None:
        """Begin to write a checkpoint (rank 0), when the one before it is written."""
        if self.rank == 0 and self._writer is not None:
            self._writer.save(state)
            if self._steps == 1:
                self._writer.wait()
        self._saved_at, self._saved_step = time.monotonic(), state.step

    def commit(self) -> None:
        """Wait for the checkpoint that is being written."""
        if self._writer is not None:
            self._writer.wait()

    def restore(self) -> State | None:
        """The newest sound checkpoint; rank 0 warns of the others."""
        state = None
        if self._checkpoints is not None:
            if self.rank == 0:
                self._checkpoints.clean()
            state = self._checkpoints.restore(warn=self.rank == 0)
        self._saved_step = state.step if state is not None else 0
        return state

    def should_stop(self) -> bool:
        """Whether the run has been asked to end."""
        return self._should_stop()

    def pause(self) -> None:
        """Pass it on."""
        self._pause()

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
