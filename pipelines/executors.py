"""How jobs are carried out: the interface, and processes of this machine; on Ray: `ray_executor`."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import MutableSequence, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

import torch

from pbkd.errors import StageError, UserError
from pipelines.exhaustion import MORE_MEMORY, exhaustion
from pipelines.jobs import GaveUp, Job, carry_out
from pipelines.recipe import Compute, cores
from pipelines.signals import SIGNALS
from pipelines.store import Store

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
PRELOADED = ["pipelines.seldom_collected", "pipelines.jobs", "torch._dynamo"]
"""What every job imports, in this order; the last comes with its first optimizer."""
PR_SET_NAME = 15
SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In the environment of what `ray job submit` runs."""
GAVE_UP = 3
"""Exit code of a process that would fail again."""


class Executor(Protocol):
    """Runs jobs, up to `concurrency` at a time, each in a thread of the driver."""

    concurrency: int

    def run(self, job: Job, name: str) -> None:
        """Carry out `job`; returns when its processes have ended. Raises StageError if they failed."""

    def close(self) -> None:
        """End what was started, jobs that run included; closing twice is harmless."""


def require_machine(compute: Compute) -> None:
    """Raise UserError if jobs are to run on this machine and can not."""
    if compute.executor == "ray" and "RAY_ADDRESS" in os.environ:
        return
    if compute.workers > cores():
        raise UserError(
            f"compute.workers={compute.workers}: this machine has {cores()} CPU cores; ask for no more"
        )
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "compute.device=cuda: this machine has no GPU that torch can use; set compute.device=auto"
        )


def require_lasting(store: str) -> None:
    """Raise UserError if `store` would lie in the copy of a folder that Ray makes for one submitted job."""
    if SUBMITTED_JOB in os.environ and "://" not in store and not Path(store).expanduser().is_absolute():
        raise UserError(
            f"store {store}: would lie in Ray's copy of the working directory, which goes with the job\n"
            "name one that all nodes see: --store /shared/runs, or PBKD_STORE among the env_vars of the "
            "job's runtime environment"
        )


def open_executor(compute: Compute, store: Store) -> Executor:
    """The executor a recipe asks for. Raises UserError if its machines can never run a job of the recipe."""
    require_machine(compute)
    if compute.executor == "local":
        return LocalExecutor(compute)
    from pipelines.ray_executor import RayExecutor

    return RayExecutor(compute, store)


