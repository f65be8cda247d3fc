"""The two ways a job is carried out: on Ray, fault-tolerant, or in processes of this machine."""

from __future__ import annotations

import logging
import multiprocessing
import os
import secrets
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, Protocol

from pbkd.errors import StageError, UserError
from pipelines.jobs import Job, carry_out
from pipelines.recipe import Compute
from pipelines.store import Store

log = logging.getLogger(__name__)


class Executor(Protocol):
    """Runs jobs, several at a time, each in a thread of the driver."""

    concurrency: int

    def run(self, job: Job, name: str) -> None:
        """Carry out `job`; returns when its processes have ended. Raises StageError if they failed."""

    def close(self) -> None:
        """End what was started."""


def make_executor(compute: Compute, store: Store) -> Executor:
    """The executor a recipe asks for."""
    return LocalExecutor(compute) if compute.executor == "local" else RayExecutor(compute, store)


def _concurrency(compute: Compute, cores: int) -> int:
    if compute.concurrency != "auto":
        return compute.concurrency
    return max(1, cores // (compute.workers * compute.worker_threads))


class LocalExecutor:
    """Each job in fresh processes of this machine, one a rank. A process that dies is started again."""

    def __init__(self, compute: Compute) -> None:
        self.concurrency = _concurrency(compute, os.cpu_count() or 1)
        self._attempts = compute.max_failures + 1
        self._processes: set[Any] = set()

    def run(self, job: Job, name: str) -> None:
        """Carry out `job` in spawned processes."""
        for _ in range(self._attempts):
            if all(code == 0 for code in self._attempt(job)):
                return
            log.warning("a process of job %s died; it goes on from the last checkpoint", name)
        raise StageError(
            f"job {name}: its processes died {self._attempts} times; see what they printed above"
        )

    def _attempt(self, job: Job) -> list[int | None]:
        spawn = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory(prefix="pbkd-") as folder:
            meeting = Path(folder) / "meeting"
            ranks = [
                spawn.Process(target=_rank, args=(job, rank, meeting)) for rank in range(job.compute.workers)
            ]
            self._processes.update(ranks)
            for process in ranks:
                process.start()
            try:
                _join(ranks)
            finally:
                self._processes.difference_update(ranks)
        return [process.exitcode for process in ranks]

    def close(self) -> None:
        """End processes that still run."""
        for process in list(self._processes):
            if process.is_alive():
                process.terminate()


def _join(ranks: list[Any]) -> None:
    """Wait for all ranks; when one dies, the others would wait for it for ever and are ended."""
    from multiprocessing.connection import wait

    alive = list(ranks)
    while alive:
        wait([process.sentinel for process in alive])
        alive = [process for process in alive if process.is_alive()]
        if any(process.exitcode for process in ranks):
            for process in alive:
                process.terminate()
            for process in alive:
                process.join()
            return


def _rank(job: Job, rank: int, meeting: Path) -> None:
    import torch

    if job.compute.workers > 1:
        backend = "nccl" if torch.cuda.is_available() and job.compute.device != "cpu" else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(rank % torch.cuda.device_count())
        torch.distributed.init_process_group(
            backend, init_method=f"file://{meeting}", rank=rank, world_size=job.compute.workers
        )
    try:
        carry_out(job, rank)
    except Exception:  # noqa: BLE001 - whatever it is, the exit code tells the driver
        traceback.print_exc()
        sys.exit(1)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class RayExecutor:
    """Each job a Ray Train job, on the cluster of RAY_ADDRESS or on one started for this run alone."""

    def __init__(self, compute: Compute, store: Store) -> None:
        self._compute, self._store = compute, store
        self._started = False
        self.concurrency = _concurrency(compute, os.cpu_count() or 1)

    def run(self, job: Job, name: str) -> None:
        """Carry out `job` with `ray.train`; a lost worker is replaced up to `compute.max_failures` times."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        compute = job.compute
        folder = self._store.root / "ray"
        trainer = TorchTrainer(
            _ray_worker,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=compute.workers,
                use_gpu=self._use_gpu(),
                resources_per_worker=self._resources(),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=str(folder),
                failure_config=FailureConfig(max_failures=compute.max_failures),
            ),
        )
        shutil.rmtree(
            folder / name, ignore_errors=True
        )  # of a run that was killed; the store has the checkpoints
        try:
            trainer.fit()
        except Exception as error:  # Ray's own hierarchy of errors has no common base
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise StageError(
                f"job {name} failed on Ray: {reason}\nits logs are below {folder / name}"
            ) from error
        shutil.rmtree(folder / name, ignore_errors=True)  # the store has all of it

    def connect(self) -> None:
        """Join the cluster of RAY_ADDRESS, or start one on loopback with a token only its owner can read.

        Raises:
            UserError: the cluster can never give what a job asks for.
        """
        if self._started:
            return
        address = os.environ.get("RAY_ADDRESS", "local")
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # how fast an ended job is noticed
        os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
        options: dict[str, Any] = {}
        if address == "local":
            os.environ["RAY_AUTH_MODE"] = "token"
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token(self._store))
            options = {
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
                "object_store_memory": 200 * 2**20,
            }
        import ray

        ray.init(
            address=address,
            namespace="pbkd",
            logging_level=logging.ERROR,
            log_to_driver=False,
            **options,
        )
        self._started = True
        resources = ray.cluster_resources()
        self.concurrency = _concurrency(self._compute, int(resources.get("CPU", 1)))
        needed = {name: amount * self._compute.workers for name, amount in self._resources().items()}
        for name, amount in needed.items():
            if resources.get(name, 0.0) < amount:
                self.close()
                raise UserError(
                    f"compute: {self._compute.workers} workers need {amount:g} {name}, the cluster has "
                    f"{resources.get(name, 0.0):g}; lower compute.workers or compute.threads"
                )

    def close(self) -> None:
        """Leave the cluster; one that was started for this run ends with it."""
        if self._started:
            import ray

            ray.shutdown()
            self._started = False

    def _use_gpu(self) -> bool:
        if self._compute.device != "auto":
            return self._compute.device == "cuda"
        import ray

        return bool(ray.cluster_resources().get("GPU", 0.0) >= self._compute.workers)

    def _resources(self) -> dict[str, float]:
        resources = {"CPU": float(self._compute.worker_threads)}
        if self._use_gpu():
            resources["GPU"] = 1.0
        return resources


def _ray_worker(config: dict[str, Any]) -> None:
    from ray.train import get_context

    carry_out(config["job"], get_context().get_world_rank())


def _token(store: Store) -> Path:
    path = store.root / "ray-token"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path
