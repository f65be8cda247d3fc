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
from tests.integration.forked_commands import ForkedCommand
from tests.integration.recorded_pipeline import empty_database

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "tests" / "integration" / "small.yaml"
LOCAL, RAY = "compute.executor=local", "compute.executor=ray"
ONE_THREAD = "compute.threads=1"  # two that share a core with others wait for one another most of the time
SMOKE = ("smoke=true", ONE_THREAD)
READ_LATE = ("AWS_", "RAY_", "PBKD_")
"""Variables of these names are read after `pbkd` has imported what it forks with: see `forked_commands`."""
SECONDS = 300.0  # no single step of a test may take longer, on a crowded machine either
# A shell that runs the tests in the background has them ignore Ctrl-C, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Pbkd:
    """One `pbkd` command in a process group of its own, like one typed in a terminal.

    All it starts inherits a mark in the environment, by which `processes` finds what is left of it.
    """

    def __init__(self, *arguments: object, folder: Path = ROOT, **environment: str) -> None:
        """Start it in `folder`, with these variables beside those of this process."""
        self._mark = uuid.uuid4().hex
        self._output = out, err = os.memfd_create("stdout"), os.memfd_create("stderr")
        words, variables = [*map(str, arguments)], os.environ | environment | {MARK: self._mark}
        self._process: ForkedCommand | subprocess.Popen[bytes]
        if not all(name.startswith(READ_LATE) for name in environment):
            command = [sys.executable, "-m", "pipelines.cli", *words]
            self._process = subprocess.Popen(
                command, cwd=folder, env=variables, stdout=out, stderr=err, start_new_session=True
            )
        else:
            self._process = ForkedCommand(words, folder, variables, out, err)

    def signal(self, number: int, group: bool = False) -> None:
        """Send a signal to the command, or, as Ctrl-C does, to its process group."""
        (os.killpg if group else os.kill)(self._process.pid, number)

    def has_ended(self) -> bool:
        """Whether the command itself has; what it started may live on."""
        return self._process.poll() is not None

    def wait(self, seconds: float = SECONDS) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        code = self._process.wait(seconds)
        out, err = (os.pread(file, os.fstat(file).st_size, 0).decode() for file in self._output)
        return code, out, err

    def succeed(self) -> dict[str, Any]:
        """What a command with --json says on stdout, which holds nothing else."""
        code, out, err = self.wait()
        assert code == 0, err
        report: dict[str, Any] = json.loads(out)
        return report

    def processes(self, words: str = "") -> list[int]:
        """The living processes of the command with `words` in their command line."""
        command = [] if words or self.has_ended() else [self._process.pid]
        return list({*command, *marked_processes(self._mark, words)})

    def end(self) -> None:
        """End all that is left."""
        for pid in self.processes():
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        self._process.wait(SECONDS)
        for file in self._output:
            os.close(file)


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
    with redirect_stdout(out), redirect_stderr(err):
        code = main([*map(str, words)])
    assert logging.getLogger().handlers == handlers, "a command takes its log away when it ends"
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
