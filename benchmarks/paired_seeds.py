"""Run a recipe over several seeds and compare the student with its teacher and baselines, seed by seed.

    python -m benchmarks.paired_seeds pipelines/recipes/digits.yaml --seeds 5

Adds one row a finished stage and seed to benchmarks/results/RECIPE.csv (final epoch, test set), also when a
run fails or is stopped. Prints, and writes to RECIPE_summary.csv, means, standard deviations and the
student's paired differences with 95 % intervals, over all rows of the recipe and these overrides: seeds may
be run in several sessions (--first). Finished stages are reused.
"""

from __future__ import annotations

import argparse
import csv
import io
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from scipy.stats import t as student_t

from pbkd.storage import Folder
from pipelines.graph import build_graph, finished
from pipelines.latency import Latencies
from pipelines.recipe import Recipe
from pipelines.recipe_file import load_recipe
from pipelines.store import Store

COLUMNS = (
    "recipe", "overrides", "seed", "stage", "role", "kind", "macs", "macs_ratio", "params", "test_accuracy",
    "val_accuracy", "agreement", "seconds", "key", "digest", "commit", "processor", "torch", "date",
    "test_top5", "nll", "ece", "kl", "nonzero_params", "nonzero_macs", "latency_ms", "latency_ms_batch32",
    "memory_peak_mb", "gradient_norm_max", "feature_cka_min",
)  # fmt: skip
MEANS = ("test_top5", "nll", "ece", "agreement", "kl", "gradient_norm_max", "feature_cka_min")
SUMMARY_COLUMNS = (
    "recipe", "stage", "seeds", "mean", "sd", "student_minus", "low", "high", "compression", "macs_ratio",
    "nonzero_macs_ratio", *MEANS,
)  # fmt: skip
"""Of test accuracy mean, deviation and the student's paired differences; the teacher's size over the stage's,
as ShrinkBench has it (zeros do not count in the first and third ratio); means of the other metrics."""
NO_RESULT = (
    "compute.executor=", "compute.concurrency=", "compute.fuse=", "data.root=", "data.beton=", "tracking.",
)  # fmt: skip
"""Overrides that change no result: they are not written into the rows."""
STOPPED = 128 + signal.SIGINT

Row = dict[str, Any]


def main() -> int:
    """The command. Returns what the last `pbkd run` did; 130 after Ctrl-C and SIGTERM."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument(
        "--seeds",
        type=int,
        default=5,
        help="how many (0: only sum up the rows there are); default: %(default)s",
    )
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="default: %(default)s")
    parser.add_argument(
        "--until", metavar="STAGE[,STAGE]", help="only these and what they need, as pbkd run has it"
    )
    parser.add_argument("--store", default="runs")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/RECIPE.csv")
    arguments = parser.parse_intermixed_args()
    out = arguments.out or Path(__file__).parent / "results" / f"{arguments.recipe.stem}.csv"
    overrides = " ".join(item for item in arguments.overrides if not item.startswith(NO_RESULT))
    signal.signal(signal.SIGTERM, _interrupt)
    code, summary = 0, record(out, load_recipe(arguments.recipe, arguments.overrides).name, overrides, [])
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        seeded = [*arguments.overrides, f"seed={seed}"]
        recipe = load_recipe(arguments.recipe, seeded)
        until = ["--until", arguments.until] if arguments.until else []
        code = run(arguments.recipe, [*seeded, *until], arguments.store)
        summary = record(
            out, recipe.name, overrides, finished_rows(recipe, overrides, Store(arguments.store))
        )
        if code:
            break
    sys.stdout.write("\n".join(["test accuracy in percent, final epoch", *map(sentence, summary), ""]))
    return code


def record(out: Path, recipe: str, overrides: str, rows: Sequence[Row]) -> list[Row]:
    """Add rows to the CSV, then write and return the summary of all of this recipe and these overrides."""
    same = [row for row in write(out, rows) if (row["recipe"], row["overrides"]) == (recipe, overrides)]
    summary = summarize(same)
    _write(out.with_stem(out.stem + "_summary"), SUMMARY_COLUMNS, summary)
    return summary


def run(recipe: Path, arguments: Sequence[str], store: Path) -> int:
    """Exit code of `pbkd run` with further arguments; if this process is stopped, so is that one."""
    command = [sys.executable, "-m", "pipelines.cli", "run", str(recipe), *arguments, "--store", str(store)]
    # In a session of its own it does not get a terminal's Ctrl-C: it is told once, from here.
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return STOPPED


def finished_rows(recipe: Recipe, overrides: str, store: Store) -> list[Row]:
    """A line of the CSV for each stage of `recipe` that is finished, in the recipe's order."""
    data = recipe.data.model_copy(update={"download": False})
    graph = build_graph(recipe.model_copy(update={"data": data}), store, store.root / "cache")
    latencies = Latencies(store, recipe.compute)
    rows = []
    for name, manifest in finished(graph, store).items():
        measured = manifest.metrics | latencies.of(manifest)
        rows.append(
            {column: measured.get(column) for column in COLUMNS}
            | {
                "recipe": recipe.name,
                "overrides": overrides,
                "seed": recipe.seed,
                "stage": name,
                "role": graph.role(name),
                "kind": manifest.kind,
                "seconds": round(manifest.seconds, 2),
                "key": manifest.key,
                "digest": manifest.digest,
                "commit": (manifest.git or "")[:12],
                "processor": manifest.machine["processor"],
                "torch": manifest.versions["torch"],
                "date": datetime.fromtimestamp(manifest.created, UTC).date().isoformat(),
            }
        )
    return rows


