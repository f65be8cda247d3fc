"""A benchmark that is stopped ends its run in order, and keeps what was finished."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

from tests.integration.pbkd_process import ROOT, SECONDS, SMALL, until, with_database


def test_a_stopped_benchmark_has_rows_of_what_was_finished(tmp_path: Path) -> None:
    store, out = with_database(tmp_path / "runs"), tmp_path / "small.csv"
    command = [sys.executable, "-m", "benchmarks.paired_seeds", str(SMALL), "compute.executor=local"]
    command += ["stages.blocks.steps=100000", "--first", "7", "--store", str(store), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until(lambda: any(store.glob("work/*/step-*")) and any(store.glob("manifests/*")), "a second stage")
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 130, error
    with out.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["seed"], row["stage"], row["role"]) == ("7", "teacher", "teacher")
    assert float(row["memory_peak_mb"]) > 0 and float(row["nll"]) > 0
    assert [path.stem for path in store.glob("manifests/*.json")] == [row["key"]]
    assert (tmp_path / "small_summary.csv").exists()
    leases = [json.loads(path.read_text()) for path in store.glob("leases/*/*.json")]
    assert leases and all(lease["released"] for lease in leases), "the run was told, and ended in order"
