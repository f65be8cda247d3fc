"""What `pbkd export` writes, beside the network in PyTorch on real test images, and how long it takes.

    python -m benchmarks.exports STORE STAGE_KEY [data.root=DIR] [--threads 2]

Times the whole command, as it is typed, and writes what it found to benchmarks/results/exports.csv, in place
of an earlier row of the same recipe and stage. The VGG-16 of these rows was made, in some minutes, by

    pbkd run pipelines/recipes/cifar10_vgg16.yaml data.root=DIR data.limit=1000 data.batch_size=50 \\
        stages.teacher.epochs=6 stages.blocks.epochs=1 stages.stabilized.epochs=1 stages.distilled.epochs=2 \\
        compute.executor=local compute.threads=2 --until distilled --store STORE
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.jobs import processor

RESULTS = Path(__file__).parent / "results" / "exports.csv"
TOLD = (
    "recipe", "stage", "arch", "test_accuracy", "compared_on", "images", "max_abs_diff", "tolerance",
    "agreement", "bytes",
)  # fmt: skip
COLUMNS = (
    *TOLD, "file_ms", "pytorch_ms", "threads", "seconds", "stage_key", "processor", "torch", "onnxruntime",
    "date",
)  # fmt: skip


def main() -> None:
    """The command."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("store")
    parser.add_argument("stage_key")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    facts, seconds = exported(
        arguments.store, arguments.stage_key, arguments.overrides, int(arguments.threads)
    )
    row = {name: facts[name] for name in TOLD}
    row |= {"max_abs_diff": f"{facts['max_abs_diff']:.2g}", "tolerance": f"{facts['tolerance']:.3g}"}
    row |= {f"{by}_ms": f"{milliseconds:.3f}" for by, milliseconds in facts["latency_ms"].items()}
    row |= {"threads": facts["threads"], "seconds": f"{seconds:.1f}", "stage_key": facts["stage_key"][:12]}
    row |= {"processor": processor(), "torch": version("torch"), "onnxruntime": version("onnxruntime")}
    row |= {"date": datetime.now(UTC).date().isoformat()}
    sys.stdout.write("".join(f"{name:<14}{value}\n" for name, value in row.items()))
    keep(row)


def exported(store: str, key: str, overrides: list[str], threads: int) -> tuple[dict[str, Any], float]:
    """What `pbkd export --json` says, and the seconds it took from the first to the last."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pipelines.cli", "export", key, *overrides, "--store", store]
        begun = time.perf_counter()
        done = subprocess.run(
            [*command, "--out", f"{folder}/out", "--json"],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            check=True,
        )
        seconds = time.perf_counter() - begun
    facts: dict[str, Any] = json.loads(done.stdout)
    return facts, seconds


def keep(row: dict[str, Any]) -> None:
    """Write it in place of an earlier one of the same network."""
    before: list[dict[str, Any]] = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            before = list(csv.DictReader(file))
    others = [old for old in before if (old["recipe"], old["stage"]) != (row["recipe"], row["stage"])]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*others, row])


if __name__ == "__main__":
    main()