def write(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Add rows to the CSV; one of the same recipe, overrides, seed and stage is replaced. All rows of it.

    Rows of a file without some of the columns get empty values.
    """
    same = ("recipe", "overrides", "seed", "stage")
    new = {tuple(str(row[name]) for name in same) for row in rows}
    kept = [row for row in _read(path) if tuple(row[name] for name in same) not in new]
    _write(path, COLUMNS, [*kept, *rows])
    return _read(path)


def summarize(rows: Iterable[Row]) -> list[Row]:
    """A row a stage: mean and standard deviation, and how much better the student is, with its interval.

    A difference is taken over the seeds that both have; what needs two of them is left out below.
    """
    accuracy: dict[str, dict[str, float]] = {}  # by stage and seed
    first: dict[str, Row] = {}
    all_of: dict[str, list[Row]] = {}
    for row in rows:
        accuracy.setdefault(row["stage"], {})[row["seed"]] = float(row["test_accuracy"])
        first.setdefault(row["stage"], row)
        all_of.setdefault(row["stage"], []).append(row)
    teacher = next((row for row in first.values() if row["role"] == "teacher"), None)
    student = next((accuracy[name] for name, row in first.items() if row["role"] == "student"), {})
    summary = []
    for name, row in first.items():
        values = accuracy[name]
        line: Row = {"recipe": row["recipe"], "stage": name, "seeds": len(values)}
        line["mean"] = f"{statistics.mean(values.values()):.2f}"
        if len(values) > 1:
            line["sd"] = f"{statistics.stdev(values.values()):.2f}"
        differences = [student[seed] - value for seed, value in values.items() if seed in student]
        if differences and row["role"] in ("teacher", "baseline"):
            line["student_minus"] = f"{statistics.mean(differences):+.2f}"
            if len(differences) > 1:
                line["low"], line["high"] = (f"{end:+.2f}" for end in interval(differences))
        if teacher is not None:
            line |= _ratios(teacher, row)
        for metric in MEANS:
            if all(row.get(metric) for row in all_of[name]):
                line[metric] = f"{statistics.mean(float(row[metric]) for row in all_of[name]):.4g}"
        summary.append(line)
    return summary


def _ratios(teacher: Row, row: Row) -> Row:
    """How many times less than the teacher the stage's network is."""
    parts = (
        ("compression", "params", "nonzero_params"),
        ("macs_ratio", "macs", "macs"),
        ("nonzero_macs_ratio", "macs", "nonzero_macs"),
    )
    return {
        name: f"{float(teacher[whole]) / float(row[left]):.2f}"
        for name, whole, left in parts
        if row.get(left)
    }


def sentence(row: Row) -> str:
    """The row of the summary for a person."""
    text = f"{row['stage']:<24}{row['mean']}"
    if "sd" in row:
        text += f" +- {row['sd']}"
    text += f" ({row['seeds']})"
    if "student_minus" in row:
        text += f"   student {row['student_minus']}"
    if "low" in row:
        text += f", 95 % interval [{row['low']}, {row['high']}]"
    return text


def interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean, by Student's t."""
    mean = statistics.mean(values)
    half = float(student_t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    Folder(path.parent).replace(path.name, text.getvalue().encode())


def _interrupt(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows is the orderly end
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
