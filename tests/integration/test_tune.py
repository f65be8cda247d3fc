"""`pbkd tune` on real Ray: stages are shared, nothing is lost or done twice, a winner can be made again."""

import csv
import json
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from pipelines.recipe_file import load_recipe
from pipelines.store import Store
from pipelines.tracking import connect, default_uri
from tests.integration.pbkd_process import (
    LOCAL,
    ONE_THREAD,
    ROOT,
    Pbkd,
    call,
    pbkd,
    report_of,
    run_here,
    states,
    until,
    with_database,
)
from tests.integration.pbkd_process import SMOKE as SMALLEST
from tests.integration.ray_cluster import Cluster
from tune_spaces.objective import Objective
from tune_spaces.quiet import Quiet
from tune_spaces.search import Options, Search, Watch, description_of
from tune_spaces.space import open_space
from tune_spaces.subject import Subject

DIGITS = ROOT / "pipelines" / "recipes" / "digits.yaml"
SMOKE = (DIGITS, *SMALLEST, "student=pruned", "data.limit=96")
STAGES = 7  # of its student
TRIALS = 4
LISTED = ("joint", *SMOKE, "--sampler", "fixed", "--trials", TRIALS)


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The report of a joint search that nobody disturbs, and its store."""
    store = with_database(tmp_path_factory.mktemp("store"))
    with pbkd("tune", *LISTED, "--store", store, "--json") as command:
        report = command.succeed()
        until(lambda: not command.processes(), "the end of every process")
    return report, store


def tuned(store: Path, *arguments: object, **environment: str) -> dict[str, Any]:
    with pbkd("tune", *arguments, "--store", store, "--json", **environment) as command:
        return command.succeed()


def repeated(store: Path, *arguments: object) -> dict[str, Any]:
    """What it says of a search that has nothing to do, and so starts no Ray."""
    return report_of("tune", *arguments, "--store", store)


def refused(store: Path, *arguments: object, cluster: Cluster | None = None) -> str:
    """What it says of a mistake, before it would start Ray, or on a cluster."""
    typed = ("tune", *arguments, "--store", store)
    if cluster is None:
        code, out, err = call(*typed)
    else:
        with pbkd(*typed, **cluster.for_runs()) as command:
            code, out, err = command.wait()
    assert (code, out) == (2, "") and len(err.strip().splitlines()) <= 3, err
    return err


def final_table(report: dict[str, Any]) -> list[tuple[object, ...]]:
    names = ("number", "params", "outcome", "val_accuracy", "macs", "digest")
    return [tuple(trial[name] for name in names) for trial in report["trials"]]


def records(store: Path, search: str, kind: str) -> list[dict[str, Any]]:
    path = store / "searches" / search / "journal.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["type"] == kind]


def finished(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [trial for trial in report["trials"] if trial["outcome"] == "finished"]


def test_trials_run_each_different_stage_once(joint: tuple[dict[str, Any], Path]) -> None:
    report, store = joint
    assert len(finished(report)) == TRIALS
    assert report["stages_run"] == report["stages_distinct"] < report["stages_requested"]
    assert report["stages_distinct"] == len(list((store / "manifests").iterdir()))


def test_the_search_wrote_its_table_figures_and_recipes(joint: tuple[dict[str, Any], Path]) -> None:
    report, _ = joint
    assert report["winners"] and set(report["files"]) == {"trials", "pareto"}  # too few to tell importance
    for path in [*report["files"].values(), *(winner["recipe"] for winner in report["winners"])]:
        assert Path(path).stat().st_size > 0
    with Path(report["files"]["trials"]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["trials"])
    tested = {int(row["number"]) for row in rows if row["test_accuracy"]}
    assert tested == {winner["number"] for winner in report["winners"]}  # only they see the test set


def test_a_winners_recipe_makes_the_same_weights_again(
    joint: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    report, store = joint
    winner = report["winners"][0]
    again = run_here(winner["recipe"], "--store", store)
    assert set(states(again).values()) == {"reused"}
    anew = run_here(winner["recipe"], LOCAL, "--store", with_database(tmp_path / "empty"))
    assert set(states(anew).values()) == {"ran"}
    assert again["stages"][-1]["digest"] == anew["stages"][-1]["digest"] == winner["digest"]


def test_in_mlflow_trials_are_below_their_search_with_the_searched_keys_and_without_test_accuracy(
    joint: tuple[dict[str, Any], Path],
) -> None:
    report, store = joint
    client = connect(f"sqlite:///{store / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    mine = "tags.`pbkd.search` = 'digits-joint' AND tags.`pbkd.role` = "
    (search,) = client.search_runs([experiment.experiment_id], f"{mine}'search'")
    trials = client.search_runs([experiment.experiment_id], f"{mine}'trial'")
    logged = {file.path for file in client.list_artifacts(search.info.run_id)}
    assert logged == {"report.html", "report_figures", "trials.csv", "pareto.png"}
    assert search.data.tags["mlflow.note.content"].startswith(f"{TRIALS} of ")
    assert {search.info.status, *(trial.info.status for trial in trials)} == {"FINISHED"}
    assert {trial.data.tags["mlflow.parentRunId"] for trial in trials} == {search.info.run_id}
    shown = {trial.info.run_name: trial for trial in trials}
    for told in finished(report):
        trial = shown[f"trial {told['number']}"]
        assert {key: json.loads(trial.data.params[key]) for key in told["params"]} == told["params"]
        assert trial.data.metrics["val_accuracy"] == told["val_accuracy"]
        assert not any("test" in name for name in trial.data.metrics)
        linked = {tag: value for tag, value in trial.data.tags.items() if tag.startswith("pbkd.stage.")}
        assert linked["pbkd.stage.teacher"] and len(linked) == STAGES
    assert len({trial.data.tags["pbkd.stage.teacher"] for trial in trials}) == 1
    assert any(tag.endswith("pbkd-search-digits-joint") for tag in experiment.tags)


NAMED = [
    ("stabilization_lengths", ("--objective", "accuracy,latency", "--sampler", "nsga2")),
    pytest.param("student_widths", (), marks=pytest.mark.proof),
    pytest.param("pruning_ratios", ("--objective", "accuracy"), marks=pytest.mark.proof),
]


@pytest.mark.parametrize(("space", "options"), NAMED)
def test_every_named_search_runs_and_shares_with_those_before(
    space: str, options: tuple[str, ...], joint: tuple[dict[str, Any], Path], ray_cluster: Cluster
) -> None:
    _, store = joint
    report = tuned(store, space, *SMOKE, "--trials", 2, *options, **ray_cluster.for_runs())
    assert len(finished(report)) == 2 and report["winners"]
    assert report["stages_run"] < report["stages_distinct"]
    has_latency = {trial["latency_ms"] is not None for trial in finished(report)}
    assert has_latency == {"accuracy,latency" in options}
    assert all(winner["latency_ms"] > 0 for winner in report["winners"])


def waits_for(path: Path) -> bool:
    """Whether somebody waits for the lock on a file."""
    lines = Path("/proc/locks").read_text().splitlines()
    return path.exists() and any("->" in line and f":{path.stat().st_ino} " in line for line in lines)


def room_of(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock of the room that searches share, which is one of its own for the rest of a test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "pbkd" / f".{name}-{socket.gethostname()}"


EPOCHS = 4
SHORT = ("student=distilled", "stages.teacher.epochs=2", f"stages.distilled.epochs={EPOCHS}")
SHORT = (*SHORT, ONE_THREAD, "data.limit=500", "stages.blocks.epochs=0", "stages.stabilized.epochs=0")


def test_trials_wait_while_another_search_measures_and_are_stopped_in_mid_stage_if_they_fall_behind(
    joint: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turnstile = room_of(tmp_path, "turnstile", monkeypatch)
    _, store = joint
    space = tmp_path / "rates.yaml"
    space.write_text("stages.distilled.optimizer.lr: [0.1, 0.03, 0.01, 1.0e-5, 1.0e-6, 1.0e-7]")
    early = (space, DIGITS, *SHORT, "--sampler", "fixed", "--trials", 6, "--max-concurrent", 1)
    early = (*early, "--objective", "accuracy", "--early-stop", "--name", "early")
    with pbkd("tune", *early, "--store", store, "--json") as command:
        with Quiet().alone():
            until(lambda: waits_for(turnstile), "a trial that wants to train")
        report = command.succeed()
    stopped = [trial["number"] for trial in report["trials"] if trial["outcome"] == "stopped"]
    assert stopped and len(finished(report)) + len(stopped) == 6
    reports = records(store, "early", "report")
    for number in range(6):
        progress = [record["progress"] for record in reports if record["number"] == number]
        assert progress == [float(epoch) for epoch in range(1, len(progress) + 1)]
        assert (len(progress) < EPOCHS - 1) == (number in stopped)
    client = connect(f"sqlite:///{store / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.`pbkd.search` = 'early'")
    marked = {run.info.run_name for run in runs if run.data.tags.get("pbkd.outcome") == "stopped"}
    assert marked == {f"trial {number}" for number in stopped}
    assert {run.info.status for run in runs if run.info.run_name in marked} == {"KILLED"}
    assert not [run for run in runs if run.info.status == "RUNNING"]
    assert repeated(store, *early)["trials"] == report["trials"]


def test_a_report_says_what_the_search_said_and_runs_nothing(joint: tuple[dict[str, Any], Path]) -> None:
    report, store = joint
    before = (store / "searches" / "digits-joint" / "trials.csv").read_text()
    assert repeated(store, *LISTED, "--report") == report
    assert (store / "searches" / "digits-joint" / "trials.csv").read_text() == before
    said = refused(store, *LISTED, "--name", "unheard", "--report")
    assert "search unheard: not in" in said and "leave out --report to run it" in said
    assert not (store / "searches" / "unheard" / "journal.jsonl").exists()


def test_while_something_is_measured_no_driver_of_a_search_writes_to_mlflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = room_of(tmp_path / "cache", "room", monkeypatch)
    store = Store(with_database(tmp_path / "store"))
    subject = Subject.of(DIGITS, load_recipe(DIGITS, ["smoke=true"]), store, store.root / "cache")
    space, goals = open_space("joint", subject), Objective(goals=("accuracy",))
    options = Options("digits-joint", 1, "fixed", 0, None, False)
    search = Search(subject, space, goals, options, store, Watch())
    search.record.begin(description_of(subject, space, goals, options))
    client = connect(default_uri(store))
    writing = threading.Thread(target=search.record_report)
    with Quiet().alone():
        writing.start()
        until(lambda: waits_for(room) or not writing.is_alive(), "the driver to wait")
        assert writing.is_alive(), "it has written"
        assert client.get_experiment_by_name("digits") is None
    writing.join()
    assert client.get_experiment_by_name("digits") is not None


# Bad input


def test_a_search_is_not_gone_on_with_if_it_changed(joint: tuple[dict[str, Any], Path]) -> None:
    _, store = joint
    said = refused(store, *LISTED, "seed=1")
    assert "search digits-joint was begun differently: recipe.seed was" in said and "--name" in said
    assert "parameters.stages" in refused(store, "pruning_ratios", *LISTED[1:], "--name", "digits-joint")


def test_more_trials_at_once_than_there_is_room_for_are_refused(
    joint: tuple[dict[str, Any], Path], ray_cluster: Cluster
) -> None:
    wide = (*LISTED, "--name", "wide", "--max-concurrent", 1000)
    said = refused(joint[1], *wide, cluster=ray_cluster)
    assert "each trial needs 1 CPU" in said and "room for" in said


def test_a_limit_that_no_trial_keeps_is_told_with_the_nearest_and_can_be_mended(
    joint: tuple[dict[str, Any], Path], ray_cluster: Cluster
) -> None:
    store = joint[1]
    limited = ("pruning_ratios", *SMOKE, "compute.workers=2", "--name", "limited", "--trials", 1)
    said = refused(store, *limited, "--max-macs", 0.01, cluster=ray_cluster)
    assert "the nearest of" in said and "times the limit" in said and "stages.pruned.macs=" in said
    (trial,) = finished(tuned(store, *limited, "--max-macs", 0.9, **ray_cluster.for_runs()))
    (student,) = (row for row in Store(store).manifests() if row.digest == trial["digest"])
    assert student.compute["world_size"] == 2


# Whoever is killed


def test_a_stopped_search_keeps_its_state_and_leaves_no_process_and_no_lease(tmp_path: Path) -> None:
    long = (
        "stabilization_lengths",
        DIGITS,
        "stages.teacher.epochs=100000",
        "compute.checkpoint_seconds=1000",
        ONE_THREAD,
    )
    with pbkd("tune", *long, "--store", with_database(tmp_path)) as command:
        until(lambda: any(tmp_path.glob("work/*/progress.jsonl")), "an epoch")
        command.signal(signal.SIGTERM)
        code, out, err = command.wait()
        assert (code, out) == (128 + signal.SIGTERM, "") and "the same command goes on" in err
        until(lambda: not command.processes(), "the end of every process")
    assert any(tmp_path.glob("work/*/step-*"))
    leases = [json.loads(path.read_text()) for path in tmp_path.glob("leases/*/*.json")]
    assert leases and all(lease["released"] for lease in leases)
    assert records(tmp_path, "digits-stabilization_lengths", "ended")[-1]["status"] == "stopped"


def kill(command: Pbkd, words: str, number: int = signal.SIGKILL) -> None:
    until(lambda: command.processes(words), words)
    os.kill(command.processes(words)[0], number)


@pytest.mark.parametrize("sampler", [pytest.param("fixed", marks=pytest.mark.proof), "tpe"])
def test_a_search_whose_driver_and_trial_were_killed_loses_and_repeats_nothing(
    sampler: str, joint: tuple[dict[str, Any], Path], ray_cluster: Cluster, tmp_path: Path
) -> None:
    store = with_database(tmp_path)
    arguments = ("joint", *SMOKE, "--sampler", sampler, "--trials", TRIALS)
    with pbkd("tune", *arguments, "--store", store) as command:
        until(lambda: any((store / "manifests").glob("*.json")), "a finished stage")
        if sampler == "tpe":
            kill(command, "ray::ImplicitFunc")  # Ray starts it again
        until(lambda: records(store, "digits-joint", "result"), "a finished trial")
        command.signal(signal.SIGKILL)
        until(lambda: not command.processes("ray::ImplicitFunc"), "the end of its trials")
    before = {path.name: path.stat().st_mtime_ns for path in (store / "manifests").glob("*.json")}
    drawn = {record["number"]: record["params"] for record in records(store, "digits-joint", "trial")}
    results = records(store, "digits-joint", "result")
    report = tuned(store, *arguments, **ray_cluster.for_runs())
    assert len(finished(report)) == TRIALS
    table = {trial["number"]: trial["params"] for trial in report["trials"]}
    assert {number: table[number] for number in drawn} == drawn
    assert records(store, "digits-joint", "result")[: len(results)] == results
    assert before == {name: (store / "manifests" / name).stat().st_mtime_ns for name in before}
    for trial in report["trials"]:
        journal = store / "pipelines" / f"digits-joint.{trial['number']:04d}" / "journal.jsonl"
        assert trial["stages_run"] == len(ran(journal))
    begun = [key for path in store.glob("pipelines/*/journal.jsonl") for key in started(path)]
    assert {key for key in begun if begun.count(key) > 1}.isdisjoint(
        name.removesuffix(".json") for name in before
    )
    if sampler == "fixed":
        assert final_table(report) == final_table(joint[0])


def lines(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()]


def started(journal: Path) -> list[str]:
    return [record["key"] for record in lines(journal) if record["type"] == "started"]


def ran(journal: Path) -> set[str]:
    """Keys of the stages that one attempt or another has run."""
    return {record["key"] for record in lines(journal) if record.get("state") == "ran"}
