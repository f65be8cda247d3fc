"""Run a recipe over several seeds and compare the student with its teacher and baselines, seed by seed.

    python -m benchmarks.paired_seeds pipelines/recipes/digits.yaml --seeds 5

Adds one row a stage and seed to benchmarks/results/RECIPE.csv (final epoch, test set). Prints, and writes to
RECIPE_summary.csv, means, standard deviations and the student's paired differences with 95 % intervals.
Finished stages are reused.
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
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--store", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/RECIPE.csv")
    arguments = parser.parse_intermixed_args()
    out = arguments.out or Path(__file__).parent / "results" / f"{arguments.recipe.stem}.csv"
    reports = []
    for seed in range(arguments.seeds):
        report = run(arguments.recipe, [*arguments.overrides, f"seed={seed}"], arguments.store)
        reports.append(report)
        write(out, [row(report, stage, seed, arguments.overrides) for stage in report["stages"]])
    rows = summarize(reports)
    with out.with_stem(out.stem + "_summary").open("w", newline="") as file:
        columns = ("recipe", "stage", "seeds", "mean", "sd", "student_minus", "low", "high")
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    sys.stdout.write("\n".join(["test accuracy in percent, final epoch", *map(sentence, rows), ""]))


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


def summarize(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a stage: mean and standard deviation, and how much better the student is, with its interval."""
    first = reports[0]
    accuracy = {
        name: [next(s["test_accuracy"] for s in report["stages"] if s["name"] == name) for report in reports]
        for name in [stage["name"] for stage in first["stages"]]
    }
    compared = {first["teacher"], *first["baselines"]}
    rows = []
    for name, values in accuracy.items():
        row = {"recipe": first["recipe"], "stage": name, "seeds": len(values)}
        row |= {"mean": f"{statistics.mean(values):.2f}", "sd": f"{statistics.stdev(values):.2f}"}
        if name in compared:
            student = accuracy[first["student"]]
            differences = [mine - other for mine, other in zip(student, values, strict=True)]
            low, high = interval(differences)
            row |= {"student_minus": f"{statistics.mean(differences):+.2f}"}
            row |= {"low": f"{low:+.2f}", "high": f"{high:+.2f}"}
        rows.append(row)
    return rows


def sentence(row: dict[str, Any]) -> str:
    """The row for a person."""
    text = f"{row['stage']:<24}{row['mean']} +- {row['sd']}"
    if "low" in row:
        text += f"   student {row['student_minus']}, 95 % interval [{row['low']}, {row['high']}]"
    return text


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean, by Student's t."""
    mean = statistics.mean(values)
    half = float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half


if __name__ == "__main__":
    main()
