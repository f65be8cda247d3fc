"""Runs what is too long for every change: `make proof`.

    python -m benchmarks.proof [PART...]

fuzz: a thousand examples of each fuzzer. tests: those of which every run has a sister: sweeps over networks
of torchvision and timm, searches, recipes, signals, faults and readers on Ray too. copies: whether 46
networks of both libraries are what they were in blocks. kills: a worker or a driver killed fifty times.
slurm: every fault of the list on a Slurm of two nodes. Appends a row for each part to
benchmarks/results/proof.csv; `copies`, `kills` and `slurm` leave their figures in files of their own.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from pipelines.jobs import processor

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "proof.csv"
COLUMNS = ("part", "passed", "said", "minutes", "processor", "date")
EXAMPLES = {"PBKD_EXAMPLES": "1000"}
TESTS = ("pytest", "-q", "-n", "2", "--dist", "worksteal", "--durations=0")
PARTS = {
    "fuzz": (*TESTS, "tests/unit/test_fuzz.py"),
    "tests": (*TESTS, "--proof"),
    "copies": ("benchmarks.copies",),
    "kills": ("benchmarks.faults", "--kills", "50"),
    "slurm": ("benchmarks.slurm_faults",),
}


def run(part: str) -> bool:
    """Run a part, record it, and say whether it passed."""
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", *PARTS[part]],
        cwd=ROOT, env=os.environ | EXAMPLES, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            sys.stdout.write(line)
            said = line.strip(" =\n") or said
    passed = process.returncode == 0
    minutes = round((time.monotonic() - began) / 60, 1)
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow((part, passed, said, minutes, processor(), datetime.now(UTC).date().isoformat()))
    return passed


def main() -> None:
    """The command. Exit code 1 if a part failed."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    failed = [part for part in arguments.parts or PARTS if not run(part)]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
