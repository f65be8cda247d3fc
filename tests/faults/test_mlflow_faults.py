"""Training while MLflow's server dies, comes back, or never answers: nothing waits, nothing is lost."""

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from pipelines.store import Store
from pipelines.tracking import default_uri, read_ids, replay
from tests.faults.long_run import LONG, newest
from tests.integration.mlflow_server import free_port, start_server, stop_server
from tests.integration.pbkd_process import LOCAL, SMALL, digests, pbkd, until, with_database
from tests.integration.test_tracking import runs_of

IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "server").mkdir()
    return tmp_path / "server"


def assert_it_has_all(uri: str, store: Store) -> None:
    """What is at `uri` is what a database is filled with from the journals, each record once."""
    replay(default_uri(store), store)
    runs = runs_of(uri)
    assert runs == runs_of(default_uri(store))
    steps = [step for step, *_ in runs["teacher"]["metrics"]["train_loss"]]
    assert len(steps) == len(set(steps)) > 10 and {run["status"] for run in runs.values()} == {"FINISHED"}


def test_a_server_that_is_killed_and_comes_back_in_mid_run_has_all_of_it_at_the_end(
    expected: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    store, port = Store(with_database(tmp_path / "store")), free_port()
    uri = f"http://127.0.0.1:{port}"
    settings = [*LONG, f"tracking.uri={uri}", "--store", store.root, "--json"]
    server = start_server(folder, port)
    try:
        with pbkd("run", SMALL, LOCAL, *settings, **IMPATIENT) as command:
            until(lambda: newest(store.root), "a checkpoint")
            (worker,) = command.processes("pbkd-rank")
            os.kill(worker, signal.SIGSTOP)  # MLflow's server takes longer to start than the training
            until(lambda: any(read_ids(store, name) for name in store.pipelines()), "the first records")
            stop_server(server)
            before = newest(store.root)
            os.kill(worker, signal.SIGCONT)
            until(lambda: newest(store.root) > before, "a checkpoint without the server")
            os.kill(worker, signal.SIGSTOP)
            server = start_server(folder, port)
            os.kill(worker, signal.SIGCONT)
            code, out, err = command.wait()
        assert code == 0 and "does not have all of this run" not in err, err
        assert digests(json.loads(out)) == digests(expected)
        assert_it_has_all(uri, store)
    finally:
        stop_server(server)


def test_a_server_that_accepts_and_never_answers_costs_the_run_nothing(
    expected: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    store = Store(with_database(tmp_path / "store"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        uri = f"http://127.0.0.1:{port}"
        settings = [*LONG, f"tracking.uri={uri}", "--store", store.root, "--json"]
        with pbkd("run", SMALL, LOCAL, *settings, **IMPATIENT) as command:
            code, out, err = command.wait()
        silent.settimeout(1)
        silent.accept()[0].close()  # it was asked
    assert code == 0 and "training goes on" in err and "the next run completes it" in err, err
    assert digests(json.loads(out)) == digests(expected)
    server = start_server(folder, port)
    try:
        replay(uri, store)
        assert_it_has_all(uri, store)
    finally:
        stop_server(server)
