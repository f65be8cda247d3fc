"""`ray job submit` on a cluster that `ray start` has made: submit, follow, stop, submit again; tokens."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from benchmarks.faults import LOG_STEPS
from benchmarks.injected import injected
from benchmarks.marked_processes import MARK, marked_processes
from tests.integration.pbkd_process import ROOT, SECONDS, SMALL, until, with_database

STEPS = 300
TRAINING = [
    str(SMALL),
    f"stages.teacher.steps={STEPS}",
    "compute.checkpoint_seconds=60",
    "--until",
    "teacher",
]
BIN = Path(sys.executable).parent


class Cluster:
    """A Ray cluster of one node on loopback that answers only to its token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mark = uuid.uuid4().hex
        (folder / "token").write_text("5" * 64)
        self._home = tempfile.TemporaryDirectory(prefix="pbkd-", dir="/tmp")  # a short name, for sockets
        port, self.dashboard = _free_ports(2)
        self._process = subprocess.Popen(
            [
                BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
                "--num-cpus=2", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
                f"--dashboard-port={self.dashboard}", "--dashboard-agent-listen-port=0",
                f"--temp-dir={self._home.name}", "--min-worker-port=0", "--max-worker-port=0",
            ],
            env=self.environment() | {
                MARK: self._mark,
                "PBKD_FAULTS_LOG": str(folder / "steps"),
                **injected(LOG_STEPS, folder / "hook"),
            },
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def environment(self, token: str = "token") -> dict[str, str]:
        """What `ray` needs to reach it, with the token of that file."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PBKD_"))}
        return kept | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / token),
            "RAY_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }

    def ray(self, *words: str, token: str = "token") -> subprocess.CompletedProcess[str]:
        """What `ray job WORDS` says, typed in the checkout."""
        return subprocess.run(
            [BIN / "ray", "job", *words],
            cwd=ROOT, env=self.environment(token), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=SECONDS, check=False,
        )  # fmt: skip

    def steps(self) -> list[str]:
        """Every step that a worker has taken."""
        log = self.folder / "steps"
        return [line.partition(" ")[2] for line in log.read_text().splitlines()] if log.exists() else []

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        until(self._is_over, "the cluster's processes to end")  # they write below its folder until then
        self._home.cleanup()

    def _is_over(self) -> bool:
        left = marked_processes(self._mark)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        return not left


def _free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        until(lambda: started.ray("list").returncode == 0, "the cluster to answer")
        yield started
    finally:
        started.end()


def submit(cluster: Cluster, store: Path | None, *words: str) -> subprocess.CompletedProcess[str]:
    """The command of docs/clusters.md."""
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": "60"} | ({"PBKD_STORE": str(store)} if store else {})
    environment = json.dumps({"env_vars": variables})
    return cluster.ray(
        "submit",
        "--working-dir",
        ".",
        "--runtime-env-json",
        environment,
        *words,
        "--",
        "pbkd",
        "run",
        *TRAINING,
    )


def test_a_stopped_job_keeps_its_state_and_the_next_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    store = with_database(tmp_path / "runs")
    submitted = submit(cluster, store, "--no-wait", "--submission-id", "first")
    assert submitted.returncode == 0, submitted.stdout
    until(lambda: len(cluster.steps()) > 20, "steps")
    assert cluster.ray("stop", "first").returncode == 0
    until(lambda: "was stopped" in cluster.ray("status", "first").stdout, "the job to stop")
    assert "the same command goes on from here" in cluster.ray("logs", "first").stdout
    assert len(cluster.steps()) < STEPS and list((store / "work").glob("*/step-*"))

    followed = submit(cluster, store)  # it follows the log, and ends as the job does
    assert followed.returncode == 0, followed.stdout
    assert "teacher                  train      test" in followed.stdout
    assert len(cluster.steps()) == len(set(cluster.steps())) == STEPS, "no step was repeated or left out"
    again = submit(cluster, store)
    assert again.returncode == 0 and "reused" in again.stdout and len(cluster.steps()) == STEPS


def test_a_client_without_the_token_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    (cluster.folder / "wrong").write_text("0" * 64)
    refused = cluster.ray("submit", "--", "touch", str(tmp_path / "done"), token="wrong")
    assert refused.returncode != 0 and not (tmp_path / "done").exists()
    assert "token" in refused.stdout


def test_a_client_with_no_token_at_all_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """What any other program of the machine could send."""
    job = json.dumps({"entrypoint": f"touch {tmp_path / 'done'}"}).encode()
    url, header = f"http://127.0.0.1:{cluster.dashboard}/api/jobs/", {"Content-Type": "application/json"}
    for request in (Request(url, job, header), Request(url)):
        with pytest.raises(HTTPError) as refused:
            urlopen(request, timeout=SECONDS)
        assert refused.value.code == 401
        refused.value.close()
    assert not (tmp_path / "done").exists()


def test_a_store_that_goes_with_the_job_is_refused(cluster: Cluster) -> None:
    refused = submit(cluster, None)
    assert refused.returncode != 0
    assert "PBKD_STORE among the env_vars" in refused.stdout


def test_what_the_cluster_can_never_give_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    TRAINING.append("compute.workers=3")
    try:
        refused = submit(cluster, tmp_path / "runs")
    finally:
        TRAINING.pop()
    assert "compute.workers=3: each worker needs 1 CPU on one node; there is room for 2" in refused.stdout
