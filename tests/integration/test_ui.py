"""`pbkd ui`: a server on the store, addresses worth opening, and nothing left behind."""

import json
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pbkd.errors import UserError
from pipelines.store import Store
from pipelines.tracking import default_uri
from pipelines.ui import serve
from tests.integration.recorded_pipeline import STAGES, record_pipeline

SERVE = """
import pathlib, sys
from pipelines.store import Store
from pipelines.tracking import default_uri
from pipelines.ui import serve
store = Store(pathlib.Path(sys.argv[1]))
serve(store, default_uri(store), int(sys.argv[2]), lambda line: print(line, flush=True))
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "runs")
    record_pipeline(store)
    return store


def ask(server: str, path: str, **fields: Any) -> Any:
    request = urllib.request.Request(f"{server}/api/2.0/mlflow/{path}")
    if fields:
        request = urllib.request.Request(
            request.full_url, json.dumps(fields).encode(), {"Content-Type": "application/json"}
        )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_a_taken_port_is_a_users_mistake(store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port + 1}"):
            serve(store, default_uri(store), port)


def test_it_serves_what_the_store_holds_until_it_is_terminated(store: Store) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(store.root), str(port)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        lines = dict(
            line.strip().split(": ", 1) for line in iter(process.stdout.readline, "Ctrl-C ends the server\n")
        )
        server = f"http://127.0.0.1:{port}"
        assert all(url.startswith(server) for url in lines.values()) and len(lines) == 5
        query = urllib.parse.parse_qs(lines["compare the stages and baselines"].partition("?")[2])
        names = {
            ask(server, f"runs/get?run_id={run_id}")["run"]["info"]["run_name"]
            for run_id in json.loads(query["runs"][0])
        }
        assert names == {name for name, *_ in STAGES}
        experiment = ask(server, "experiments/search", max_results=9)["experiments"][0]
        view = urllib.parse.parse_qs(lines["runs"].partition("?")[2])["viewStateShareKey"][0]
        assert f"mlflow.sharedViewState.{view}" in [tag["key"] for tag in experiment["tags"]]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server ended with the command"
