"""Time of a training step: each way of running it, in processes that take turns.

    python -m benchmarks.training_step [--threads 2] [--rounds 5]

Distils a ResNet-56 into its half-width student on this machine's CPU, 128 images of CIFAR's size a step. Each
way has a process of its own; they take turns, a few steps at a time, so that all see the same machine. Writes
medians, and ratios to the first way, to benchmarks/results/training_step.csv.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.repeated_batch import RepeatedBatch
from pbkd.engine import LocalSession, Precision, Task, TrainingSettings, fit, keep_freed_memory
from pbkd.networks import NetworkSettings, architecture, fresh
from pbkd.objectives import hinton
from pbkd.students import StudentSettings, student_block
from pipelines.jobs import processor

STEPS = 4
RESULTS = Path(__file__).parent / "results" / "training_step.csv"
COLUMNS = ("way", "threads", "median_ms", "speed", "processor", "torch", "date")


@dataclass(frozen=True)
class Way:
    """One way of running a step."""

    name: str
    precision: Precision
    keeps_memory: bool = True


WAYS = (
    Way("fp32, memory handed back", Precision(), keeps_memory=False),
    Way("fp32", Precision()),
    Way("fp32, channels last", Precision(channels_last=True)),
    Way("bf16", Precision(precision="bf16")),
    Way("bf16, channels last, memory handed back", Precision(precision="bf16", channels_last=True), False),
    Way("bf16, channels last", Precision(precision="bf16", channels_last=True)),
)


def main() -> None:
    """The command."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    times = measure(arguments.threads, arguments.rounds)
    first = statistics.median(times[WAYS[0].name])
    rows = []
    for name, values in times.items():
        median = statistics.median(values)
        numbers = (arguments.threads, f"{1000 * median:.1f}", f"{first / median:.2f}")
        about = (processor(), torch.__version__, datetime.now(UTC).date().isoformat())
        rows.append(dict(zip(COLUMNS, (name, *numbers, *about), strict=True)))
        sys.stdout.write(f"{name:<44}{1000 * median:8.1f} ms   {first / median:.2f}x\n")
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def measure(threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a step of each way, one value a round."""
    context = multiprocessing.get_context("spawn")
    ends = {}
    for way in WAYS:
        mine, its = context.Pipe()
        context.Process(target=serve, args=(way, threads, its), daemon=True).start()
        ends[way.name] = mine
    times: dict[str, list[float]] = {name: [] for name in ends}
    for round_ in range(rounds + 1):
        for name, end in ends.items():
            end.send(True)
            seconds = end.recv()
            if round_:  # the first round warms up
                times[name].append(seconds)
    for end in ends.values():
        end.send(False)
    return times


def serve(way: Way, threads: int, end: Connection) -> None:
    """Run `STEPS` steps whenever asked to, and answer with the seconds of one."""
    torch.set_num_threads(threads)
    if way.keeps_memory:
        keep_freed_memory()
    spec = architecture(NetworkSettings(arch="resnet56"), (3, 32, 32), 10)
    teacher = fresh(spec, 0).eval().requires_grad_(False)
    for index, block in enumerate(spec.blocks):
        spec = spec.with_block(index, student_block(block, StudentSettings()))
    task = Task(fresh(spec, 1), soft_targets, teacher=teacher)
    reader = RepeatedBatch(128, STEPS)
    while end.recv():
        started = time.perf_counter()
        fit(task, TrainingSettings(steps=STEPS), reader, LocalSession(), 0, way.precision)
        end.send((time.perf_counter() - started) / STEPS)


def soft_targets(output: Tensor, logits: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Hinton's objective."""
    return {"loss": hinton(output, target, labels, 0.9, 4.0)}


if __name__ == "__main__":
    main()
