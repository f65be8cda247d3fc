"""Measuring alone: what searches do on a machine they do at the same time, but for timing a network."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pbkd.storage import user_cache
from pipelines.latency import Latencies
from pipelines.manifest import Manifest


class Quiet:
    """A room that trainings enter together and a measurement alone; a turnstile gives it its turn.

    The locks are the kernel's: they end with a process that is killed.
    """

    def __init__(self) -> None:
        """Open the room of this user on this machine, which all searches share."""
        folder = user_cache()
        folder.mkdir(parents=True, exist_ok=True)
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
    def briefly(self) -> Iterator[None]:
        """Do what is over in a moment: waits while somebody measures, not while somebody is about to."""
        with _locked(self._room, fcntl.LOCK_SH):
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Measure: waits until what has begun is over; none begins before this ends."""
        with _locked(self._turnstile, fcntl.LOCK_EX), _locked(self._room, fcntl.LOCK_EX):
            yield

    def measure(self, latencies: Latencies, manifests: Sequence[Manifest]) -> None:
        """Measure, alone, what is not known yet of the networks of `manifests`."""
        if not latencies.are_measured(manifests):
            with self.alone():
                latencies.measure(manifests)


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
