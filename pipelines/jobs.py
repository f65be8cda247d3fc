"""A job: a chain of stages carried out in turn by the same workers, each published before the next."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pbkd import artifact
from pbkd.data import Data, DataSettings, open_data
from pbkd.engine import LocalSession, Precision, Stopped, keep_freed_memory
from pbkd.errors import StageError, UserError
from pbkd.networks import BlockNetwork
from pbkd.stages import Context, Stage, StageResult, run_stage
from pbkd.storage import Storage, user_cache
from pipelines.exhaustion import exhaustion
from pipelines.guard import Guard
from pipelines.journal import Journal
from pipelines.lease import Fenced, Lease
from pipelines.manifest import Input, Interface, Manifest
from pipelines.recipe import Compute
from pipelines.store import Store

PACKAGES = ("pbkd", "torch", "torchvision", "ray", "mlflow", "torch-pruning", "numpy", "safetensors")
PROGRESS = "progress.jsonl"


@dataclass(frozen=True)
class StageJob:
    """One stage of a job: what to run, on what, and the lease that allows to publish it."""

    key: str
    stage: Stage
    inputs: tuple[Input, ...]
    seed: int
    lease: Lease


@dataclass(frozen=True)
class Job:
    """All that the workers need to know; picklable, and the same for every rank.

    The loader in `data` is `ffcv` or `torch`: the driver has chosen for all of them.
    """

    store: str
    data: DataSettings
    data_digest: str
    compute: Compute
    stages: tuple[StageJob, ...]


class GaveUp(Exception):  # noqa: N818 - not an error of its own
    """A job that trying again would not mend: `failure` has the reason, or the lease was lost."""


def carry_out(job: Job, rank: int = 0, world: int | None = None) -> None:
    """Run the unfinished stages of `job` as rank `rank` of `world`, if that is not what the job says.

    With several ranks, the process group is there.

    Raises:
        GaveUp: a stage failed, and left the reason in its work folder; or it belongs to another run now.
    """
    compute = job.compute
    world = world or compute.workers
    torch.set_num_threads(compute.worker_threads)
    keep_freed_memory()
    store = Store(job.store)
    data = None
    for item in job.stages:
        if store.manifest(item.key) is not None:
            continue
        work = store.work(item.key)
        if not item.lease.is_wanted() or _failure(item.lease) in work.names():
            return  # an earlier attempt, or another rank in it, gave up
        try:
            with Guard(item.lease, compute.watchdog_seconds) as guard, _warnings_to(work, rank):
                data = data or open_data(job.data, job.data_digest, user_cache())
                _carry_out(store, job, item, data, rank, world, guard)
            _barrier(world)
        except (Fenced, Stopped) as error:
            raise GaveUp from error
        except (UserError, StageError) as error:
            _leave_failure(work, item.lease, error)
            raise GaveUp from error
        except (OSError, MemoryError, RuntimeError) as error:
            if (reason := exhaustion(error)) is None:
                raise
            _leave_failure(work, item.lease, StageError(reason))
            raise GaveUp from error


def _carry_out(
    store: Store, job: Job, item: StageJob, data: Data, rank: int, world: int, guard: Guard
) -> None:
    """Run one stage and, as rank 0, publish it."""
    compute = job.compute
    session = LocalSession(
        store.work(item.key),
        _device(compute),
        rank,
        world,
        compute.checkpoint_seconds,
        lambda: guard.step() and rank == 0,  # whose state is kept; without it the others cannot go on
        compute.checkpoint_steps,
        guard.pause,
        item.lease.is_current,
    )
    started = time.monotonic()
    inputs = {given.role: _load(store, given.key) for given in item.inputs}
    precision = Precision(precision=compute.precision, channels_last=compute.channels_last)
    result = run_stage(item.stage, Context(session, inputs, data, item.seed, precision))
    if rank == 0:
        _publish(store, job, item, result, data, time.monotonic() - started)


@contextmanager
def _warnings_to(work: Storage, rank: int) -> Iterator[None]:
    """Let rank 0's warnings reach the user through the stage's progress, from whatever machine."""
    if rank != 0:
        yield
        return
    handler = _ProgressHandler(Journal(work, PROGRESS))
    loggers = [logging.getLogger(name) for name in ("pbkd", "pipelines")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _ProgressHandler(logging.Handler):
    def __init__(self, progress: Journal) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Append it; what cannot be written is logging's own to report."""
        if record.name == "pipelines.driver":  # in one process with the driver: it says what it read here
            return
        try:
            self._progress.append({"type": "progress", "warning": record.getMessage()})
        except OSError:
            self.handleError(record)


