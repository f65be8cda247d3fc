"""How the load on the shared store and on MLflow grows with GPUs, from what one operation costs here.

    python -m benchmarks.scale

Measures the operations that a run repeats all the time (a worker's look at its lease, the driver's look at
manifests, the renewal of a lease, a line of progress, MLflow's record of it), takes from the code how often
each is done, and writes, for stages that train on 8, 64 and 512 GPUs at once, what share of one server's time
that is. Above 1 it falls behind. Writes benchmarks/results/scale.csv.
"""

from __future__ import annotations

import csv
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric

from pbkd.storage import Folder
from pipelines.guard import LOOK_SECONDS
from pipelines.jobs import processor
from pipelines.journal import Journal
from pipelines.lease import RENEW_SECONDS, try_acquire
from pipelines.tracking import connect

RESULTS = Path(__file__).parent / "results" / "scale.csv"
REPEATS = 200
GPUS = (8, 64, 512)
STAGES = 30  # of a pipeline, most of them waiting
ROW_SECONDS = 30.0  # between reports of a stage: an epoch of CIFAR-10 on a GPU, roughly


def seconds(operation: Callable[[], object]) -> float:
    """The median time of an operation."""
    taken = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        operation()
        taken.append(time.perf_counter() - begun)
    return sorted(taken)[REPEATS // 2]


def costs(folder: Path) -> dict[str, tuple[float, Callable[[int], float]]]:
    """Of each operation: its time, and how often a second it is done with so many GPUs, one to a worker.

    Every stage is trained by one worker: as many run as there are GPUs, in pipelines of STAGES stages.
    """
    storage = Folder(folder)
    (folder / "leases").mkdir()
    lease = try_acquire(storage, "ab" * 32)
    assert lease is not None, "nobody else is there"
    journal = Journal(storage, "journal.jsonl")
    (folder / "mlflow").mkdir()
    client: MlflowClient = connect(f"sqlite:///{folder}/mlflow/mlflow.db")
    run = client.create_run(client.create_experiment("scale")).info.run_id
    row = [Metric(name, 0.5, 0, 1) for name in ("train_loss", "val_accuracy", "epoch")]
    store = folder / "manifests"

    def look_for_manifest() -> None:
        (store / f"{'cd' * 32}.json").exists()

    return {
        "a worker looks at its lease": (seconds(lease.is_wanted), lambda gpus: gpus / LOOK_SECONDS),
        "the driver renews a lease": (seconds(lease.renew), lambda gpus: gpus / RENEW_SECONDS),
        "the driver looks for a manifest": (
            seconds(look_for_manifest),
            lambda gpus: STAGES * max(1, gpus // STAGES) / storage.poll_seconds,
        ),
        "a line of the journal": (
            seconds(lambda: journal.append({"type": "progress"})),
            lambda gpus: gpus / ROW_SECONDS,
        ),
        "MLflow records a report (sqlite)": (
            seconds(lambda: client.log_batch(run, metrics=row)),
            lambda gpus: gpus / ROW_SECONDS,
        ),
    }


def main() -> None:
    """The command."""
    with tempfile.TemporaryDirectory(prefix="pbkd-scale-") as folder, RESULTS.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "operation",
                "milliseconds",
                *(f"share_{gpus}_gpus" for gpus in GPUS),
                "processor",
                "mlflow",
                "date",
            ]
        )
        for name, (cost, rate) in costs(Path(folder)).items():
            shares = [round(cost * rate(gpus), 4) for gpus in GPUS]
            row = [name, round(1000 * cost, 3), *shares]
            writer.writerow([*row, processor(), mlflow.__version__, datetime.now(UTC).date().isoformat()])
            sys.stdout.write(f"{row}\n")


if __name__ == "__main__":
    main()
