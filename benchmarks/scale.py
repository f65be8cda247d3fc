"""How the load on the shared store and on MLflow grows with GPUs, from what one operation costs here.

    python -m benchmarks.scale [--volumes]

Measures the operations that a run repeats all the time (a worker's look at its lease, the driver's look at
manifests, the renewal of a lease, a line of progress, MLflow's record of it), takes from the code how often
each is done, and writes, for stages that train on 8, 64 and 512 GPUs at once, what share of one server's time
that is. Above 1 it falls behind. Writes benchmarks/results/scale.csv.

Then runs the smallest form of a recipe, weighs what it leaves in store and MLflow, and writes how many GB
that is in an hour of 8, 64 and 512 GPUs: benchmarks/results/scale_volumes.csv. With --volumes only that.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric

from benchmarks.faults import ROOT
from pbkd.storage import Folder
from pipelines.guard import LOOK_SECONDS
from pipelines.jobs import processor
from pipelines.journal import Journal
from pipelines.lease import RENEW_SECONDS, try_acquire
from pipelines.store import Store
from pipelines.tracking import Tracker, connect

RESULTS = Path(__file__).parent / "results" / "scale.csv"
VOLUMES = RESULTS.with_name("scale_volumes.csv")
RUN: tuple[str | Path, ...] = (
    sys.executable, "-m", "pipelines.cli", "run", ROOT / "pipelines" / "recipes" / "digits.yaml",
)  # fmt: skip
REPEATS = 200
GPUS = (8, 64, 512)
STAGES = 30  # of a pipeline, most of them waiting
ROW_SECONDS = 30.0  # between reports of a stage: an epoch of CIFAR-10 on a GPU, roughly
STAGE_SECONDS = 600.0  # a stage of some twenty epochs of them
PARAMETERS = 11_000_000  # of a student: a ResNet-18


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


def volumes(folder: Path) -> list[tuple[str, float, str, float]]:
    """What a run leaves: its name, bytes, for each of what, and how many of these a GPU leaves in an hour.

    Artifacts and checkpoints are counted by parameter, all else by stage or report.
    """
    checkpoint = checkpoint_bytes(folder / "stopped")
    small: list[str | Path] = ["smoke=true", "compute.executor=local", "--until", "recovered"]
    in_store = [*small, "--store", folder / "runs"]
    subprocess.run([*RUN, *in_store], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    store = Store(folder / "runs")
    manifests = [json.loads(path.read_bytes()) for path in (folder / "runs" / "manifests").iterdir()]
    stages, parameters = len(manifests), sum(manifest["metrics"]["params"] for manifest in manifests)
    (pipeline,) = (folder / "runs" / "pipelines").iterdir()
    database = folder / "mlflow.db"
    connect(f"sqlite:///{database}").search_experiments()
    empty = size(database)
    begun = time.perf_counter()
    Tracker(f"sqlite:///{database}", store, pipeline.name).project()
    recorded = time.perf_counter() - begun
    sys.stdout.write(f"MLflow recorded {stages} stages in {recorded:.1f} s, load {os.getloadavg()[0]:.1f}\n")
    hourly = 3600.0 / STAGE_SECONDS
    rows = sum(len(manifest["history"]) for manifest in manifests)
    journal = size(pipeline / "journal.jsonl")
    return [
        ("artifact", size(folder / "runs" / "artifacts") / parameters, "parameter", hourly * PARAMETERS),
        ("checkpoint, of which two are kept until its stage ends", checkpoint, "parameter", 0.0),
        ("manifest", size(folder / "runs" / "manifests") / stages, "stage", hourly),
        ("leases", size(folder / "runs" / "leases") / stages, "stage", hourly),
        ("journal", journal / rows, "row of progress", 3600.0 / ROW_SECONDS),
        ("MLflow's database", (size(database) - empty) / rows, "row of progress", 3600.0 / ROW_SECONDS),
        ("report in the store", size(pipeline) - journal, "pipeline", hourly / STAGES),
        ("MLflow's artifacts", size(folder / "runs" / "mlflow" / "artifacts"), "pipeline", hourly / STAGES),
    ]


def checkpoint_bytes(store: Path) -> float:
    """A checkpoint's size for each parameter that is trained."""
    long = ["stages.teacher.epochs=100000", "compute.checkpoint_steps=5", "compute.executor=local"]
    words = [*RUN, *long, "--until", "teacher", "--store", store]
    with subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL) as running:
        while not list(store.glob("work/*/step-*")):
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
    kept = next(store.glob("work/*/step-*"))
    return kept.stat().st_size / 272_474  # parameters of a ResNet-20


def size(place: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(path.stat().st_size for path in (place, *place.rglob("*")) if path.is_file())


def main() -> None:
    """The command."""
    if "--volumes" not in sys.argv[1:]:
        write_costs()
    made = [processor(), mlflow.__version__, datetime.now(UTC).date().isoformat()]
    with tempfile.TemporaryDirectory(prefix="pbkd-scale-") as folder, VOLUMES.open("w", newline="") as file:
        writer = csv.writer(file)
        titles = [f"gb_an_hour_{gpus}_gpus" for gpus in GPUS]
        writer.writerow(["what", "bytes", "for_each", *titles, "processor", "mlflow", "date"])
        for name, each, unit, an_hour in volumes(Path(folder)):
            row = [name, round(each, 2), unit, *(round(gpus * an_hour * each / 1e9, 3) for gpus in GPUS)]
            writer.writerow([*row, *made])
            sys.stdout.write(f"{row}\n")


def write_costs() -> None:
    """Measure and write what operations cost."""
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
