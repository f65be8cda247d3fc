"""What checkpoints cost a training, by the state's size.

    python -m benchmarks.checkpoint_overhead [--threads 2] [--rounds 5]

Trains in turns without checkpoints and with one every few steps, in one process, and divides what the latter
takes longer by the number of its checkpoints. They follow so closely that the training has to wait for large
ones, as it need not at the default interval: an upper bound. Writes medians, and their share of the default
interval (`compute.checkpoint_seconds`), to benchmarks/results/checkpoint_overhead.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.repeated_batch import RepeatedBatch
from pbkd.engine import LocalSession, OptimizerSettings, Task, TrainingSettings, fit, keep_freed_memory
from pbkd.networks import NetworkSettings, architecture, fresh
from pbkd.stages.base import label_objective
from pipelines.jobs import processor
from pipelines.recipe import Compute

STEPS, EVERY, BATCH = 16, 4, 32
CHECKPOINTS = STEPS // EVERY  # that at step 0 is not due; that at the end is always written
NETWORKS = ("resnet56", "vgg16")
RESULTS = Path(__file__).parent / "results" / "checkpoint_overhead.csv"
COLUMNS = (
    "network",
    "state_mb",
    "threads",
    "added_ms",
    "interval_s",
    "overhead_percent",
    "processor",
    "torch",
    "date",
)


def main() -> None:
    """The command."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    interval = Compute().checkpoint_seconds
    rows = []
    for name in NETWORKS:
        size, added = measure(name, arguments.rounds)
        share = 100 * added / interval
        numbers = (f"{size / 1e6:.1f}", arguments.threads, f"{1000 * added:.1f}", interval, f"{share:.3f}")
        about = (processor(), torch.__version__, datetime.now(UTC).date().isoformat())
        rows.append(dict(zip(COLUMNS, (name, *numbers, *about), strict=True)))
        sys.stdout.write(f"{name:<10}{1000 * added:8.1f} ms a checkpoint   {share:.3f} % of {interval:g} s\n")
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def measure(name: str, rounds: int) -> tuple[int, float]:
    """Bytes of a checkpoint of network `name`, and the median of the seconds it adds to a training."""
    added = []
    with tempfile.TemporaryDirectory(prefix="pbkd-") as place:
        for round_ in range(rounds + 1):
            folder = Path(place) / str(round_)
            without = seconds(name, LocalSession())
            having = seconds(name, LocalSession(folder, checkpoint_steps=2 * EVERY))
            if round_:  # the first round warms up
                added.append((having - without) / CHECKPOINTS)
        size = max(folder.glob("step-*")).stat().st_size
    return size, statistics.median(added)


def seconds(name: str, session: LocalSession) -> float:
    """Time of a training, its last checkpoint committed."""
    spec = architecture(NetworkSettings(arch=name), (3, 32, 32), 10)
    settings = TrainingSettings(steps=STEPS, optimizer=OptimizerSettings(lr=1e-4))
    reader = RepeatedBatch(BATCH, STEPS)
    task = Task(fresh(spec, 0), label_objective)
    started = time.perf_counter()
    fit(task, settings, reader, session, 0)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
