"""A lean MLflow server on the store's database, and the addresses of its pages that are worth opening."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pbkd.errors import StageError, UserError
from pipelines.reporting.facts import gather
from pipelines.store import Store
from pipelines.tracking import read_ids, replay
from pipelines.views import compare_url, run_url, view_url

HOST = "127.0.0.1"
START_SECONDS = 120.0


def pages(store: Store, server: str) -> dict[str, str]:
    """Return the pages of the latest pipeline in MLflow: `table` and `charts` of runs, `compare`, `report`.

    `server` is the address of the MLflow server. Empty if no pipeline of the store is in MLflow.
    """
    for pipeline_id in store.pipelines():
        ids = read_ids(store, pipeline_id)
        if ids.get("experiment_id"):
            runs = [ids["stages"][key]["run_id"] for key in _keys(store, pipeline_id) if key in ids["stages"]]
            return {
                "table": view_url(server, ids["experiment_id"], charts=False),
                "charts": view_url(server, ids["experiment_id"], charts=True),
                "compare": compare_url(server, ids["experiment_id"], runs),
                "report": run_url(server, ids["experiment_id"], ids["pipeline_run"]),
            }
    return {}


def _keys(store: Store, pipeline_id: str) -> list[str]:
    """The stages of a pipeline in the order in which they are worth comparing."""
    stages = gather(store, pipeline_id).stages.values()
    ranks = {"teacher": 0, "student": 1, "baseline": 2, "stage": 3}
    ordered = sorted(stages, key=lambda stage: ranks[stage.role])
    return list(dict.fromkeys(stage.key for stage in ordered if stage.key is not None))


def serve(store: Store, uri: str, port: int = 5000, show: Callable[[str], None] = print) -> None:
    """Serve the MLflow UI of `uri` on this machine until Ctrl-C or SIGTERM; `show` gets what the user reads.

    What MLflow lacks of the store's pipelines is written first. If `uri` is a server already, only its pages
    are shown. Raises UserError if the port is taken, StageError if the server does not start.
    """
    if uri.startswith(("http://", "https://")):
        replay(uri, store)
        _show_pages(store, uri.rstrip("/"), show)
        return
    _refuse_taken(port)
    replay(uri, store)
    address = f"http://{HOST}:{port}"
    log_path = store.root / "mlflow" / "server.log"
    with _stopping_on_sigterm(), log_path.open("wb") as log:
        server = subprocess.Popen(
            _command(store, uri, port),
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # saves four processes and 20 s
            cwd=store.root / "mlflow",
            stdout=log,
            stderr=log,
            start_new_session=True,  # its worker joins the same group, and both are ended by its number
        )
        try:
            _await(server, address, log_path)
            _show_pages(store, address, show)
            show("Ctrl-C ends the server")
            if server.wait():
                raise StageError(f"the MLflow server ended with code {server.returncode}: see {log_path}")
        except KeyboardInterrupt:
            show("the MLflow server is ended")
        finally:
            _end(server)


def _command(store: Store, uri: str, port: int) -> list[str]:
    artifacts = str(store.root / "mlflow" / "artifacts")
    options = ["--host", HOST, "--port", str(port), "--workers", "1"]
    options += ["--backend-store-uri", uri, "--artifacts-destination", artifacts]
    return [sys.executable, "-m", "mlflow", "server", *options]


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port just left by a server is free
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"port {port} on {HOST} cannot be used: {error}\n"
                f"choose another: --port {port + 1 if 0 < port < 65535 else 5001}"
            ) from error


def _await(server: "subprocess.Popen[bytes]", address: str, log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)  # it offers nothing to wait on
    raise StageError(f"the MLflow server did not start: see {log_path}")


def _show_pages(store: Store, address: str, show: Callable[[str], None]) -> None:
    titles = {
        "table": "runs",
        "charts": "accuracy against MACs",
        "compare": "compare the stages and baselines",
        "report": "the pipeline, its report and figures",
    }
    for page, url in pages(store, address).items():
        show(f"{titles[page]}: {url}")
    show(f"all of MLflow: {address}")


def _end(server: "subprocess.Popen[bytes]") -> None:
    for end in (signal.SIGTERM, signal.SIGKILL):
        if server.poll() is None:
            os.killpg(server.pid, end)
            try:
                server.wait(timeout=10)
            except subprocess.TimeoutExpired:
                continue
    server.wait()


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C. Only the main thread can: in another one the caller sees to it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
