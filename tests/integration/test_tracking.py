"""MLflow is a projection of the store: the same however often, wherever and after whatever it is made."""

import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
import numpy as np
import pytest
import torch
from mlflow.models import Model

from pbkd import artifact
from pbkd.networks import fresh
from pipelines.cli import main
from pipelines.lease import try_acquire
from pipelines.reporting.write import leave_report
from pipelines.store import Store
from pipelines.tracking import POLL_SECONDS, Tracker, connect, database_uri, default_uri, read_ids, replay
from tests.integration.mlflow_server import free_port, start_server, stop_server
from tests.integration.recorded_pipeline import (
    PIPELINE,
    STAGES,
    START,
    digest,
    empty_database,
    journal_of,
    keys,
    manifest_of,
    pipeline_record,
    publish,
    record_pipeline,
)
from tests.unit.small_networks import random_norms, small_resnet

OTHER = "f00dfeed0001"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "runs")
    empty_database(store.root / "mlflow" / "mlflow.db")
    return store


def runs_of(uri: str) -> dict[str, Any]:
    """All that a person can see, by run name, without what a new database numbers anew."""
    client = connect(uri)
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    runs: dict[str, Any] = {}
    names = {run.info.run_id: run.info.run_name for run in client.search_runs(ids)}
    models = {model.model_id: model.name for model in client.search_logged_models(ids)}
    assert len(set(names.values())) == len(names), "no run is there twice"
    assert len(set(models.values())) == len(models), "no model is there twice"
    for run in client.search_runs(ids):
        run = client.get_run(run.info.run_id)
        metrics = {
            name: sorted(
                (m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, name)
            )
            for name in run.data.metrics
        }
        runs[run.info.run_name] = {
            "status": run.info.status,
            "times": (run.info.start_time, run.info.end_time),
            "params": run.data.params,
            "metrics": metrics,
            "parent": names.get(run.data.tags.get("mlflow.parentRunId", "")),
            "tags": {tag for tag in run.data.tags if tag.startswith("pbkd.")},
            "roles": (run.data.tags["pbkd.role"], names.get(run.data.tags.get("pbkd.parent_run", ""))),
            "inputs": sorted(models[given.model_id] for given in run.inputs.model_inputs),
            "data": [(d.dataset.name, d.dataset.digest, d.tags[0].value) for d in run.inputs.dataset_inputs],
            "outputs": [models[made.model_id] for made in run.outputs.model_outputs],
        }
    return runs


def versions_of(uri: str) -> dict[str, Any]:
    client = connect(uri)
    found = client.search_model_versions("name = 'digits'")
    champion = client.get_model_version_by_alias("digits", "champion")
    return {
        version.tags["pbkd.stage_key"]: (version.tags, version.version == champion.version)
        for version in found
    }


def test_a_pipeline_becomes_a_parent_run_with_a_run_and_a_model_for_every_stage(store: Store) -> None:
    record_pipeline(store)
    ids = Tracker(default_uri(store), store, PIPELINE).project()
    runs = runs_of(default_uri(store))
    assert set(runs) == {"digits 0a1b2c3d", "teacher", "block1", "small", "scratch"}
    block = runs["block1"]
    assert (block["parent"], block["status"]) == ("digits 0a1b2c3d", "FINISHED")
    assert (
        block["params"] | {"epochs": "2", "optimizer.lr": "0.1", "milestones": "[1,2]", "MACs": "800"}
        == block["params"]
    )
    assert "init" not in block["params"]
    assert block["metrics"]["test_accuracy"] == [(22, int((START + 15) * 1000), 97.9)]
    assert block["metrics"]["train_loss"] == [
        (11, int((START + 11) * 1000), 1),
        (22, int((START + 12) * 1000), 0.5),
    ]
    assert block["metrics"]["latency_ms"] == [(0, int((START + 90) * 1000), 8)]
    assert block["metrics"]["latency_ms_batch32"] == [(0, int((START + 90) * 1000), 80)]
    assert {"agreement", "latency_ms_compiled"}.isdisjoint(block["metrics"])
    assert (block["inputs"], block["outputs"]) == (["teacher"], ["block1"])
    assert block["data"] == [("digits", digest("data")[:36], "training")]
    assert [runs[name]["roles"] for name, *_ in STAGES] == [
        ("teacher", None), ("stage", "teacher"), ("student", "block1"), ("baseline", "small")
    ]  # fmt: skip
    parent = runs["digits 0a1b2c3d"]
    assert parent["metrics"]["test_accuracy"][0][2] == 97.3 and parent["metrics"]["macs_ratio"][0][2] == 5
    assert parent["params"]["student"] == "small" and parent["params"]["MACs"] == "200"
    assert {f"pbkd.stage.{name}" for name, *_ in STAGES} <= parent["tags"]
    assert set(ids["stages"]) == set(keys().values()) and ids == read_ids(store, PIPELINE)


