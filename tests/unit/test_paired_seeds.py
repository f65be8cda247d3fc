"""A benchmark's rows are of finished stages, whatever became of the run; its summary is of all sessions."""

import csv
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paired_seeds import COLUMNS, finished_rows, record, summarize, write
from pbkd import artifact
from pbkd.networks import fresh
from pipelines.graph import build_graph
from pipelines.latency import Latencies
from pipelines.recipe_file import load_recipe
from pipelines.store import Store
from tests.unit.test_store import lease_of, manifest_of

SMALL = Path(__file__).parents[1] / "integration" / "small.yaml"
OLD_COLUMNS = COLUMNS[: COLUMNS.index("test_top5")]
METRICS = {"test_accuracy": 97.5, "nll": 0.1, "ece": 1.5, "kl": 0.02, "memory_peak_mb": 520.0}


def row_of(stage: str, role: str, seed: int, accuracy: float) -> dict[str, Any]:
    row = {"recipe": "small", "overrides": "", "seed": seed, "stage": stage, "role": role}
    return row | {"test_accuracy": accuracy}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Of a run that was stopped when two of its stages were finished."""
    store = Store(tmp_path / "runs")
    graph = build_graph(load_recipe(SMALL, ["seed=3"]), store, store.root / "cache")
    for name in ("teacher", "blocks.1"):
        node, folder = graph.nodes[name], store.scratch()
        assert node.spec is not None and node.key is not None
        saved = artifact.save(fresh(node.spec, 0), folder)
        store.add_artifact(folder, saved.digest)
        facts = {"artifact": saved.digest, "kind": node.stage.kind, "machine": {"processor": "a processor"}}
        lease = lease_of(store, node.key)
        store.publish(manifest_of(node.key, metrics=METRICS, **facts), lease)
        lease.release()
    return store


def test_the_finished_stages_of_an_unfinished_run_have_their_rows(store: Store) -> None:
    recipe = load_recipe(SMALL, ["seed=3"])
    teacher, block = finished_rows(recipe, "", store)
    assert tuple(teacher) == COLUMNS
    assert (teacher["stage"], teacher["role"], teacher["kind"]) == ("teacher", "teacher", "train")
    assert (block["stage"], block["role"], block["kind"]) == ("blocks.1", "stage", "block")
    assert {name: block[name] for name in METRICS} == METRICS
    assert block["seed"] == 3 and block["latency_ms"] is None and block["test_top5"] is None
    Latencies(store, recipe.compute).measure(store.manifests())
    assert all(row["latency_ms"] and row["latency_ms_batch32"] for row in finished_rows(recipe, "", store))
    assert finished_rows(load_recipe(SMALL, ["seed=4"]), "", store) == []


def test_a_file_without_the_newer_columns_gets_them_and_equal_rows_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "results" / "small.csv"
    path.parent.mkdir()
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, OLD_COLUMNS)
        writer.writeheader()
        writer.writerows([row_of("teacher", "teacher", seed, 97.0) for seed in (0, 1)])
    rows = write(path, [row_of("teacher", "teacher", 1, 98.0) | {"nll": 0.25}])
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == rows
    assert all(tuple(row) == COLUMNS for row in rows)
    assert [(row["seed"], row["test_accuracy"], row["nll"]) for row in rows] == [
        ("0", "97.0", ""), ("1", "98.0", "0.25")
    ]  # fmt: skip


def test_the_summary_has_size_without_zeros_and_means_of_the_other_metrics(tmp_path: Path) -> None:
    path = tmp_path / "small.csv"
    sizes = {"params": 100, "nonzero_params": 100, "macs": 1000, "nonzero_macs": 1000}
    halved = sizes | {"macs": 500, "nonzero_macs": 250, "nonzero_params": 20}
    for seed, nll in enumerate((0.1, 0.2)):
        student = row_of("student", "student", seed, 97.0) | halved | {"nll": nll}
        write(path, [row_of("teacher", "teacher", seed, 98.0) | sizes, student])
    teacher, student = record(path, "small", "", [])
    assert (teacher["compression"], teacher["macs_ratio"], teacher["nonzero_macs_ratio"]) == ("1.00",) * 3
    assert (student["compression"], student["macs_ratio"], student["nonzero_macs_ratio"]) == (
        "5.00",
        "2.00",
        "4.00",
    )
    assert student["nll"] == "0.15" and "ece" not in student
    with path.with_name("small_summary.csv").open(newline="") as file:
        assert [row["nll"] for row in csv.DictReader(file)] == ["", "0.15"]


def test_the_summary_is_of_all_sessions_and_pairs_what_both_have(tmp_path: Path) -> None:
    path = tmp_path / "small.csv"
    both = {"teacher": ("teacher", (98.0, 98.5, 99.0)), "student": ("student", (97.0, 97.0, 98.5))}
    for seeds in ((0, 1), (2,)):
        for seed in seeds:
            write(path, [row_of(name, role, seed, values[seed]) for name, (role, values) in both.items()])
    rows = write(path, [row_of("scratch", "baseline", 2, 98.0), row_of("late", "stage", 0, 90.0)])
    teacher, student, scratch, late = summarize(rows)
    assert (teacher["seeds"], teacher["mean"], teacher["sd"]) == (3, "98.50", "0.50")
    assert (teacher["student_minus"], teacher["low"], teacher["high"]) == ("-1.00", "-2.24", "+0.24")
    assert student["seeds"] == 3 and "student_minus" not in student
    assert (scratch["seeds"], scratch["mean"], scratch["student_minus"]) == (1, "98.00", "+0.50")
    assert {"sd", "low", "high"}.isdisjoint(scratch.keys() | late.keys())
    assert "student_minus" not in late
