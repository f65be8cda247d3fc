"""Measuring alone: trainings of a search share a machine with one another, a latency with nothing of it."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Quiet:
    """A room that trainings enter together and a measurement alone; a turnstile gives it its turn.

    The locks are the kernel's: they end with a process that is killed.
    """

    def __init__(self, folder: Path) -> None:
        """Every machine has a room of its own in `folder`."""
        host = socket.gethostname()
        self._turnstile, self._room = folder / f".turnstile-{host}", folder / f".room-{host}"

    @contextmanager
    def together(self) -> Iterator[None]:
        """Train: waits while somebody measures, or is about to."""
        with _locked(self._turnstile, fcntl.LOCK_EX):
            room = _open(self._room, fcntl.LOCK_SH)
        try:
            yield
        finally:
            os.close(room)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Measure: waits until the trainings that have begun are over; none begins before this ends."""
        with _locked(self._turnstile, fcntl.LOCK_EX), _locked(self._room, fcntl.LOCK_EX):
            yield


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    descriptor = _open(path, how)
    try:
        yield
    finally:
        os.close(descriptor)


def _open(path: Path, how: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
