"""Jobs as fault-tolerant Ray Train jobs, on the cluster of RAY_ADDRESS or one started for this run alone."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import stat
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pipelines.seldom_collected  # noqa: F401 - before torch, in Ray's processes too
from pbkd.errors import StageError, UserError, first_line
from pipelines.executors import concurrency
from pipelines.jobs import GaveUp, Job, carry_out
from pipelines.ray_settings import QUIET
from pipelines.recipe import Compute
from pipelines.store import Store

if TYPE_CHECKING:
    from pathlib import Path

CONNECT_SECONDS = 10.0
LOOPBACK = ("127.0.0.1:", "localhost:")
OBJECT_STORE_BYTES = 200 * 2**20  # jobs exchange nothing through it
SETTINGS = QUIET | {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how fast an ended job is noticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for each job, and nobody here asks it
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # how long a worker that does not answer is asked to end
}


class RayExecutor:
    """Each job a Ray Train job; a lost worker is replaced up to `compute.max_failures` times."""

    def __init__(self, compute: Compute, store: Store) -> None:
        """Join the cluster of RAY_ADDRESS, or start one on loopback with a token only its owner can read.

        Raises:
            UserError: no cluster answers, or it can never give what a job asks for.
        """
        self._store = store
        connect(store, compute)
        try:
            import ray

            self._resources = worker_resources(compute)
            self._use_gpu = "GPU" in self._resources
            self.concurrency = concurrency(compute, int(ray.cluster_resources().get("CPU", 1)))
            require_room(compute, self._resources)
        except BaseException:
            self.close()
            raise

    def run(self, job: Job, name: str) -> None:
        """Carry out `job` with `ray.train`."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig

        from pipelines.ray_trainer import Trainer

        folder = self._store.root / "ray"
        fewest, most = job.compute.fewest_workers, job.compute.workers
        trainer = Trainer(
            _worker,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=(fewest, most) if fewest < most else most,  # type: ignore[arg-type]
                use_gpu=self._use_gpu,
                resources_per_worker=self._resources,
                placement_strategy=job.compute.placement.upper(),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=str(folder),
                failure_config=FailureConfig(max_failures=job.compute.max_failures),
            ),
        )
        # What Ray keeps of a job is of no use after it, or after a driver that was killed: the store has all.
        shutil.rmtree(folder / name, ignore_errors=True)
        try:
            trainer.fit()
        except Exception as error:  # Ray's own hierarchy of errors has no common base
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise StageError(f"job {name} failed on Ray: {reason}\nlogs: {folder / name}") from error
        shutil.rmtree(folder / name, ignore_errors=True)

    def close(self) -> None:
        """Leave the cluster, which ends the jobs; one that was started for this run ends with it."""
        import ray

        ray.shutdown()


def worker_resources(compute: Compute) -> dict[str, float]:
    """What one worker asks of the cluster that this process has joined."""
    import ray

    has_gpus = ray.cluster_resources().get("GPU", 0.0) >= compute.fewest_workers * compute.gpus_per_worker
    use_gpu = compute.device == "cuda" or (compute.device == "auto" and has_gpus)
    return {"CPU": float(compute.worker_threads)} | ({"GPU": compute.gpus_per_worker} if use_gpu else {})


def connect(store: Store, compute: Compute) -> None:
    """Join the cluster of RAY_ADDRESS, or start one on loopback with a token only its owner can read.

    Raises:
        UserError: no cluster answers.
    """
    # After how long Ray takes a worker that does not answer for lost; one that hangs ends itself (`Guard`).
    patience = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(compute.watchdog_seconds)}
    for name, value in (SETTINGS | patience).items():
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS", "local")
    options: dict[str, Any] = {}
    if address == "local":
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(_token(store))
        options = {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    if address == "local" or address.startswith(LOOPBACK):
        # Else Ray takes 127.0.0.1 for the machine's outer address: its servers would listen there, and a run
        # that joins a cluster on loopback would wait for ever.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    _require_answer(address)
    import ray

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    if is_main:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # inherited: what is sent to the group is the driver's
    try:
        ray.init(
            address=address, namespace="pbkd", logging_level=logging.ERROR, log_to_driver=False, **options
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address == "local":
            raise StageError(
                f"Ray could not be started on this machine: {first_line(error)}\n"
                "compute.executor=local runs without it"
            ) from error
        raise _no_cluster(address, error) from error
    finally:
        if is_main:
            for number, handler in before.items():  # Ray puts its own in their place
                signal.signal(number, handler)


def _require_answer(address: str) -> None:
    """Knock where a cluster is said to be: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> UserError:
    return UserError(
        f"RAY_ADDRESS={address}: no Ray cluster to use there: {first_line(error)}\n"
        "unset RAY_ADDRESS to run on this machine, or set compute.executor=local"
    )


def places(wish: dict[str, float]) -> int:
    """How many times what `wish` names is there, each time on one node."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(name, 0) // amount) for name, amount in wish.items()) for node in nodes)


def require_room(compute: Compute, per_worker: dict[str, float]) -> None:
    """Refuse what would wait for ever: a worker needs a node, and the fewest run at the same time."""
    import ray

    room = places(per_worker)
    if room >= compute.fewest_workers:
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    key = "workers" if compute.min_workers is None else "min_workers"
    wish = " and ".join(f"{amount:g} {name}" for name, amount in per_worker.items())
    there = " and ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in per_worker)
    cure = "set compute.device=auto" if "GPU" in per_worker else f"lower compute.{key} or compute.threads"
    raise UserError(
        f"compute.{key}={compute.fewest_workers}: each worker needs {wish} on one node; "
        f"there is room for {room}\nthe Ray cluster has {there} on {len(nodes)} nodes; {cure}"
    )


def _worker(config: dict[str, Any]) -> None:
    from ray.train import get_context

    job: Job = config["job"]
    try:
        carry_out(job, get_context().get_world_rank(), get_context().get_world_size())
    except GaveUp:
        if get_context().get_world_size() > 1:
            raise  # the other ranks wait for this one: Ray has to end the group


def _token(store: Store) -> Path:
    """The store's token for the clusters started for it; made once, readable for its owner alone.

    Raises:
        UserError: others may know or have chosen the one that is there.
    """
    path = store.root / "ray-token"
    if not path.exists():
        folder = store.scratch()
        mine = folder / "token"
        with os.fdopen(os.open(mine, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):  # another run was first, and its token is whole
            os.link(mine, path)
        shutil.rmtree(folder)
    found = path.lstat()
    is_private = stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) & 0o077 == 0
    if not is_private or found.st_uid != os.getuid():
        raise UserError(
            f"{path}: the token of Ray clusters must be your own file, which nobody else can read or write\n"
            f"found mode {stat.S_IMODE(found.st_mode):04o}, user {found.st_uid}\n"
            "remove it, and the next run makes another; or set compute.executor=local"
        )
    return path
