"""Pipelines whose store is a bucket of a real S3 server: shared, killed, gone on with on another machine."""

import json
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from pipelines.recipe_file import load_recipe
from pipelines.store import Store
from pipelines.tracking import connect
from pipelines.ui import pages
from tests.integration.pbkd_process import ROOT, SMALL, SMOKE, digests, pbkd, run, states, until
from tests.integration.recorded_pipeline import empty_database
from tests.integration.s3_server import BUCKET, client, s3_server
from tune_spaces.objective import Objective
from tune_spaces.search import Options, Search, Watch
from tune_spaces.space import open_space
from tune_spaces.subject import Subject

STORE = f"s3://{BUCKET}/runs"
SETTINGS = ["compute.executor=local", "compute.checkpoint_steps=5", "stages.teacher.steps=40"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server(tmp_path_factory.mktemp("cache")) as environment:
        yield environment


class Machine:
    """A machine of its own, as far as a store can tell: nothing that it keeps is another's."""

    def __init__(self, server: dict[str, str], home: Path) -> None:
        self.environment = server | {"XDG_CACHE_HOME": str(home), "HOME": str(home)}

    def open(self, url: str, monkeypatch: pytest.MonkeyPatch) -> Store:
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        store = Store(url)
        empty_database(store.root / "mlflow" / "mlflow.db")  # MLflow would take seconds to make it
        return store


@pytest.fixture(scope="module")
def one(server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(server, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def other(server: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(server, tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow for all machines."""
    return empty_database(tmp_path_factory.mktemp("mlflow") / "mlflow.db")


@pytest.fixture(scope="module")
def reports(one: Machine, other: Machine, mlflow: str) -> list[dict[str, Any]]:
    """What two runs said that were begun at once on two machines, of pipelines that share their stages."""
    arguments = ["run", SMALL, *SETTINGS, f"tracking.uri={mlflow}", "--store", STORE, "--json"]
    outdone = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}  # what was typed comes first
    with (
        pbkd(*arguments, **one.environment, **outdone) as first,
        pbkd(*arguments, "name=other", "baselines=[]", **other.environment) as second,
    ):
        return [first.succeed(), second.succeed()]


def test_two_runs_at_once_on_two_machines_run_each_stage_once(reports: list[dict[str, Any]]) -> None:
    assert digests(reports[0]) == digests(reports[1])
    ran = Counter(name for report in reports for name, state in states(report).items() if state == "ran")
    assert ran == Counter(digests(reports[0]).keys())


def test_in_their_common_mlflow_each_stage_has_one_run(reports: list[dict[str, Any]], mlflow: str) -> None:
    client = connect(mlflow)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.`pbkd.stage_key` != ''", max_results=1000)
    found = Counter(run.data.tags["pbkd.stage_key"] for run in runs)
    assert found == Counter(stage["key"] for stage in reports[0]["stages"])
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_killed_and_gone_on_with_on_another_machine_it_ends_with_the_same_weights(
    reports: list[dict[str, Any]], one: Machine, other: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{BUCKET}/killed"
    arguments = [SMALL, *SETTINGS, "--until", "teacher", "--store", url]
    other.open(url, monkeypatch)
    store = one.open(url, monkeypatch)
    with pbkd("run", *arguments, **one.environment) as command:
        until(lambda: any(store.work(key).names() for key in store.storage.names("work")), "a checkpoint")
        command.signal(signal.SIGKILL)
        until(lambda: not command.processes("pbkd-rank"), "the end of the worker")
    (key,) = store.storage.names("work")
    assert any(name.startswith("step-") for name in store.work(key).names()) and store.keys() == []
    again = run(*arguments, **other.environment)
    assert digests(again)["teacher"] == digests(reports[0])["teacher"]
    assert store.keys() == [key] and store.storage.names("work") == []
    (record,) = (row for row in store.manifests())
    steps = [row["step"] for row in record.history]
    assert steps == sorted(set(steps))


def test_every_command_takes_the_address(
    reports: list[dict[str, Any]],
    server: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """On a machine that never ran anything: all it knows is in the bucket."""
    Machine(server, tmp_path).open(STORE, monkeypatch)
    monkeypatch.setenv("PBKD_STORE", STORE)

    def said(*arguments: object) -> Any:
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    assert {row["state"] for row in said("plan", SMALL, *SETTINGS)["stages"]} == {"done"}
    assert len(said("store", "replay")["pipelines"]) == 2
    artifact = reports[0]["stages"][-1]["artifact"]
    assert artifact.startswith(f"{STORE}/artifacts/")
    chain = said("lineage", artifact)["chain"]
    assert chain[-1]["stage"] == "teacher" and all(row["run_id"] for row in chain)
    page = Path(said("report")["path"])
    assert page.is_relative_to(tmp_path) and STORE in page.read_text("utf-8")
    exported = said("export", artifact, "--out", tmp_path / "export")
    assert exported["max_abs_diff"] <= 1e-4 and exported["compared_on"] == "test images"
    assert said("store", "check", "--full")["damaged"] == 0
    keys = {stage["key"] for stage in reports[0]["stages"]}
    assert {row["path"] for row in said("store", "gc")["unused"]} == {f"{STORE}/leases/{key}" for key in keys}
    assert said("store", "gc", "--apply")["applied"] and said("store", "gc")["unused"] == []


@pytest.mark.proof  # on every run: a bucket without Ray, and Ray without a bucket
def test_on_ray_it_is_the_same(reports: list[dict[str, Any]], one: Machine, tmp_path: Path) -> None:
    url, mlflow = f"s3://{BUCKET}/ray", empty_database(tmp_path / "mlflow.db")
    arguments = [SMALL, *SETTINGS, "compute.executor=ray", f"tracking.uri={mlflow}", "--until", "teacher"]
    report = run(*arguments, "--store", url, **one.environment)
    assert digests(report)["teacher"] == digests(reports[0])["teacher"]
    assert report["stages"][0]["artifact"].startswith(f"{url}/artifacts/")


def test_a_search_has_one_driver_wherever_the_other_one_is_typed(
    one: Machine, other: Machine, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    url, recipe = f"s3://{BUCKET}/searches", ROOT / "pipelines" / "recipes" / "digits.yaml"
    arguments = ["tune", "joint", str(recipe), *SMOKE, "--store", url]
    store = one.open(url, monkeypatch)
    subject = Subject.of(recipe, load_recipe(recipe, [*SMOKE]), store, store.root / "cache")
    options = Options("digits-joint", 16, "tpe", 0, None, False)
    goals = Objective(goals=("accuracy",))
    search = Search(subject, open_space("joint", subject), goals, options, store, Watch())
    with search.driving():
        other.open(url, monkeypatch)
        assert main(arguments) == 2
    assert "search digits-joint is run by another process" in capfd.readouterr().err
    assert not search.record.description
    with search.driving():  # free again
        pass


def test_the_ui_shows_what_other_machines_ran(
    reports: list[dict[str, Any]], server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Machine(server, tmp_path).open(STORE, monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pbkd("ui", "--port", port, "--store", STORE) as command:
        until(lambda: command.has_ended() or answers(port), "the server")
        assert not command.has_ended(), command.wait()
        client = connect(f"http://127.0.0.1:{port}")
        (experiment,) = client.search_experiments(filter_string="name = 'small'")
        runs = client.search_runs([experiment.experiment_id], "tags.`pbkd.role` = 'pipeline'")
        assert [run.data.metrics["accuracy"] for run in runs] == [reports[0]["stages"][-2]["test_accuracy"]]
        command.signal(signal.SIGTERM)
        assert command.wait()[0] == 0
    assert pages(store, "http://there")["compare"].startswith("http://there/#/compare-runs?runs=")


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_no_key_of_the_bucket_is_written_anywhere(
    reports: list[dict[str, Any]], one: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "test-secret"
    assert one.environment["AWS_SECRET_ACCESS_KEY"] == secret
    assert secret not in json.dumps(reports)
    bucket = client(one.environment["AWS_ENDPOINT_URL"])
    pages = bucket.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    keys = [entry["Key"] for page in pages for entry in page["Contents"]]
    assert any(key.endswith("journal.jsonl") for key in keys)
    for key in keys:
        assert secret.encode() not in bucket.get_object(Bucket=BUCKET, Key=key)["Body"].read(), key
    store = one.open(STORE, monkeypatch)
    files = [path for path in store.root.rglob("*") if path.is_file()]
    assert files and all(secret.encode() not in path.read_bytes() for path in files)
