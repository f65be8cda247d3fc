"""Checkpoints: written whole or not at all, beside the training, and believed only if they are sound."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from pbkd.engine.state import State
from pbkd.errors import first_line
from pbkd.storage import Storage

log = logging.getLogger(__name__)

KEPT = 2
NAME = re.compile(r"step-\d{9}-[0-9a-f]{64}")
HEADER_LENGTH = 8  # bytes that a safetensors file begins with: the length of its JSON header


class Checkpoints:
    """Checkpoints of one training, `step-NNN-SHA256`: safetensors with all that is no tensor as metadata.

    The newest two are kept. One that does not match the digest in its name is passed over, with a warning.
    Another writer may have taken the training over, and this one not know it yet: what it cannot know of is
    never removed, and once `may_save` says no, nothing is written.
    """

    def __init__(self, storage: Storage, may_save: Callable[[], bool] = lambda: True) -> None:
        self._storage, self._may_save = storage, may_save
        self._known: set[str] = set()  # what was there when it began, and its own

    def save(self, state: State) -> None:
        """Write a checkpoint: a crash at any moment leaves either all of it or nothing that is ever read.

        Raises:
            OSError: it could not be written; those before it are as they were.
        """
        rest = {"step": state.step, "numbers": state.numbers, "history": state.history}
        content = save_tensors(state.tensors, {"state": json.dumps(rest)})
        name = f"step-{state.step:09d}-{hashlib.sha256(content).hexdigest()}"
        if not self._may_save():
            log.warning("checkpoint %s is not written: another run goes on with the training", _step(name))
            return
        self._storage.replace(name, content)
        self._known.add(name)
        # A later one was damaged, or is of no use; so is another one of the same step.
        earlier = sorted(other for other in self._known if _step(other) < _step(name))
        kept = {name, *earlier[1 - KEPT :]}
        for other in self._known - kept:
            self._storage.remove(other)
        self._known = kept

    def clean(self) -> None:
        """Remove what a crash left half written; for a new writer, before it begins."""
        for abandoned in self._storage.leftovers():
            if abandoned.startswith(".step-"):
                self._storage.remove(abandoned)

    def restore(self, *, warn: bool = True) -> State | None:
        """The newest sound checkpoint, or None; what is passed over for it is warned of in one line."""
        found, damaged = None, []
        names = self._names()
        self._known = set(names)
        for name in reversed(names):
            try:
                found = self._read(name)
                break
            except FileNotFoundError:
                continue  # removed a moment ago
            except _Damaged as error:
                damaged.append(f"{_step(name)} is damaged ({error})")
        if damaged and warn:
            goes_on = "begins again" if found is None else f"goes on from step {found.step}"
            place = self._storage.location()
            log.warning("checkpoint %s/%s: the training %s", place, "; ".join(damaged), goes_on)
        return found

    def damaged(self) -> dict[str, str]:
        """What is wrong with those that `restore` would pass over, by their names."""
        found = {}
        for name in self._names():
            try:
                self._read(name)
            except FileNotFoundError:
                continue
            except _Damaged as error:
                found[name] = str(error)
        return found

    def _read(self, name: str) -> State:
        try:
            return _parse(name, self._storage.read(name))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            if isinstance(error, OSError) and error.errno != errno.EIO:
                raise  # it may be sound, and cannot be reached
            raise _Damaged(first_line(error)) from error

    def _names(self) -> list[str]:
        return [name for name in self._storage.names() if NAME.fullmatch(name)]


class CheckpointWriter:
    """Saves from a thread of its own, one state at a time, so that training need not wait."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pbkd-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: State) -> None:
        """Begin to write `state`, when the one before it is written. Raises OSError if that one was not."""
        self.wait()
        self._pending = self._thread.submit(self._checkpoints.save, state)

    def wait(self) -> None:
        """Return when nothing is being written. Raises OSError if the last state could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


class _Damaged(Exception):  # noqa: N818 - the reason is the message
    """A checkpoint is not what was written."""


def _step(name: str) -> str:
    """`step-NNN` of a checkpoint's name."""
    return name[: name.rfind("-")]


def _parse(name: str, content: bytes) -> State:
    if hashlib.sha256(content).hexdigest() != name.rpartition("-")[2]:
        raise ValueError("contents do not match their digest")
    length = int.from_bytes(content[:HEADER_LENGTH], "little")
    header = json.loads(content[HEADER_LENGTH : HEADER_LENGTH + length])
    rest = json.loads(header["__metadata__"]["state"])
    return State(rest["step"], load_tensors(content), rest["numbers"], rest["history"])
