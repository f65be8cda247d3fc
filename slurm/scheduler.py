"""Questions to Slurm, and requests, by its own commands."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

from pbkd.errors import UserError
from slurm.allocation import parse_minutes

SECONDS = 60


@dataclass(frozen=True)
class Partition:
    """What a partition allows; `minutes` None: no limit."""

    name: str
    minutes: int | None
    nodes: int
    is_default: bool


def ask(*command: str) -> str:
    """What a command of Slurm says. Raises UserError if there is no Slurm, or it does not answer."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError as error:
        raise UserError(
            f"{command[0]}: not found, so this machine is no login node of a Slurm cluster\n"
            "run it there, or use --executor local, or pbkd run"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{command[0]}: no answer in {SECONDS} s; is Slurm's controller up? (sinfo)"
        ) from error
    if found.returncode != 0:
        raise UserError(f"{command[0]}: {_first_line(found.stderr)}")
    return found.stdout


def partitions() -> list[Partition]:
    """All partitions one may submit to."""
    rows = [line.split("|") for line in ask("sinfo", "--noheader", "--format", "%P|%l|%D|%a").splitlines()]
    merged: dict[str, Partition] = {}
    for name, limit, nodes, available in rows:  # a partition has a row for each state of its nodes
        if available == "up":
            bare = name.rstrip("*")
            before = merged[bare].nodes if bare in merged else 0
            merged[bare] = Partition(bare, parse_minutes(limit), before + int(nodes), name.endswith("*"))
    return list(merged.values())


def job_id() -> str:
    """The job this process is a part of, of an array `ARRAY_INDEX`."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ.get("SLURM_JOB_ID", "")


def is_preempted() -> bool:
    """Whether this process's job still runs, but another is to have its nodes."""
    if not job_id():
        return False
    try:
        said = ask("scontrol", "show", "job", "--oneliner", job_id())
    except UserError:
        return False
    words = dict(word.split("=", 1) for word in said.split() if "=" in word)
    return words.get("JobState") == "RUNNING" and words.get("PreemptTime", "None") != "None"


def is_cancelled() -> bool:
    """Whether somebody has cancelled this process's job."""
    try:
        said = ask(
            "sacct", "--noheader", "--allocations", "--parsable2", "--jobs", job_id(), "--format", "State"
        )
    except UserError:
        return False
    return said.startswith("CANCELLED")


def requeue() -> None:
    """Put this process's job back into the queue, which ends it here."""
    ask("scontrol", "requeue", job_id())


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0] or "it failed, and said nothing"