def failure(store: Store, lease: Lease) -> Exception | None:
    """What `carry_out` left of a stage that failed under `lease`; taken away by asking."""
    work = store.work(lease.key)
    try:
        record = json.loads(work.read(_failure(lease)))
    except FileNotFoundError:
        return None
    work.remove(_failure(lease))
    return (UserError if record["user"] else StageError)(record["message"])


def _leave_failure(work: Storage, lease: Lease, error: Exception) -> None:
    record = {"user": isinstance(error, UserError), "message": str(error)}
    work.replace(_failure(lease), json.dumps(record).encode())


def _failure(lease: Lease) -> str:
    """Of one owner alone: what a worker of an earlier one meets is not this one's failure."""
    return f"failure-{lease.token}.json"


def _load(store: Store, key: str) -> BlockNetwork:
    """The network that stage `key` made; every byte of it is checked."""
    manifest = store.manifest(key)
    if manifest is None:
        raise StageError(f"stage {key[:12]} was to be finished before those that start from it, but is not")
    try:
        return _read(store.artifact(manifest.artifact), manifest.artifact)
    except UserError:
        pass  # perhaps only a copy of it is damaged
    try:
        return _read(store.artifact(manifest.artifact, fresh=True), manifest.artifact)
    except UserError as error:
        cure = store.cure([key])
        raise UserError(f"{error}\nafter this, the stage that made it runs again: {cure}") from error


def _read(folder: Path, digest: str) -> BlockNetwork:
    if artifact.read(folder).digest != digest:
        raise UserError(f"{folder}: holds another network than the one it is named for")
    return artifact.load(folder)


def _publish(store: Store, job: Job, item: StageJob, result: StageResult, data: Data, seconds: float) -> None:
    folder = store.scratch()
    saved = artifact.save(result.network, folder)
    store.add_artifact(folder, saved.digest)
    manifest = Manifest(
        key=item.key,
        kind=item.stage.kind,
        settings=item.stage.model_dump(mode="json"),
        inputs=list(item.inputs),
        data_digest=job.data_digest,
        seed=item.seed,
        compute={
            "precision": job.compute.precision,
            "channels_last": job.compute.channels_last,
            "world_size": job.compute.world_size,
            "threads": job.compute.worker_threads,
            "batch_size": job.data.batch_size,
            "data_loader": job.data.loader,
        },
        artifact=saved.digest,
        digest=saved.weights_digest,
        metrics=dict(result.metrics),
        history=[dict(row) for row in result.history],
        seconds=seconds,
        versions=versions(),
        machine=machine(_device(job.compute)),
        git=_commit(),
        created=time.time(),
        interface=Interface(preprocessing=data.settings.preprocessing(), classes=data.classes),
    )
    store.publish(manifest, item.lease)
    store.remove_work(item.key)


def _device(compute: Compute) -> torch.device:
    if compute.device == "cpu" or (compute.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "compute.device=cuda: this machine has no GPU that torch can use; set compute.device=auto"
        )
    return torch.device("cuda", torch.cuda.current_device())


def _barrier(workers: int) -> None:
    if workers > 1:
        torch.distributed.barrier()


@cache
def versions() -> dict[str, str]:
    """Versions of what computes, for the manifest."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on besides the versions: processor and device."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


@cache
def processor() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


@cache
def _commit() -> str | None:
    """The commit of pbkd's own checkout, if it is one."""
    folder = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def job_name(pipeline: str, stages: Sequence[tuple[str, str]]) -> str:
    """`PIPELINE-STAGE-KEY` of a job, from the (name, key) of its first stage."""
    name, key = stages[0]
    return f"{pipeline}-{name}-{key[:12]}"
