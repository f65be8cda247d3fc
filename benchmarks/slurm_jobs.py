"""Jobs of `pbkd slurm run` on a Slurm of benchmarks/slurm_lab, and all one can see of them from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.faults import LOG_STEPS, ROOT, prepared_recipe
from benchmarks.injected import injected
from benchmarks.marked_processes import MARK, marked_processes
from benchmarks.slurm_lab import SlurmLab
from pipelines.tracking import connect

PBKD = [sys.executable, "-m", "pipelines.cli"]
STEPS, RANKS, INTERVAL = 300, 2, 20
TRAINING = (
    f"stages.teacher.steps={STEPS}", "compute.workers=2", "compute.executor=ray", "compute.fuse=false",
    f"compute.checkpoint_steps={INTERVAL}", "--until", "teacher",
)  # fmt: skip
LONGEST_SECONDS = 600.0
SLOW_STORE = """
def slow_down(module):
    import time
    for name in ("read", "create", "replace", "append", "names"):
        def slow(self, *given, _method=getattr(module.Folder, name), **named):
            if os.path.exists(os.environ["PBKD_FAULTS_SLOW"]):
                time.sleep(1.0)
            return _method(self, *given, **named)
        setattr(module.Folder, name, slow)

when_imported("pbkd.storage", slow_down)
"""
SLURM_COMMANDS = ("sacct", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
POLL_SECONDS = 0.1


class Bench:
    """A Slurm, and a folder for stores and logs of steps; a context manager."""

    def __init__(self, lab: SlurmLab, folder: Path) -> None:
        """Use a lab that runs."""
        self.lab, self.folder, self.recipe = lab, folder, prepared_recipe(folder)
        self.temporary = tempfile.TemporaryDirectory(prefix="p-", dir="/tmp")  # sockets want short names
        self._database: Path | None = None
        self._expected: dict[str, str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.temporary.cleanup()

    def store(self) -> Path:
        """A new store, empty but for MLflow's database, which takes MLflow seconds to make."""
        if self._database is None:
            self._database = self.folder / "mlflow.db"
            connect(f"sqlite:///{self._database}").search_experiments()
        store = self.folder / uuid.uuid4().hex[:8] / "runs"
        (store / "mlflow").mkdir(parents=True)
        shutil.copy(self._database, store / "mlflow" / "mlflow.db")
        return store

    def expected(self) -> dict[str, str]:
        """The weights of the training by two processes of this machine, undisturbed."""
        if self._expected is None:
            found = subprocess.run(
                [
                    *PBKD, "run", self.recipe, *TRAINING, "compute.executor=local",
                    "--store", self.store(), "--json",
                ],
                cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=LONGEST_SECONDS,
            )  # fmt: skip
            report = json.loads(found.stdout)
            self._expected = {stage["key"]: stage["digest"] for stage in report["stages"]}
        return self._expected