def test_students_and_baselines_are_registered_and_the_best_student_is_the_champion(store: Store) -> None:
    for seed, pipeline_id in ((0, PIPELINE), (1, OTHER)):
        record_pipeline(store, pipeline_id, seed)
        Tracker(default_uri(store), store, pipeline_id).project()
    versions = versions_of(default_uri(store))
    assert len(versions) == 4
    assert [key for key, (_, is_champion) in versions.items() if is_champion] == [keys(1)["small"]]
    tags, _ = versions[keys(1)["scratch"]]
    assert (tags["pbkd.role"], tags["macs"], tags["test_accuracy"]) == ("baseline", "200", "96.2")


def test_a_registered_network_says_what_it_is_and_stands_alone(store: Store, tmp_path: Path) -> None:
    record_pipeline(store)
    network = random_norms(fresh(small_resnet(), 0))
    artifact.save(network, store.artifact(digest("artifact", "small", 0)))
    Tracker(default_uri(store), store, PIPELINE).project()
    client = connect(default_uri(store))
    version = client.get_model_version_by_alias("digits", "champion")
    assert "The student `small` (prune): 97.30 % on the test set" in version.description
    assert "5.00x fewer" in version.description and digest("artifact", "small", 0) in version.description
    folder = unquote(urlsplit(version.source).path)
    model = Model.load(folder)
    assert model.get_input_schema().input_names() == ["images"]
    assert model.metadata["preprocessing"]["mean"] == [0.3053] and model.metadata["classes"][3] == "3"
    pixels = json.loads(Path(folder, "serving_input_example.json").read_text())["inputs"]["images"]
    # It needs nothing of the store.
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    store.root.rename(tmp_path / "hidden")
    said = "".join(path.read_text() for path in moved.iterdir() if path.is_file())
    assert str(tmp_path) not in said
    answer = mlflow.pyfunc.load_model(str(moved)).predict({"images": np.array(pixels, np.uint8)})
    with torch.no_grad():
        images = (torch.tensor(pixels).permute(0, 3, 1, 2) / 255 - 0.3053) / 0.3760
        logits = network.eval()(images).numpy()
    np.testing.assert_allclose(answer["logits"], logits, atol=1e-5)
    assert answer["class"].tolist() == [str(logits.argmax())]
    assert model.get_output_schema().inputs[0].shape == (-1, logits.shape[1])


