"""Submit a `pbkd` command: check what can be known before, then hand it to Slurm, or to this machine."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError
from submitit.slurm.slurm import _make_sbatch_string

from pbkd.errors import UserError
from pipelines.store import Store
from slurm import scheduler
from slurm.allocation import Allocation
from slurm.cluster_job import ClusterJob
from slurm.fingerprint import Fingerprint
from slurm.probe import probe
from slurm.records import ExecutorName, JobRecord, write_job

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")


@dataclass(frozen=True)
class Submission:
    """Commands to submit: one job, or, if there are several, an array with an allocation for each.

    Attributes:
        commands: what is typed after `pbkd`, `--store` included.
        store: where finished work is; made by `check`.
        jobs: the folder of what is known of jobs.
        paths: what all nodes have to see besides.
        name: of the job.
    """

    commands: tuple[tuple[str, ...], ...]
    store: str
    jobs: Path
    paths: tuple[Path, ...]
    name: str
    allocation: Allocation
    executor: ExecutorName

    def text(self) -> str:
        """The script for sbatch."""
        asked = self._parameters()
        if len(self.commands) > 1:
            asked["map_count"] = len(self.commands)
        python = self.allocation.python or shlex.quote(sys.executable)
        return _make_sbatch_string(
            f"{python} -u -m submitit.core._submit {shlex.quote(str(self._folder))}",
            self._folder,
            **asked,
        )

    def check(self) -> list[str]:
        """See whether the job can run, as far as one can know before; returns what could not be found out.

        Raises:
            UserError: it can not.
        """
        allocation = self.allocation
        minutes = allocation.minutes  # tells what is wrong with it
        if self.executor != "slurm":
            if allocation.nodes > 1:
                raise UserError(
                    f"--nodes {allocation.nodes}: --executor {self.executor} has this machine alone"
                )
            return []
        _check_partition(allocation, minutes)
        kind = _file_system(self.jobs)
        if kind in MEMORY_FILE_SYSTEMS:
            raise UserError(
                f"store {self.jobs.parent}: lies in memory ({kind}), where no other machine sees it\n"
                "choose a folder on the shared file system: --store DIR or PBKD_STORE"
            )
        Store(self.store)  # tells what is wrong with it
        self.jobs.mkdir(parents=True, exist_ok=True)
        return probe(allocation, [self.jobs, *self.paths]) if allocation.probe else []

    def submit(self) -> list[JobRecord]:
        """Submit, and remember it; with `debug`, run it here and now. Raises UserError if Slurm refuses."""
        executor = self._executor()
        self.jobs.mkdir(parents=True, exist_ok=True)
        try:
            with _quiet(self.executor == "local"):
                submitted = self._hand_over(executor)
        except (FailedSubmissionError, FailedJobError, subprocess.CalledProcessError) as error:
            raise UserError(f"sbatch refused the job: {_reason(error)}") from error
        records = []
        for job, command in zip(submitted, self.commands, strict=True):
            allocation = self.allocation
            record = JobRecord(job.job_id, self.executor, command, allocation.nodes, allocation.restarts)
            write_job(self.jobs, record)
            records.append(record)
        if self.executor == "debug":
            for job in submitted:
                job.results()
        return records

    @property
    def _folder(self) -> Path:
        return self.jobs / "%j"

    def _hand_over(self, executor: Any) -> list[submitit.Job[int]]:
        tasks = [self._task(command) for command in self.commands]
        if len(tasks) == 1:
            return [executor.submit(tasks[0])]
        with executor.batch():
            return [executor.submit(task) for task in tasks]

    def _task(self, command: tuple[str, ...]) -> ClusterJob:
        allocation = self.allocation
        return ClusterJob(
            command=command,
            folder=Path.cwd(),
            jobs=self.jobs,
            environment=Fingerprint.here(),
            grace=allocation.grace_seconds,
            temporary=allocation.temporary,
            cpus=allocation.cpus_per_node,
            gpus=allocation.gpus_per_node if self.executor == "slurm" else allocation.gpus_per_node or None,
        )

    def _executor(self) -> Any:
        allocation = self.allocation
        if self.executor == "debug":
            return submitit.DebugExecutor(self._folder)
        if self.executor == "local":
            local = submitit.LocalExecutor(self._folder, max_num_timeout=allocation.requeues)
            local.update_parameters(
                timeout_min=allocation.minutes,
                signal_delay_s=allocation.grace_seconds,
                gpus_per_node=allocation.gpus_per_node,
                stderr_to_stdout=True,
            )
            return local
        executor = submitit.SlurmExecutor(
            self._folder, max_num_timeout=allocation.requeues, python=allocation.python
        )
        executor.update_parameters(**self._parameters())
        return executor

    def _parameters(self) -> dict[str, Any]:
        """What Slurm is asked for, in submitit's words."""
        allocation = self.allocation
        whole = allocation.cpus_per_node is None
        asked = {
            "job_name": self.name,
            "partition": allocation.partition,
            "account": allocation.account,
            "qos": allocation.qos,
            "time": allocation.minutes,
            "nodes": allocation.nodes,
            "ntasks_per_node": 1,
            "cpus_per_task": allocation.cpus_per_node,
            "gpus_per_node": allocation.gpus_per_node or None,
            "mem": allocation.mem or ("0" if whole else None),
            "exclusive": True if whole else None,
            "signal_delay_s": allocation.grace_seconds,
            "stderr_to_stdout": True,
            "setup": list(allocation.setup) or None,
            # A task that dies takes the others with it; `after_step` then begins the job again, from outside
            # the container that the tasks may be in: Slurm's commands are not in there.
            "srun_args": ["--kill-on-bad-exit=1", *self._step_options()],
            "teardown": [
                f"{shlex.quote(sys.executable)} -m slurm.after_step $? {shlex.quote(str(self.jobs))}"
            ],
            "additional_parameters": {"requeue": True, **allocation.flags()},
        }
        return {name: value for name, value in asked.items() if value is not None} | {"wckey": None}

    def _step_options(self) -> list[str]:
        cpus = self.allocation.cpus_per_node
        return [*([f"--cpus-per-task={cpus}"] if cpus else []), *self.allocation.srun]


