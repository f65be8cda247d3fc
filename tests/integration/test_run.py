"""A run, on Ray and on this machine alone: the same results, whoever is killed; and nothing left behind."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.integration.pbkd_process import (
    LOCAL,
    RAY,
    SMALL,
    digests,
    pbkd,
    run,
    run_here,
    states,
    until,
    with_database,
)
from tests.integration.ray_cluster import Cluster

AGENT = "Agent"  # ray::DashboardAgent, ray::RuntimeEnvAgent
TEACHER_STEPS = 80


def recipe_of(folder: Path, **steps: int) -> Path:
    """The small recipe with these stages alone, of so many steps."""
    recipe = OmegaConf.load(SMALL)
    recipe.stages = {name: recipe.stages[name] for name in steps}
    for name, count in steps.items():
        recipe.stages[name].steps = count
    recipe.student, recipe.baselines = list(steps)[-1], []
    OmegaConf.save(recipe, folder / "recipe.yaml")
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages that are long enough to be killed in the middle."""
    return recipe_of(tmp_path_factory.mktemp("recipe"), teacher=TEACHER_STEPS, recovered=120)


@pytest.fixture(scope="module")
def undisturbed_long(long: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_here(long, LOCAL, "--store", with_database(tmp_path_factory.mktemp("undisturbed")))


@pytest.fixture(scope="module")
def without_baseline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small recipe without its baseline: one job, each of which costs Ray half a dozen processes."""
    recipe = OmegaConf.load(SMALL)
    del recipe.stages["scratch"]
    recipe.baselines = []
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    OmegaConf.save(recipe, path)
    return path


@pytest.fixture(scope="module")
def on_ray(
    without_baseline: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[dict[str, Any], Path, str, Path]]:
    store, home = tmp_path_factory.mktemp("ray"), tmp_path_factory.mktemp("home")
    with pbkd("run", without_baseline, RAY, "--store", store, "--json", HOME=str(home)) as command:
        code, out, err = command.wait()
        assert code == 0, err
        until(lambda: not command.processes(), "the end of every process")
        yield json.loads(out), store, err, home


def has_checkpoint(store: Path) -> bool:
    return any(store.glob("work/*/step-*"))


def leases(store: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in store.glob("leases/*/*.json")]


def journal(store: Path) -> list[dict[str, Any]]:
    (path,) = store.glob("pipelines/*/journal.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ray_and_this_machine_give_the_same_weights(
    reference: dict[str, Any], on_ray: tuple[dict[str, Any], Path, str, Path]
) -> None:
    report = on_ray[0]
    assert digests(report) == {
        name: digest for name, digest in digests(reference).items() if name != "scratch"
    }
    assert set(states(report).values()) == {"ran"}


@pytest.mark.proof  # on every run without the baseline, which Ray runs as a job of its own
def test_with_its_baseline_too(reference: dict[str, Any], tmp_path: Path) -> None:
    report = run(SMALL, RAY, "--store", with_database(tmp_path))
    assert digests(report) == digests(reference)


def test_another_seed_gives_other_weights(reference: dict[str, Any], tmp_path: Path) -> None:
    other = run_here(recipe_of(tmp_path, teacher=12), LOCAL, "seed=1", "--store", with_database(tmp_path))
    same = run_here(recipe_of(tmp_path, teacher=12), LOCAL, "--store", tmp_path)
    assert digests(same)["teacher"] == digests(reference)["teacher"] != digests(other)["teacher"]


def test_a_good_run_says_a_line_for_each_stage_and_leaves_nothing_in_the_home(
    on_ray: tuple[dict[str, Any], Path, str, Path],
) -> None:
    report, _, err, home = on_ray
    # A slow stage says its steps too.
    ended = [line.split()[0] for line in err.splitlines() if " step " not in line]
    assert sorted(ended) == sorted(states(report))
    assert list(home.iterdir()) == []


def test_the_token_of_the_cluster_is_in_no_record_and_no_log(
    on_ray: tuple[dict[str, Any], Path, str, Path],
) -> None:
    report, store, err, _ = on_ray
    token = (store / "ray-token").read_bytes()
    assert len(token) == 64
    assert token.decode() not in json.dumps(report) + err
    holding = [path.name for path in store.rglob("*") if path.is_file() and token in path.read_bytes()]
    assert holding == ["ray-token"]


def test_the_journal_tells_all_that_happened_in_order(on_ray: tuple[dict[str, Any], Path, str, Path]) -> None:
    report, store, _, _ = on_ray
    records = journal(store)
    assert (records[0]["type"], records[-1]["type"]) == ("pipeline", "ended")
    assert records[-1]["status"] == "finished"
    for name in states(report):
        kinds = [record["type"] for record in records if record.get("name") == name]
        assert kinds == ["started", "finished"], name
    measured = {record["key"] for record in records if record["type"] == "latency"}
    assert measured == {stage["key"] for stage in report["stages"]}


def test_a_finished_pipeline_run_again_starts_no_ray_and_records_nothing(
    without_baseline: Path,
    on_ray: tuple[dict[str, Any], Path, str, Path],
) -> None:
    report, store, _, _ = on_ray
    before = journal(store)
    again = run(
        without_baseline, RAY, "--store", store, RAY_ADDRESS="127.0.0.1:1"
    )  # where no cluster could be joined
    assert set(states(again).values()) == {"reused"}
    assert digests(again) == digests(report)
    assert [stage["run_id"] for stage in again["stages"]] == [stage["run_id"] for stage in report["stages"]]
    assert journal(store) == before


def test_what_a_run_did_can_be_planned_from_its_own_record(
    on_ray: tuple[dict[str, Any], Path, str, Path],
) -> None:
    report, store, _, _ = on_ray
    (recorded,) = store.glob("pipelines/*/recipe.yaml")
    with pbkd("plan", recorded, "--store", store, "--json") as command:
        planned = command.succeed()
    assert {stage["key"]: stage["state"] for stage in planned["stages"]} == {
        stage["key"]: "done" for stage in report["stages"]
    }


def test_a_lost_mlflow_is_completed_by_typing_the_command_again(
    without_baseline: Path,
    on_ray: tuple[dict[str, Any], Path, str, Path],
) -> None:
    report, store, _, _ = on_ray
    (store / "mlflow" / "mlflow.db").unlink()
    again = run(without_baseline, RAY, "--store", store)
    assert all(stage["run_id"] for stage in again["stages"])
    with pbkd("lineage", again["stages"][-1]["run_id"], "--store", store, "--json") as command:
        chain = command.succeed()["chain"]
    assert [row["run_id"] for row in chain if row["stage"] == "teacher"] == [again["stages"][0]["run_id"]]
    assert {stage["run_id"] for stage in again["stages"]}.isdisjoint(
        stage["run_id"] for stage in report["stages"]
    )


STOPS = [
    (RAY, signal.SIGTERM),
    (LOCAL, signal.SIGINT),
    (LOCAL, signal.SIGTERM),
    pytest.param(LOCAL, signal.SIGUSR2, marks=pytest.mark.proof),  # tests/slurm: from Slurm, on every run
]


@pytest.mark.parametrize(("executor", "number"), STOPS)
def test_a_stopped_run_keeps_its_state_leaves_no_process_and_no_lease_and_says_how_to_go_on(
    executor: str, number: signal.Signals, tmp_path: Path
) -> None:
    with_database(tmp_path)
    settings = ["stages.teacher.steps=100000", "compute.checkpoint_seconds=1000"]
    with pbkd("run", SMALL, executor, *settings, "--store", tmp_path) as command:
        until(lambda: any(tmp_path.glob("work/*/progress.jsonl")), "an epoch")
        assert not has_checkpoint(tmp_path)
        command.signal(number, group=executor == LOCAL)  # as Ctrl-C in a terminal
        code, out, err = command.wait()
        assert (code, out, err) == (128 + number, "", "stopped; the same command goes on from here\n")
        until(lambda: not command.processes(), "the end of every process")
    assert has_checkpoint(tmp_path)
    assert [lease["released"] for lease in leases(tmp_path)] == [True] * len(leases(tmp_path)) != []
    assert journal(tmp_path)[-1]["status"] == "stopped"


def test_a_killed_ray_worker_is_replaced_and_the_weights_are_the_same(
    undisturbed_long: dict[str, Any], ray_cluster: Cluster, tmp_path: Path
) -> None:
    recipe, store = recipe_of(tmp_path, teacher=TEACHER_STEPS), with_database(tmp_path)
    arguments = [recipe, RAY, "compute.fuse=false", "--store", store, "--json"]
    with pbkd("run", *arguments, **ray_cluster.for_runs()) as command:
        until(lambda: has_checkpoint(store), "a checkpoint")
        (worker,) = ray_cluster.processes("ray::RayTrainWorker")
        os.kill(worker, signal.SIGKILL)
        report = command.succeed()
    assert digests(report)["teacher"] == digests(undisturbed_long)["teacher"]


@pytest.mark.proof  # on every run: killed drivers of tests/faults, and one on Ray that is stopped
@pytest.mark.parametrize("executor", [RAY, LOCAL])
def test_a_killed_driver_takes_its_processes_along_and_the_next_goes_on(
    executor: str, long: Path, undisturbed_long: dict[str, Any], tmp_path: Path
) -> None:
    with_database(tmp_path)
    with pbkd("run", long, executor, "--store", tmp_path) as command:
        until(lambda: any(tmp_path.glob("manifests/*.json")), "the first finished stage")
        until(lambda: has_checkpoint(tmp_path), "a checkpoint of the second")
        command.signal(signal.SIGKILL)
        # Of Ray's agents some notice only after a minute that its daemons are gone.
        until(lambda: set(command.processes()) <= set(command.processes(AGENT)), "the end of every process")
    again = run_here(long, LOCAL, "--store", tmp_path)
    assert states(again) == {"teacher": "reused", "recovered": "ran"}
    assert digests(again) == digests(undisturbed_long)


def test_two_workers_give_the_same_weights_on_ray_and_on_this_machine(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    arguments = [recipe_of(tmp_path, teacher=4, recovered=4), "compute.workers=2"]
    local = run_here(*arguments, LOCAL, "--store", with_database(tmp_path / "local"))
    store = with_database(tmp_path / "ray")
    ray = run(*arguments, RAY, "--store", store, **ray_cluster.for_runs())
    assert digests(local) == digests(ray)