def test_a_pipelines_run_has_its_latest_report_the_data_and_the_student(store: Store) -> None:
    record_pipeline(store)
    uri, client = default_uri(store), connect(default_uri(store))
    assert replay(uri, store) == [PIPELINE] and replay(uri, store) == []
    for command in ("pbkd run one.yaml", "pbkd run other.yaml"):
        written = leave_report(store, PIPELINE, command)
        assert leave_report(store, PIPELINE, command) == written, "the same again is no new report"
        assert replay(uri, store) == [PIPELINE] and replay(uri, store) == []
        run_id = read_ids(store, PIPELINE)["pipeline_run"]
        assert command in Path(client.download_artifacts(run_id, "report.html")).read_text()
        figures = {file.path for file in client.list_artifacts(run_id, "report_figures")}
        assert figures == {f"report_figures/{path.name}" for path in written.figures}
    run = client.get_run(run_id)
    assert "The student, small, reaches 97.30" in run.data.tags["mlflow.note.content"]
    assert [given.dataset.name for given in run.inputs.dataset_inputs] == ["digits"]
    (student,) = run.outputs.model_outputs
    assert client.get_logged_model(student.model_id).name == "small"
    written.page.unlink()
    assert replay(uri, store) == [], "a report that is gone is no reason to write again"


def test_writing_again_changes_nothing(store: Store) -> None:
    record_pipeline(store)
    Tracker(default_uri(store), store, PIPELINE).project()
    runs, versions = runs_of(default_uri(store)), versions_of(default_uri(store))
    (store.pipeline(PIPELINE) / "tracking.json").unlink()
    Tracker(default_uri(store), store, PIPELINE).project()
    replay(default_uri(store), store)
    assert runs_of(default_uri(store)) == runs and versions_of(default_uri(store)) == versions


def test_a_new_database_is_filled_with_the_same(store: Store, tmp_path: Path) -> None:
    record_pipeline(store)
    Tracker(default_uri(store), store, PIPELINE).project()
    empty = empty_database(tmp_path / "empty.db")
    replay(empty, store)
    assert runs_of(empty) == runs_of(default_uri(store)) and versions_of(empty) == versions_of(
        default_uri(store)
    )


