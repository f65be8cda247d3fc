"""`ray job submit` on a cluster that `ray start` has made: submit, follow, stop, submit again; tokens."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from benchmarks.faults import LOG_STEPS
from benchmarks.injected import injected
from tests.integration.pbkd_process import SECONDS, SMALL, until, with_database
from tests.integration.ray_cluster import Cluster

STEPS = 300
TRAINING = [
    str(SMALL),
    f"stages.teacher.steps={STEPS}",
    "compute.checkpoint_seconds=60",
    "--until",
    "teacher",
]


@dataclass(frozen=True)
class Jobs:
    """What is submitted to a cluster; its trainings log every step."""

    cluster: Cluster
    folder: Path

    def submit(
        self, store: Path | None, *words: str, training: Sequence[str] = TRAINING
    ) -> CompletedProcess[str]:
        """Type the command of docs/clusters.md."""
        variables = {"RAY_JOB_STOP_WAIT_TIME_S": "60", "PBKD_FAULTS_LOG": str(self._log)}
        variables |= injected(LOG_STEPS, self.folder / "hook") | ({"PBKD_STORE": str(store)} if store else {})
        environment = json.dumps({"env_vars": variables})
        typed = ["submit", "--working-dir", ".", "--runtime-env-json", environment, *words]
        return self.cluster.ray(*typed, "--", "pbkd", "run", *training)

    def steps(self) -> list[str]:
        """Every step that a worker has taken."""
        log = self._log.read_text().splitlines() if self._log.exists() else []
        return [line.partition(" ")[2] for line in log]

    @property
    def _log(self) -> Path:
        return self.folder / "steps"


@pytest.fixture
def jobs(ray_cluster: Cluster, tmp_path: Path) -> Jobs:
    return Jobs(ray_cluster, tmp_path)


def test_a_stopped_job_keeps_its_state_and_the_next_goes_on(jobs: Jobs, tmp_path: Path) -> None:
    store = with_database(tmp_path / "runs")
    submitted = jobs.submit(store, "--no-wait", "--submission-id", "first")
    assert submitted.returncode == 0, submitted.stdout
    until(lambda: len(jobs.steps()) > 20, "steps")
    assert jobs.cluster.ray("stop", "first").returncode == 0
    until(lambda: "was stopped" in jobs.cluster.ray("status", "first").stdout, "the job to stop")
    assert "the same command goes on from here" in jobs.cluster.ray("logs", "first").stdout
    assert len(jobs.steps()) < STEPS and list((store / "work").glob("*/step-*"))

    followed = jobs.submit(store)  # it follows the log, and ends as the job does
    assert followed.returncode == 0, followed.stdout
    assert "teacher                  train      test" in followed.stdout
    assert len(jobs.steps()) == len(set(jobs.steps())) == STEPS, "no step was repeated or left out"
    again = jobs.submit(store)
    assert again.returncode == 0 and "reused" in again.stdout and len(jobs.steps()) == STEPS


def test_a_client_without_the_token_is_refused(ray_cluster: Cluster, tmp_path: Path) -> None:
    (ray_cluster.folder / "wrong").write_text("0" * 64)
    refused = ray_cluster.ray("submit", "--", "touch", str(tmp_path / "done"), token="wrong")
    assert refused.returncode != 0 and not (tmp_path / "done").exists()
    assert "token" in refused.stdout


def test_a_client_with_no_token_at_all_is_refused(ray_cluster: Cluster, tmp_path: Path) -> None:
    """What any other program of the machine could send."""
    job = json.dumps({"entrypoint": f"touch {tmp_path / 'done'}"}).encode()
    url, header = f"http://127.0.0.1:{ray_cluster.dashboard}/api/jobs/", {"Content-Type": "application/json"}
    for request in (Request(url, job, header), Request(url)):
        with pytest.raises(HTTPError) as refused:
            urlopen(request, timeout=SECONDS)
        assert refused.value.code == 401
        refused.value.close()
    assert not (tmp_path / "done").exists()


def test_a_store_that_goes_with_the_job_is_refused(jobs: Jobs) -> None:
    refused = jobs.submit(None)
    assert refused.returncode != 0
    assert "PBKD_STORE among the env_vars" in refused.stdout


def test_what_the_cluster_can_never_give_is_refused(jobs: Jobs, tmp_path: Path) -> None:
    refused = jobs.submit(tmp_path / "runs", training=[*TRAINING, "compute.workers=3"])
    assert "compute.workers=3: each worker needs 1 CPU on one node; there is room for 2" in refused.stdout
