"""Look at submitted jobs, follow their logs, end them."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pbkd.errors import UserError
from slurm import scheduler
from slurm.records import (
    CANCEL,
    End,
    JobRecord,
    all_jobs,
    events,
    folder_of_jobs,
    read_end,
    read_job,
    state,
    write_end,
)

POLL_SECONDS = 0.5
CANCEL_SECONDS = 120.0
CANCELLED = 143
ON_ITS_WAY = ("pending", "running", "completing", "configuring", "requeued", "suspended", "stopped")


def job_rows(store: str, job: str | None) -> list[dict[str, Any]]:
    """What there is to know of all jobs of a store, or of one."""
    jobs = folder_of_jobs(store)
    rows = []
    for id_ in [job] if job is not None else all_jobs(jobs):
        record = read_job(jobs, id_)
        end = read_end(jobs / id_)
        happened = events(jobs / id_)
        row = asdict(record) | {
            "state": state(jobs, record),
            "begun": sum(event["type"] == "begun" for event in happened),
            "code": end.code if end else None,
            "reason": end.reason if end else None,
        }
        rows.append(row | ({"events": happened, "folder": str(jobs / id_)} if job is not None else {}))
    return rows


def text_of(rows: list[dict[str, Any]], detailed: bool) -> str:
    """The same, for a person."""
    lines = [] if rows else ["no jobs in this store"]
    for row in rows:
        times = f" (begun {row['begun']} times)" if row["begun"] > 1 else ""
        lines.append(f"{row['id']:<10} {row['state']:<10} pbkd {' '.join(row['command'])}{times}")
        if row["reason"]:
            lines.append(f"{'':<11}{row['reason']}")
        if row["state"] == "lost":
            lines.append(
                f"{'':<11}it left the queue without an end; submit it again: it goes on from its checkpoint"
            )
        if detailed:
            for event in row["events"]:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
                rest = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "type"))
                lines.append(f"  {when} {event['type']}{': ' if rest else ''}{rest}")
            lines.append(f"  logs: {row['folder']}")
    return "\n".join(lines)


def log_of(store: str, job: str, node: int) -> str:
    """All that a node's task of the job has printed so far."""
    jobs = folder_of_jobs(store)
    record = read_job(jobs, job)
    path = _log(jobs, record, node)
    if not path.exists():
        raise UserError(f"{path}: not there (yet); the job is {state(jobs, record)}")
    return path.read_text(errors="replace")


def follow_log(store: str, job: str, node: int) -> int:
    """Print the log as it grows until the job has ended; returns the code it ended with."""
    jobs = folder_of_jobs(store)
    record = read_job(jobs, job)
    path, offset, looked, known = _log(jobs, record, node), 0, 0.0, ""
    while True:
        end = read_end(jobs / job)  # before the log: what is printed before the end is not lost
        if path.exists():
            with path.open("rb") as file:
                file.seek(offset)
                fresh = file.read()
            offset += len(fresh)
            sys.stdout.write(fresh.decode(errors="replace"))
            sys.stdout.flush()
        if end is not None:
            if end.reason:
                sys.stderr.write(f"{end.reason}\n")
            return end.code
        if time.monotonic() - looked > 10 * POLL_SECONDS:
            looked, now = time.monotonic(), state(jobs, record)
            if now != known:
                sys.stderr.write(f"job {job} is {now}\n")
                known = now
            if now == "cancelled":  # and killed before it could say so
                return CANCELLED
            if now not in ON_ITS_WAY and read_end(jobs / job) is None:
                raise UserError(
                    f"job {job}: {now}, and nobody declared its end; see {jobs / job}\n"
                    "if no log is there, compute nodes do not see this store; submit it again: it goes on"
                )
        time.sleep(POLL_SECONDS)


def cancel(store: str, job: str) -> str:
    """End a job with the state of its trainings kept; returns how it is then."""
    jobs = folder_of_jobs(store)
    record = read_job(jobs, job)
    folder = jobs / job
    if read_end(folder) is None:
        (folder / CANCEL).touch()
        if record.executor == "slurm" and state(jobs, record) == "pending":
            scheduler.ask("scancel", "--state=PENDING", job)
            write_end(folder, End(CANCELLED, "cancelled before it began"))
        deadline = time.monotonic() + CANCEL_SECONDS
        while read_end(folder) is None and time.monotonic() < deadline and state(jobs, record) in ON_ITS_WAY:
            time.sleep(POLL_SECONDS)
        if read_end(folder) is None and record.executor == "slurm":
            scheduler.ask("scancel", job)
            write_end(folder, End(CANCELLED, "cancelled"))
    return state(jobs, record)


def _log(jobs: Path, record: JobRecord, node: int) -> Path:
    return jobs / record.id / f"{record.id}_{node}_log.out"