def test_the_command_fills_a_wiped_database_once(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    record_pipeline(store)
    Tracker(default_uri(store), store, PIPELINE).project()
    known = runs_of(default_uri(store))
    empty_database(store.root / "mlflow" / "mlflow.db")
    for written in ([PIPELINE], []):
        assert main(["store", "replay", "--store", str(store.root), "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["pipelines"] == written
        assert runs_of(default_uri(store)) == known
    assert main(["store", "replay", "--store", str(store.root), "--uri", "sqlite:////proc/no/such.db"]) == 1
    assert "cannot be written" in capfd.readouterr().err


class FailingClient:
    """An MLflow that goes away at its n-th call: for odd n before it did what was asked for, else after."""

    def __init__(self, client: Any, calls: int) -> None:
        self.client, self.left, self.is_before = client, calls, calls % 2 == 1

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*args: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left == 0 and self.is_before:
                raise ConnectionError("gone")
            result = method(*args, **options)
            if self.left == 0:
                raise ConnectionError("gone before the answer")
            return result

        return call


def test_a_failure_at_any_call_leaves_nothing_twice_and_nothing_out(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_pipeline(store)
    uri = empty_database(tmp_path / "failing.db")
    failures = 0
    while True:
        monkeypatch.setattr(
            "pipelines.tracking.connect", lambda uri, calls=failures: FailingClient(connect(uri), 4 + calls)
        )
        try:
            Tracker(uri, store, PIPELINE).project()
            break
        except ConnectionError:
            failures += 1
    assert failures > 10
    monkeypatch.undo()
    replay(default_uri(store), store)
    assert runs_of(uri) == runs_of(default_uri(store)) and versions_of(uri) == versions_of(default_uri(store))


@pytest.mark.parametrize("cut", range(1, 19, 6))
def test_a_projection_cut_off_anywhere_and_begun_again_gives_the_same(
    store: Store, tmp_path: Path, cut: int
) -> None:
    record_pipeline(store)
    file = store.root / "pipelines" / PIPELINE / "journal.jsonl"
    whole = file.read_bytes()
    uri = empty_database(tmp_path / "cut.db")
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:cut]) + whole.splitlines()[cut][:9])
    Tracker(uri, store, PIPELINE).project()
    file.write_bytes(whole)
    Tracker(uri, store, PIPELINE).project()
    replay(default_uri(store), store)
    assert runs_of(uri) == runs_of(default_uri(store))


def test_reused_stages_are_linked_and_keep_their_parent(store: Store) -> None:
    record_pipeline(store)
    first = Tracker(default_uri(store), store, PIPELINE).project()
    before = runs_of(default_uri(store))
    record_pipeline(store, OTHER, state="reused")
    second = Tracker(default_uri(store), store, OTHER).project()
    assert second["stages"] == first["stages"]
    after = runs_of(default_uri(store))
    parent = after.pop("digits f00dfeed")
    assert after == before
    assert {f"pbkd.stage.{name}" for name, *_ in STAGES} <= parent["tags"]


def test_reused_stages_are_made_from_manifests_where_mlflow_does_not_know_them(
    store: Store, tmp_path: Path
) -> None:
    record_pipeline(store)
    Tracker(default_uri(store), store, PIPELINE).project()
    record_pipeline(store, OTHER, state="reused")
    empty = empty_database(tmp_path / "empty.db")
    Tracker(empty, store, OTHER).project()
    known, made = runs_of(default_uri(store)), runs_of(empty)
    for name, *_ in STAGES:
        assert (
            made[name]["metrics"] == known[name]["metrics"] and made[name]["params"] == known[name]["params"]
        )
        assert made[name]["times"] == known[name]["times"] and made[name]["inputs"] == known[name]["inputs"]


def test_a_resumed_stage_has_one_value_a_step(store: Store) -> None:
    manifest, journal = manifest_of("teacher"), journal_of(store)
    started = {
        "type": "started",
        "name": "teacher",
        "key": manifest.key,
        "kind": "train",
        "params": {},
        "inputs": [],
    }
    journal.append(pipeline_record())
    journal.append(started)
    journal.append(
        {"type": "progress", "key": manifest.key, "row": {"time": 1.0, "step": 11, "train_loss": 1.0}}
    )
    Tracker(default_uri(store), store, PIPELINE).project()
    journal.append({"type": "ended", "status": "stopped"})
    publish(store, manifest)
    again = journal_of(store, OTHER)
    again.append(pipeline_record(OTHER))
    again.append(started)
    again.append({"type": "progress", "key": manifest.key, "row": manifest.history[0]})
    Tracker(default_uri(store), store, PIPELINE).project()
    assert runs_of(default_uri(store))["teacher"]["status"] == "KILLED"
    Tracker(default_uri(store), store, OTHER).project()
    assert runs_of(default_uri(store))["teacher"]["status"] == "RUNNING"
    again.append({"type": "finished", "name": "teacher", "key": manifest.key, "state": "ran"})
    Tracker(default_uri(store), store, OTHER).project()
    teacher = runs_of(default_uri(store))["teacher"]
    assert [step for step, *_ in teacher["metrics"]["train_loss"]] == [11, 22]
    assert (teacher["status"], teacher["parent"]) == ("FINISHED", "digits 0a1b2c3d")


def test_two_pipelines_begin_with_no_database_at_the_same_time(store: Store) -> None:
    record_pipeline(store)
    record_pipeline(store, OTHER, state="reused")
    (store.root / "mlflow" / "mlflow.db").unlink()
    script = (
        "import pathlib, sys\n"
        "from pipelines.store import Store; from pipelines.tracking import Tracker, default_uri\n"
        "store = Store(pathlib.Path(sys.argv[1])); Tracker(default_uri(store), store, sys.argv[2]).project()"
    )
    command = [sys.executable, "-c", script, str(store.root)]
    processes = [subprocess.Popen([*command, pipeline_id]) for pipeline_id in (PIPELINE, OTHER)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(runs_of(default_uri(store))) == 2 + len(STAGES)


def test_the_background_thread_writes_what_the_driver_appends(store: Store) -> None:
    tracker = Tracker(default_uri(store), store, PIPELINE)
    tracker.start()
    record_pipeline(store)
    assert tracker.close(timeout=60)
    assert len(runs_of(default_uri(store))) == 5


def test_nothing_is_written_while_something_is_timed(store: Store) -> None:
    tracker = Tracker(default_uri(store), store, PIPELINE)
    tracker.start()
    with tracker.resting():
        record_pipeline(store)
        time.sleep(3 * POLL_SECONDS)
        assert read_ids(store, PIPELINE) == {}
    assert tracker.close(timeout=60)
    assert read_ids(store, PIPELINE)


def test_the_environment_names_mlflow_where_the_recipe_does_not(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    record_pipeline(store)
    named = empty_database(tmp_path / "named.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    assert main(["store", "replay", "--store", str(store.root), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["uri"] == default_uri(store) == named
    assert len(runs_of(named)) == 1 + len(STAGES) and not runs_of(database_uri(store))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert default_uri(store) == database_uri(store)


def test_an_unusable_mlflow_is_reported_once_and_stops_nothing(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    record_pipeline(store)
    with caplog.at_level(logging.WARNING, "pipelines.tracking"):
        tracker = Tracker("sqlite:////proc/no/such.db", store, PIPELINE)
        tracker.start()
        assert not tracker.close(timeout=60)
    messages = [record.getMessage() for record in caplog.records if record.name == "pipelines.tracking"]
    assert sum("training goes on" in message for message in messages) == 1
    assert try_acquire(store.storage, keys()["teacher"]) is not None
    Tracker(default_uri(store), store, PIPELINE).project()
    assert len(runs_of(default_uri(store))) == 5


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "server").mkdir()
    return tmp_path / "server"


@pytest.mark.proof  # on every run with the command itself: tests/faults/test_mlflow_faults.py
def test_a_server_killed_in_mid_run_costs_nothing_and_gets_everything_when_it_is_back(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    server = start_server(folder, port)
    try:
        record_pipeline(store)
        file = store.root / "pipelines" / PIPELINE / "journal.jsonl"
        whole = file.read_bytes()
        file.write_bytes(b"".join(whole.splitlines(keepends=True)[:8]))
        Tracker(uri, store, PIPELINE).project()
        tracker = Tracker(uri, store, PIPELINE)
        stop_server(server)
        file.write_bytes(whole)
        tracker.start()
        assert not tracker.close(timeout=30)
        server = start_server(folder, port)
        replay(uri, store)
        replay(default_uri(store), store)
        assert runs_of(uri) == runs_of(default_uri(store))
        assert versions_of(uri) == versions_of(default_uri(store))
    finally:
        stop_server(server)


TRIAL = {"search": "s", "number": 0, "params": {"stages.block1.width": 0.5}}


def test_what_a_trials_stages_measured_on_the_test_set_comes_with_a_pipeline_that_has_them_too(
    store: Store, tmp_path: Path
) -> None:
    record_pipeline(store, "s.0000", trial=TRIAL)
    record_pipeline(store, PIPELINE, state="reused")
    Tracker(default_uri(store), store, "s.0000").project()
    seen = runs_of(default_uri(store))
    for name in ("trial 0", *keys()):
        assert not [metric for metric in seen[name]["metrics"] if metric == "accuracy" or "test" in metric]
    assert seen["small"]["metrics"]["val_accuracy"] and seen["small"]["metrics"]["macs"]
    Tracker(default_uri(store), store, PIPELINE).project()
    other = empty_database(tmp_path / "other.db")
    for pipeline_id in (PIPELINE, "s.0000"):
        Tracker(other, store, pipeline_id).project()
    now, turned = runs_of(default_uri(store)), runs_of(other)
    for name in keys():
        assert now[name]["metrics"] == turned[name]["metrics"]
    assert now["small"]["metrics"]["accuracy"] == now["small"]["metrics"]["test_accuracy"]
