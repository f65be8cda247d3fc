"""How long until a job of `pbkd slurm run` trains, and where the seconds go, on a real Slurm of two nodes.

    python -m benchmarks.slurm_start [--repeats 3]

Starts a Slurm of its own (benchmarks/slurm_lab; root), submits benchmarks/faults.yaml's teacher with one
worker on each node, lets it be requeued after some steps, and cancels it. Appends two rows for each repeat to
benchmarks/results/slurm_start.csv: from submission, and from Slurm's second start after the requeue.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.slurm_faults import time_limit
from benchmarks.slurm_jobs import INTERVAL, TRAINING, Bench, Job
from benchmarks.slurm_lab import SlurmLab
from pipelines.jobs import processor

RESULTS = Path(__file__).parent / "results" / "slurm_start.csv"


@dataclass(frozen=True)
class Start:
    """Seconds from a beginning to the first step; the parts follow one another.

    Attributes:
        beginning: `submission`, when `pbkd slurm run` is typed; `requeue`, when Slurm starts the job again.
        total: all of them.
        begun: until the job's own code runs on the first node; of a submission with Slurm's delay.
        cluster: until Ray is up on both nodes.
        driver: until `pbkd run` has given the stage to Ray Train.
        workers: until they have taken the first step.
    """

    beginning: str
    total: float
    begun: float
    cluster: float
    driver: float
    workers: float


def measure(bench: Bench) -> list[Start]:
    """One job: its start, and its start after a requeue."""
    job = Job(bench, bench.store(), *TRAINING, "stages.teacher.steps=100000")
    job.wait_for_steps(1)
    starts = [_start(job, "submission", job.submitted_at, time.time())]
    job.wait_for_steps(INTERVAL)
    former = job.workers()
    time_limit(job, bench)
    stepped = job.wait_for_other_workers(former)
    starts.append(_start(job, "requeue", _slurm_start(job, bench), stepped))
    job.pbkd("cancel", job.id, "--store", job.store)
    if not job.is_clean():
        raise RuntimeError(f"job {job.id} left something in {bench.temporary.name}")
    return starts


def _start(job: Job, beginning: str, since: float, stepped: float) -> Start:
    times = [since, job.event("begun", -1), job.event("cluster up", -1), _stage_started(job.store), stepped]
    parts = [later - earlier for earlier, later in pairwise(times)]
    return Start(beginning, stepped - since, *parts)


def _slurm_start(job: Job, bench: Bench) -> float:
    """When Slurm has started the job last, to the second."""
    said = bench.lab.ask("squeue", "--noheader", "--jobs", job.id, "--format", "%S")
    return datetime.fromisoformat(said).timestamp()


def _stage_started(store: Path) -> float:
    """When the driver has given its stage to the executor last."""
    (journal,) = store.glob("pipelines/*/journal.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    return max(float(record["time"]) for record in records if record["type"] == "started")


def _record(start: Start) -> None:
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow([field.name for field in fields(Start)] + ["load", "processor", "torch", "date"])
        row = [round(cell, 1) if isinstance(cell, float) else cell for cell in astuple(start)]
        load = f"{os.getloadavg()[0]:.1f}"  # processes that ran or would have, in the last minute
        writer.writerow([*row, load, processor(), torch.__version__, datetime.now(UTC).date().isoformat()])


def main() -> None:
    """The command."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--repeats", type=int, default=3, help="jobs, one after another")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # and the lab is stopped
    with tempfile.TemporaryDirectory(prefix="pbkd-slurm-start-") as place:
        lab = SlurmLab()
        lab.start()
        try:
            with Bench(lab, Path(place)) as bench:
                for _ in range(arguments.repeats):
                    for start in measure(bench):
                        _record(start)
                        sys.stdout.write(f"{start}\n")
                        sys.stdout.flush()
        finally:
            lab.stop()


if __name__ == "__main__":
    main()
