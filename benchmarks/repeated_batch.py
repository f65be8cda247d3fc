"""A reader for benchmarks of the training itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


class RepeatedBatch:
    """A reader whose epoch is one batch of random images, (N, 3, 32, 32) in 10 classes, `count` times."""

    def __init__(self, size: int, count: int) -> None:
        self._batch = (torch.randn(size, 3, 32, 32), torch.arange(size) % 10)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self._batch] * self._count)

    def set_epoch(self, epoch: int) -> None:
        """They are all alike."""

    def resume_at(self, batch: int) -> None:
        """It begins at the first."""

    def global_count(self, batch: int) -> int:
        """Samples of a batch."""
        return len(self._batch[1])
