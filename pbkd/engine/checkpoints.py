"""Checkpoint files: written whole or not at all, beside the training, and believed only if they are sound."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from pbkd.engine.state import State

log = logging.getLogger(__name__)

KEPT = 2
PARTIAL = ".partial-"


class CheckpointFolder:
    """Checkpoints of one training: `step-NNN/{state.safetensors,state.json}`, each written atomically.

    The newest two are kept. One that does not match its own digest is passed over, with a warning.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: State) -> None:
        """Write a checkpoint: a crash at any moment leaves either all of it or nothing that is ever read.

        Raises:
            OSError: it could not be written; those before it are as they were.
        """
        final = self._place(state.step)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{PARTIAL}{uuid.uuid4().hex}"
        try:
            partial.mkdir()
            blob = save_tensors(state.tensors)
            header = {"step": state.step, "numbers": state.numbers, "history": state.history}
            header["digest"] = _digest(header, blob)
            _write(partial / "state.safetensors", blob)
            _write(partial / "state.json", json.dumps(header).encode())
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # what a full disk needs most is room
            raise
        _sync(self.folder)
        found = self._checkpoints()
        kept = [path for path in found if path <= final][-KEPT:]  # a later one was damaged, or is of no use
        for path in found:
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def clean(self) -> None:
        """Remove what a crash left half written; for a new writer, before it begins."""
        for abandoned in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(abandoned, ignore_errors=True)

    def restore(self, *, warn: bool = True) -> State | None:
        """The newest sound checkpoint, or None; what is passed over for it is warned of in one line."""
        found, damaged = None, []
        for path in reversed(self._checkpoints()):
            try:
                found = _read(path)
                break
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                damaged.append(f"{path.name} is damaged ({_one_line(error)})")
        if damaged and warn:
            goes_on = "begins again" if found is None else f"goes on from step {found.step}"
            log.warning("checkpoint %s/%s: the training %s", self.folder, "; ".join(damaged), goes_on)
        return found

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def _checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


class CheckpointWriter:
    """Saves to a folder from a thread of its own, one state at a time, so that training need not wait."""

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pbkd-checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: State) -> None:
        """Begin to write `state`, when the one before it is written. Raises OSError if that one was not."""
        self.wait()
        self._pending = self._thread.submit(self._folder.save, state)

    def wait(self) -> None:
        """Return when nothing is being written. Raises OSError if the last state could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _read(path: Path) -> State:
    blob = (path / "state.safetensors").read_bytes()
    header = json.loads((path / "state.json").read_bytes())
    if header.pop("digest") != _digest(header, blob):
        raise ValueError("contents do not match their digest")
    return State(header["step"], load_tensors(blob), header["numbers"], header["history"])


def _digest(header: Mapping[str, Any], blob: bytes) -> str:
    text = json.dumps({name: header[name] for name in ("step", "numbers", "history")}, sort_keys=True)
    found = hashlib.sha256(text.encode())
    found.update(blob)
    return found.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
