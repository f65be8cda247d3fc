"""The `pbkd` command as a user types it, and every process that comes of it."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.marked_processes import MARK, marked_processes
from pipelines.cli import main
from tests.integration.recorded_pipeline import empty_database

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "integration" / "small.yaml"
LOCAL, RAY = "compute.executor=local", "compute.executor=ray"
ONE_THREAD = "compute.threads=1"  # two that share a core with others wait for one another most of the time
SMOKE = ("smoke=true", ONE_THREAD)
SECONDS = 300.0  # no single step of a test may take longer, on a crowded machine either
# A shell that runs the tests in the background has them ignore Ctrl-C, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Pbkd:
    """One `pbkd` command in a process group of its own, like one typed in a terminal.

    All it starts inherits a mark in the environment, by which `processes` finds what is left of it.
    """

    def __init__(self, *arguments: object, **environment: str) -> None:
        self._mark = uuid.uuid4().hex
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | environment | {MARK: self._mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal to the command, or, as Ctrl-C does, to its process group."""
        (os.killpg if group else os.kill)(self._process.pid, number)

    def has_ended(self) -> bool:
        """Whether the command itself has; what it started may live on, and hold its output open."""
        return self._process.poll() is not None

    def wait(self, seconds: float = SECONDS) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self._process.communicate(timeout=seconds)
        return self._process.returncode, out, err

    def succeed(self) -> dict[str, Any]:
        """What a command with --json says on stdout, which holds nothing else."""
        code, out, err = self.wait()
        assert code == 0, err
        report: dict[str, Any] = json.loads(out)
        return report

    def processes(self, words: str = "") -> list[int]:
        """The living processes of the command with `words` in their command line."""
        return marked_processes(self._mark, words)

    def end(self) -> None:
        """End all that is left."""
        for pid in self.processes():
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        self._process.communicate(timeout=SECONDS)


@contextmanager
def pbkd(*arguments: object, **environment: str) -> Iterator[Pbkd]:
    """A running command, of which nothing is left afterwards."""
    command = Pbkd(*arguments, **environment)
    try:
        yield command
    finally:
        command.end()


def run(*arguments: object, **environment: str) -> dict[str, Any]:
    """The report of `pbkd run ARGUMENTS --json`."""
    with pbkd("run", *arguments, "--json", **environment) as command:
        return command.succeed()


def call(*words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `pbkd WORDS`, called in this process, where nothing is imported again.

    For commands that nobody disturbs, and that do not start Ray.
    """
    out, err, handlers = io.StringIO(), io.StringIO(), logging.getLogger().handlers.copy()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main([*map(str, words)])
    finally:
        logging.getLogger().handlers[:] = handlers
    return code, out.getvalue(), err.getvalue()


def report_of(*words: object) -> dict[str, Any]:
    """What `pbkd WORDS --json`, called in this process, says on stdout."""
    code, out, err = call(*words, "--json")
    assert code == 0, err
    report: dict[str, Any] = json.loads(out)
    return report


def run_here(*arguments: object) -> dict[str, Any]:
    """The report of `pbkd run ARGUMENTS --json`, called in this process."""
    return report_of("run", *arguments)


def with_database(store: Path) -> Path:
    """A store, empty but for MLflow's database, which MLflow takes seconds to make."""
    (store / "mlflow").mkdir(parents=True)
    empty_database(store / "mlflow" / "mlflow.db")
    return store


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for what others do, and for no longer than `SECONDS`."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {SECONDS:.0f} s in vain for {what}"
        time.sleep(0.05)


def digests(report: dict[str, Any]) -> dict[str, str]:
    """Of each stage's weights, by the stage's name."""
    return {stage["name"]: stage["digest"] for stage in report["stages"]}


def states(report: dict[str, Any]) -> dict[str, str]:
    """`ran` or `reused`, by the stage's name."""
    return {stage["name"]: stage["state"] for stage in report["stages"]}
