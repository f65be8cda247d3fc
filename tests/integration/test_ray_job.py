"""`ray job submit` on a cluster that `ray start` has made: submit, follow, stop, submit again; tokens."""

import json
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from benchmarks.faults import LOG_STEPS
from benchmarks.injected import injected
from tests.integration.pbkd_process import SECONDS, SMALL, until, with_database
from tests.integration.ray_cluster import Cluster

STEPS = 120
TRAINING = [
    str(SMALL),
    f"stages.teacher.steps={STEPS}",
    "compute.checkpoint_seconds=60",
    "--until",
    "teacher",
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    started = Cluster(folder, PBKD_FAULTS_LOG=str(folder / "steps"), **injected(LOG_STEPS, folder / "hook"))
    try:
        until(started.answers, "the cluster to answer")
        yield started
    finally:
        started.end()


def steps(cluster: Cluster) -> list[str]:
    """Every step that a worker has taken."""
    log = cluster.folder / "steps"
    return [line.partition(" ")[2] for line in log.read_text().splitlines()] if log.exists() else []


def submit(
    cluster: Cluster, store: Path | None, *words: str, overrides: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
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
        *overrides,
    )


def test_a_stopped_job_keeps_its_state_and_the_next_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    store = with_database(tmp_path / "runs")
    submitted = submit(cluster, store, "--no-wait", "--submission-id", "first")
    assert submitted.returncode == 0, submitted.stdout
    until(lambda: len(steps(cluster)) > 20, "steps")
    assert cluster.ray("stop", "first").returncode == 0
    until(lambda: "stopped" in cluster.status("first"), "the job to stop")
    assert "the same command goes on from here" in cluster.ray("logs", "first").stdout
    assert len(steps(cluster)) < STEPS and list((store / "work").glob("*/step-*"))

    followed = submit(cluster, store)  # it follows the log, and ends as the job does
    assert followed.returncode == 0, followed.stdout
    assert "teacher                  train      test" in followed.stdout
    assert len(steps(cluster)) == len(set(steps(cluster))) == STEPS, "no step was repeated or left out"


@pytest.mark.proof  # on every run without `ray job`: tests/integration/test_run.py
def test_a_finished_job_submitted_again_trains_nothing(cluster: Cluster, tmp_path: Path) -> None:
    store = with_database(tmp_path / "runs")
    assert submit(cluster, store).returncode == 0
    taken = len(steps(cluster))
    again = submit(cluster, store)
    assert again.returncode == 0 and "reused" in again.stdout and len(steps(cluster)) == taken


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
    refused = submit(cluster, tmp_path / "runs", overrides=["compute.workers=3"])
    assert "compute.workers=3: each worker needs 1 CPU on one node; there is room for 2" in refused.stdout