def _check_partition(allocation: Allocation, minutes: int) -> None:
    """Compare what is asked for with what the cluster has."""
    there = {partition.name: partition for partition in scheduler.partitions()}
    names = ", ".join(there) or "none"
    chosen = allocation.partition
    if chosen is None:
        chosen = next((partition.name for partition in there.values() if partition.is_default), None)
        if chosen is None:
            raise UserError(f"--partition: this cluster has no default one; there are: {names}")
    if chosen not in there:
        raise UserError(f"--partition {chosen}: unknown; there are: {names}")
    partition = there[chosen]
    if allocation.nodes > partition.nodes:
        raise UserError(f"--nodes {allocation.nodes}: partition {chosen} has {partition.nodes}")
    if partition.minutes is not None and minutes > partition.minutes:
        raise UserError(
            f"--time {allocation.time}: partition {chosen} allows {partition.minutes} minutes\n"
            "ask for no more: at its end the job keeps its state and is requeued"
        )


def _file_system(path: Path) -> str:
    """The kind of file system `path` is on, or would be."""
    while not path.exists():
        path = path.parent
    found = subprocess.run(
        ["stat", "--file-system", "--format=%T", path], capture_output=True, text=True, check=False
    )
    return found.stdout.strip()


def _reason(error: Exception) -> str:
    """What sbatch said, of all that submitit says of it."""
    lines = [line.strip() for line in str(error).splitlines() if "error:" in line]
    return lines[-1].rpartition("error: ")[2] if lines else str(error).strip().partition("\n")[0]


@contextmanager
def _quiet(is_wanted: bool) -> Iterator[None]:
    """What is started meanwhile, and goes on alone, keeps neither the terminal nor a pipe open."""
    if not is_wanted:
        yield
        return
    kept = {number: os.dup(number) for number in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, copy in kept.items():
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)
