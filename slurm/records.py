"""What is known of a submitted job, in its folder of the store: what it is, what happened, how it ended.

`STORE/slurm/ID/` holds, beside submitit's files, `job.json`, `events.jsonl`, `cancel` (somebody asked for the
end) and `ended.json`, which exists once nobody is to begin the job again.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pbkd.errors import UserError
from pbkd.storage import Folder
from pipelines.journal import Journal

CANCEL = "cancel"
ENDED = "ended.json"
EVENTS = "events.jsonl"
ExecutorName = Literal["slurm", "local", "debug"]


@dataclass(frozen=True)
class JobRecord:
    """A job as it was submitted.

    Attributes:
        id: Slurm's, of an array `ARRAY_INDEX`; of a local job its process.
        command: what is typed after `pbkd`.
        restarts: how often it may be begun again after a failure.
    """

    id: str
    executor: ExecutorName
    command: tuple[str, ...]
    nodes: int
    restarts: int


@dataclass(frozen=True)
class End:
    """How a job ended: `code` as of `pbkd run`, and why, if that needs words."""

    code: int
    reason: str | None = None


def folder_of_jobs(store: str) -> Path:
    """Where the folders of the jobs of a store are: in it, or, if it is a bucket, in `runs` here."""
    return Path("runs" if "://" in store else store).expanduser().absolute() / "slurm"


def write_job(jobs: Path, record: JobRecord) -> None:
    """Remember what was submitted."""
    Folder(jobs / record.id).create("job.json", json.dumps(asdict(record), indent=1).encode())


def read_job(jobs: Path, id_: str) -> JobRecord:
    """Raises UserError if there is no such job."""
    try:
        content = json.loads((jobs / id_ / "job.json").read_bytes())
    except OSError as error:
        known = ", ".join(all_jobs(jobs)[-5:]) or "none"
        raise UserError(
            f"job {id_!r}: not one of {jobs}; the latest: {known}\nname another store by --store DIR"
        ) from error
    return JobRecord(**content | {"command": tuple(content["command"])})


def all_jobs(jobs: Path) -> list[str]:
    """The ids of all jobs of a store, the latest last."""
    found = sorted(jobs.glob("*/job.json"), key=lambda path: path.stat().st_mtime)
    return [path.parent.name for path in found]


def note(folder: Path, type_: str, **content: Any) -> None:
    """Write down that something happened to the job."""
    Journal(Folder(folder), EVENTS).append({"type": type_, **content})


def events(folder: Path) -> list[dict[str, Any]]:
    """All that happened to the job, in order."""
    return Journal(Folder(folder), EVENTS).read()[0]


def write_end(folder: Path, end: End) -> None:
    """Declare the job ended; of several who do, the first one is believed."""
    Folder(folder).create(ENDED, json.dumps(asdict(end)).encode())


def read_end(folder: Path) -> End | None:
    """How the job ended, or None if it did not."""
    try:
        return End(**json.loads((folder / ENDED).read_bytes()))
    except FileNotFoundError:
        return None


def state(jobs: Path, record: JobRecord) -> str:
    """`pending`, `running`, `finished`, `failed`, `refused`, `stopped`, or what Slurm says."""
    end = read_end(jobs / record.id)
    if end is not None:
        return {0: "finished", 1: "failed", 2: "refused"}.get(end.code, "stopped")
    if record.executor == "slurm":
        return _slurm_state(record.id)
    return "running" if record.executor == "local" and _is_alive(int(record.id)) else "lost"


def _slurm_state(id_: str) -> str:
    """The state in the queue, or, of a job that has left it, in Slurm's accounting."""
    for command in (
        ["squeue", "--noheader", "--jobs", id_, "--format", "%T"],
        ["sacct", "--noheader", "--allocations", "--jobs", id_, "--format", "State%30", "--parsable2"],
    ):
        try:
            found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except OSError:
            continue  # no Slurm, or no accounting
        if words := found.stdout.split():
            return words[0].lower()
    return "lost"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
