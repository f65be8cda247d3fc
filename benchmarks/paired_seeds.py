"""Run a recipe over several seeds and compare the student with its teacher and baselines, seed by seed.

    python -m benchmarks.paired_seeds pipelines/recipes/digits.yaml --seeds 5

Adds one row a stage and seed to benchmarks/results/RECIPE.csv (final epoch, test set), and prints means,
standard deviations and the paired differences with their 95 % intervals. Finished stages are reused.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scipy.stats import t as student_t

COLUMNS = (
    "recipe", "overrides", "seed", "stage", "role", "kind", "macs", "macs_ratio", "params", "test_accuracy",
    "val_accuracy", "agreement", "seconds", "key", "digest", "commit", "processor", "torch", "date",
)  # fmt: skip


def main() -> None:
    """The command."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--store", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/RECIPE.csv")
    arguments = parser.parse_intermixed_args()
    out = arguments.out or Path(__file__).parent / "results" / f"{arguments.recipe.stem}.csv"
    reports = []
    for seed in range(arguments.seeds):
        report = run(arguments.recipe, [*arguments.overrides, f"seed={seed}"], arguments.store)
        reports.append(report)
        write(out, [row(report, stage, seed, arguments.overrides) for stage in report["stages"]])
    sys.stdout.write(summary(reports) + "\n")


def run(recipe: Path, overrides: list[str], store: Path) -> dict[str, Any]:
    """What `pbkd run --json` says of one run."""
    pbkd = [sys.executable, "-m", "pipelines.cli"]
    command = [*pbkd, "run", str(recipe), *overrides, "--store", str(store), "--json"]
    report: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return report


def row(report: dict[str, Any], stage: dict[str, Any], seed: int, overrides: list[str]) -> dict[str, Any]:
    """A line of the CSV."""
    name = stage["name"]
    role = "baseline" if name in report["baselines"] else "stage"
    role = {report["teacher"]: "teacher", report["student"]: "student"}.get(name, role)
    manifest = json.loads((Path(report["store"]) / "manifests" / f"{stage['key']}.json").read_text())
    return {column: stage.get(column) for column in COLUMNS} | {
        "recipe": report["recipe"],
        "overrides": " ".join(overrides),
        "seed": seed,
        "stage": name,
        "role": role,
        "commit": (manifest["git"] or "")[:12],
        "processor": manifest["machine"]["processor"],
        "torch": manifest["versions"]["torch"],
        "date": datetime.fromtimestamp(manifest["created"], UTC).date().isoformat(),
        "seconds": round(stage["seconds"], 2),
    }


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to the CSV; a row of the same recipe, overrides, seed and stage is replaced."""
    same = ("recipe", "overrides", "seed", "stage")
    old = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    new = {tuple(str(row[name]) for name in same) for row in rows}
    kept = [row for row in old if tuple(row[name] for name in same) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(kept + rows)


def summary(reports: list[dict[str, Any]]) -> str:
    """Mean and standard deviation of every stage, and the student's paired differences."""
    names = [stage["name"] for stage in reports[0]["stages"]]
    accuracy = {
        name: [next(s["test_accuracy"] for s in report["stages"] if s["name"] == name) for report in reports]
        for name in names
    }
    lines = [f"{len(reports)} seeds, final epoch, test accuracy in percent"]
    lines += [f"  {name:<24}{mean_sd(accuracy[name])}" for name in names]
    student = reports[0]["student"]
    lines.append(f"{student} minus:")
    for other in (reports[0]["teacher"], *reports[0]["baselines"]):
        differences = [a - b for a, b in zip(accuracy[student], accuracy[other], strict=True)]
        low, high = interval(differences)
        mean = statistics.mean(differences)
        lines.append(f"  {other:<24}{mean:+.2f}  95 % interval [{low:+.2f}, {high:+.2f}]")
    return "\n".join(lines)


def mean_sd(values: list[float]) -> str:
    """`97.50 +- 0.31`."""
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean, by Student's t."""
    if len(values) < 2:
        return float("-inf"), float("inf")
    mean = statistics.mean(values)
    half = float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half


if __name__ == "__main__":
    main()