def concurrency(compute: Compute, available: int) -> int:
    """How many jobs run at the same time on so many CPU cores."""
    if compute.concurrency != "auto":
        return compute.concurrency
    return max(1, available // (compute.workers * compute.worker_threads))


class InProcessExecutor:
    """Jobs of one worker in this process: where it is kept, a job has nothing to start or to import."""

    concurrency = 1
    _alone = threading.Lock()
    """Torch's generators and threads are the process's, and a job that was given up may still run."""

    def run(self, job: Job, name: str) -> None:
        """Carry out `job` in the thread that calls."""
        with self._alone, suppress(GaveUp):
            carry_out(job)

    def close(self) -> None:
        """Nothing: a job ends when its lease says so, or with the process."""


class LocalExecutor:
    """Each job in fresh processes of this machine, one a rank. A process that dies is started again.

    They are forked from a server that has imported what they need and computed nothing: it has no threads, so
    that a fork of it is sound. Where there are GPUs they are spawned: an import may ask CUDA something, and
    CUDA does not survive a fork.
    """

    def __init__(self, compute: Compute) -> None:
        self.concurrency = concurrency(compute, cores())
        self._attempts = compute.max_failures + 1
        self._processes: set[BaseProcess] = set()
        self._is_closed = False
        self._lock = threading.Lock()

    def run(self, job: Job, name: str) -> None:
        """Carry out `job` in processes of its own."""
        # They may reach the whole process group. The driver ends its processes; they inherit this mask.
        resource_tracker.ensure_running()  # its start, which the first process would bring, unblocks them
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for _ in range(self._attempts):
            codes = self._attempt(job)
            if GAVE_UP in codes or not any(codes):
                return
            if self._is_closed:
                raise StageError(f"job {name} was ended")
            log.warning("a process of job %s died; it goes on from the last checkpoint", name)
        reason = "what they printed is above"
        if -signal.SIGKILL in codes:
            reason = f"the last one was killed, which is what happens when memory runs out; {MORE_MEMORY}"
        raise StageError(f"job {name}: its processes died {self._attempts} times; {reason}")

    def close(self) -> None:
        """End the processes that still run; `run` returns when they have ended."""
        with self._lock:
            self._is_closed = True
            for process in self._processes:
                process.kill()

    def _attempt(self, job: Job) -> list[int | None]:
        processes = _context(job.compute)
        beats = processes.RawArray("d", job.compute.workers)
        with tempfile.TemporaryDirectory(prefix="pbkd-") as folder:
            meeting = Path(folder) / "meeting"
            ranks = [
                processes.Process(target=_rank, args=(job, rank, meeting, beats, dict(os.environ)))
                for rank in range(job.compute.workers)
            ]
            with self._lock:  # so that `close` sees all of them or none is started
                if self._is_closed:
                    return [1]
                for process in ranks:
                    process.start()
                    self._processes.add(process)
            try:
                _join(ranks, beats, job.compute.watchdog_seconds)
            finally:
                with self._lock:
                    self._processes.difference_update(ranks)
        return [process.exitcode for process in ranks]


def _context(compute: Compute) -> SpawnContext | ForkServerContext:
    """How processes are started."""
    if compute.device != "cpu" and torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _join(ranks: Sequence[BaseProcess], beats: Sequence[float], patience: float) -> None:
    """Wait for all ranks; when one dies, the others would wait for it for ever and are ended.

    One whose beat stands still for `patience` seconds, counted while this process runs, does not run: it is
    ended.
    """
    alive = list(ranks)
    seen, silent = list(beats), [0.0] * len(ranks)
    while alive:
        if not wait([process.sentinel for process in alive], BEAT_SECONDS):
            for rank, process in enumerate(ranks):
                has_begun_and_stands = 0.0 < beats[rank] == seen[rank]
                silent[rank] = silent[rank] + BEAT_SECONDS if has_begun_and_stands else 0.0
                seen[rank] = beats[rank]
                if silent[rank] >= patience and process.is_alive():
                    log.warning("process %d has not run for %g s and is ended", process.pid, patience)
                    process.kill()
        alive = [process for process in alive if process.is_alive()]
        if any(process.exitcode for process in ranks):
            for process in alive:
                process.kill()
            for process in alive:
                process.join()
            return


def _rank(
    job: Job, rank: int, meeting: Path, beats: MutableSequence[float], environment: dict[str, str]
) -> None:
    # The server's environment is that of its start, and its name says nothing in `top`.
    os.environ.clear()
    os.environ.update(environment)
    ctypes.CDLL(None).prctl(PR_SET_NAME, f"pbkd-rank{rank}".encode())
    threading.Thread(target=_end_with_driver, args=(beats, rank), daemon=True).start()
    if job.compute.workers > 1:
        backend = "nccl" if torch.cuda.is_available() and job.compute.device != "cpu" else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.distributed.init_process_group(
            backend, init_method=f"file://{meeting}", rank=rank, world_size=job.compute.workers
        )
    try:
        carry_out(job, rank)
    except GaveUp:
        sys.exit(GAVE_UP)
    except Exception as error:  # noqa: BLE001 - whatever it is, the exit code tells the driver
        if (reason := exhaustion(error)) is not None:  # too badly to leave it in the store
            sys.stderr.write(f"{reason}\n")
            sys.exit(GAVE_UP)
        traceback.print_exc()
        sys.exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _end_with_driver(beats: MutableSequence[float], rank: int) -> None:
    """End this process when the driver is gone, as by `kill -9`: the next one works in the same folder.

    Until then, show the driver that this process runs.
    """
    driver = multiprocessing.parent_process()
    assert driver is not None, "this process was started by another"
    while driver.is_alive():
        beats[rank] += 1.0
        driver.join(BEAT_SECONDS)
    os._exit(1)