class Job:
    """A job submitted by `pbkd slurm run`, and every process that comes of it."""

    def __init__(
        self,
        bench: Bench,
        store: Path,
        *arguments: object,
        recipe: Path | None = None,
        space: str | None = None,
        nodes: int = 2,
        minutes: int = 30,
        hook: str = "",
        is_contained: bool = False,
    ) -> None:
        """Submit it: a run of the recipe, or, with a `space`, a search.

        `hook`: code more that its processes run as they start (`benchmarks.injected`). `is_contained`: what
        the tasks run in has a Python that is only there, and no command of Slurm's.
        """
        self._bench, self.store = bench, store
        self._mark = uuid.uuid4().hex
        where = ["--nodes", nodes, "--cpus-per-node", 2 // nodes, "--time", minutes, "--store", store]
        environment = {
            MARK: self._mark,
            "PBKD_FAULTS_LOG": str(store.parent / "steps"),
            "PBKD_SLURM_PROFILES": str(_profile(store.parent, bench.temporary.name, is_contained)),
            "PBKD_FAULTS_SLOW": str(store.parent / "slow"),
            **injected(LOG_STEPS + SLOW_STORE + hook, store.parent / "hook"),
        }
        self._environment = os.environ | bench.lab.environment | environment
        self.submitted_at = time.time()
        what = ["run"] if space is None else ["tune", space]
        told = self.pbkd(*what, recipe or bench.recipe, *arguments, *where, "--json")
        self.elements: list[str] = json.loads(told)["jobs"]
        self.id = self.elements[0]

    def pbkd(self, *words: object) -> str:
        """What `pbkd slurm WORDS` says; raises CalledProcessError if it fails."""
        command = [*PBKD, "slurm", *map(str, words)]
        return subprocess.run(
            command,
            env=self._environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=LONGEST_SECONDS,
        ).stdout

    def status(self) -> dict[str, Any]:
        """What `pbkd slurm status` knows."""
        row: dict[str, Any] = json.loads(self.pbkd("status", self.id, "--store", self.store, "--json"))[
            "jobs"
        ][0]
        return row

    def steps(self) -> list[str]:
        """Every step taken so far in this store, by each rank: its process, the training, its number."""
        log = self.store.parent / "steps"
        return log.read_text().splitlines() if log.exists() else []

    def steps_repeated(self) -> int:
        """How many steps have been taken more than once by a rank."""
        return len(self.steps()) - RANKS * STEPS

    def wait_for_steps(self, count: int) -> None:
        """Wait until so many steps more have been taken."""
        goal = len(self.steps()) + count
        self._wait_for_training(lambda: len(self.steps()) >= goal, f"{count} more steps")

    def wait_for_other_workers(self, former: set[str]) -> float:
        """Wait until processes have taken steps that are not among `former`; returns when."""
        self._wait_for_training(lambda: self.workers() - former, "the training to go on")
        return time.time()

    def _wait_for_training(self, condition: Callable[[], object], what: str) -> None:
        has_ended = (self.store / "slurm" / self.id / "ended.json").exists
        wait_until(lambda: condition() or has_ended(), what, self)
        if not condition():
            raise TimeoutError(f"job {self.id} ended before {what}\n{self.logs()}")

    def logs(self) -> str:
        """The end of what its first task has printed."""
        return self.pbkd("logs", self.id, "--store", self.store)[-4000:]

    def workers(self) -> set[str]:
        """The processes that have taken steps."""
        return {line.partition(" ")[0] for line in self.steps()}

    def wait(self) -> dict[str, Any]:
        """Wait for the end; the status then."""
        wait_until((self.store / "slurm" / self.id / "ended.json").exists, "the end", self)
        return self.status()

    def processes(self, words: str = "") -> list[int]:
        """The living processes of the job with `words` in their command line, on whatever node."""
        return marked_processes(self._mark, words)

    def queue(self) -> str:
        """The job's state in Slurm's queue; empty once it has left it."""
        return self._bench.lab.ask("squeue", "--noheader", "--jobs", self.id, "--format", "%T")

    def accounted(self) -> str:
        """How the job ended, for Slurm."""
        ask = ("sacct", "--noheader", "--allocations", "--parsable2", "--jobs", self.id, "--format", "State")
        wait_until(lambda: self._bench.lab.ask(*ask) not in ("PENDING", "RUNNING"), "its end", self)
        return self._bench.lab.ask(*ask)

    def wait_until_over(self) -> None:
        """Wait until the job has left the queue, and no process of it runs on any node."""
        wait_until(lambda: not self.queue(), "the queue to be empty", self)
        wait_until(lambda: not self.processes(), "the processes to be gone", self)

    def is_clean(self) -> bool:
        """Wait until it is over; whether no socket or log is left on a node then.

        Of a job that was killed, they are, until the next one comes.
        """
        self.wait_until_over()
        return not list(Path(self._bench.temporary.name).glob("pbkd-ray-*"))

    def event(self, type_: str, number: int = 0) -> float:
        """When something happened to the job for the `number`th time."""
        times = [event["time"] for event in self.status()["events"] if event["type"] == type_]
        return float(times[number])


def _profile(folder: Path, temporary: str, is_contained: bool) -> Path:
    """A site profile for short jobs."""
    profile = {"grace_seconds": "45", "probe": "false", "temporary": temporary}
    path = folder / "profiles.yaml"
    path.write_text(json.dumps({"default": profile | (_image(folder / "image") if is_contained else {})}))
    return path


def _image(folder: Path) -> dict[str, Any]:
    """What stands in for a container: a Python that is only there in steps, and there has no Slurm."""
    tools, python = folder / "bin", folder / "python"
    tools.mkdir(parents=True)
    for tool in Path("/usr/bin").iterdir():
        if tool.name not in SLURM_COMMANDS:
            (tools / tool.name).symlink_to(tool)
    outside = '[ -n "$SLURM_STEP_ID" ] || exit 127'
    python.write_text(f'#!/bin/sh\n{outside}\nPATH={tools} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return {"python": str(python)}


def wait_until(condition: Callable[[], object], what: str, job: Job | None = None) -> None:
    """Wait for what others do, and no longer than LONGEST_SECONDS."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            said = job.logs() if job else ""
            raise TimeoutError(f"waited {LONGEST_SECONDS:.0f} s in vain for {what}\n{said}")
        time.sleep(POLL_SECONDS)
