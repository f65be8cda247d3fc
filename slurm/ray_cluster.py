"""The Ray cluster of one job: its node on this machine, how nodes meet, nothing left of it afterwards."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from pipelines.ray_settings import QUIET
from slurm.fingerprint import Fingerprint

LOOPBACK = "127.0.0.1"
PREFIX = "pbkd-ray-"
PORTS = range(20_000, 32_000)
OBJECT_STORE_BYTES = 200 * 2**20  # jobs exchange nothing through it
START_SECONDS = 120.0
POLL_SECONDS = 0.2
SIGNALS_OF_THE_JOB = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
SIOCGIFADDR = 0x8915
_libc = ctypes.CDLL(None)


class ClusterLost(Exception):  # noqa: N818 - not an error of the pipeline's
    """Ray's head died: the cluster is to be begun again."""


class NodeLost(Exception):  # noqa: N818
    """A node did not come, or is gone: the allocation is of no more use."""


@dataclass(frozen=True)
class Meeting:
    """What the nodes of a job tell one another, in a file that only the user can read.

    Attributes:
        address: of the cluster; None once it is over.
        token: whoever has it may use the cluster; a new one for every cluster.
        environment: of the head; nodes with another one are refused.
    """

    address: str | None
    token: str
    environment: Fingerprint

    def publish(self, path: Path) -> None:
        """Write it, whole and readable for its owner alone."""
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(asdict(self), file)
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Meeting | None:
        """What was published last; None if nothing was yet."""
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        return cls(content["address"], content["token"], Fingerprint(**content["environment"]))


class RayNode:
    """Ray's daemons on this machine, in a private folder that is removed with them; a context manager.

    They never see the signals that Slurm sends to all processes of a job: trainings end by the store, after
    a checkpoint. If this process dies, the kernel kills them.
    """

    def __init__(self, token: str, ip: str, cpus: int, gpus: int | None, temporary: Path) -> None:
        """Prepare; nothing is started.

        Args:
            token: of the cluster.
            ip: the address of this machine that the others reach it by.
            cpus: that Ray may use.
            gpus: that Ray may use; None: those it finds.
            temporary: a folder of this machine alone, with a short name: sockets lie in it.
        """
        self.ip, self.token = ip, token
        self.address = ""
        self._cpus, self._gpus, self._temporary = cpus, gpus, temporary
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """Where sockets, logs and the token lie while it runs."""
        assert self._folder is not None, "started"
        return self._folder

    def start(self, head: str | None = None) -> None:
        """Start the daemons, a head or a node of the cluster at `head`; those that ran are ended."""
        self.stop()
        self._folder, self._lock = _new_folder(self._temporary)
        token_file = self._folder / "token"
        token_file.touch(0o600)
        token_file.write_text(self.token)
        where = ["--address", head] if head else ["--head", "--port", str(self._free_port())]
        options = {
            "node-ip-address": self.ip,
            "num-cpus": self._cpus,
            "object-store-memory": OBJECT_STORE_BYTES,
            "temp-dir": self._folder / "r",  # Ray opens it to everybody, but not the folder around it
            "include-log-monitor": "false",  # the driver does not show workers' output
            # Ports: any that is free, so that jobs on one node do not meet.
            "min-worker-port": 0,
            "max-worker-port": 0,
            "node-manager-port": 0,
            "object-manager-port": 0,
            "dashboard-agent-listen-port": 0,
            "dashboard-agent-grpc-port": 0,
            "runtime-env-agent-port": 0,
            "metrics-export-port": 0,
        }
        if head is None:
            options |= {"include-dashboard": "false", "ray-client-server-port": self._free_port()}
            self.address = f"{self.ip}:{where[-1]}"
        if self._gpus is not None:
            options["num-gpus"] = self._gpus
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with (self._folder / "ray.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where, *words],
                env=os.environ | self.environment() | _interface_of(self.ip),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_shield,  # noqa: PLW1509 - there are no threads here
            )

    def environment(self) -> dict[str, str]:
        """What a process needs to use the cluster, and what is the same for every node of it."""
        own = QUIET | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"),
            # Ray would give way to everybody (nice 15), and starve on a shared node.
            "RAY_worker_niceness": "0",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if self.ip == LOOPBACK:  # elsewhere Ray takes it for the machine's outer address
            own["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        return own

    def is_alive(self) -> bool:
        """Whether the daemons run: when one of them dies, `ray start` ends with all."""
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        """The last lines of what Ray said."""
        return "\n".join((self.folder / "ray.log").read_text(errors="replace").splitlines()[-5:])

    def stop(self) -> None:
        """Kill the daemons and remove what they left; twice is harmless."""
        if self._process is not None:
            self._process.kill()  # the kernel takes the daemons with it, and they their workers
            self._process.wait()
            self._process = None
        if self._folder is not None:
            _end_users_of(self._folder)
            shutil.rmtree(self._folder, ignore_errors=True)
            os.close(self._lock)
            self._folder = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _free_port(self) -> int:
        """A port below those that the kernel hands out, so that it stays free until it is used."""
        while True:
            port = secrets.choice(PORTS)
            try:
                socket.create_server((self.ip, port)).close()
            except OSError:
                continue
            return port


def new_token() -> str:
    """A token for a cluster."""
    return secrets.token_hex(32)


def wait_for_nodes(head: RayNode, count: int, waiting: Callable[[], None]) -> None:
    """Wait until `count` nodes have joined the cluster of `head`.

    Args:
        head: started.
        count: of nodes, the head included.
        waiting: called while there is nothing to do but wait.

    Raises:
        ClusterLost: the head died.
        NodeLost: a node did not come in START_SECONDS.
    """
    deadline, joined = time.monotonic() + START_SECONDS, 0
    while joined < count:
        if not head.is_alive():
            raise ClusterLost(f"Ray's head did not start:\n{head.log()}")
        if time.monotonic() > deadline:
            raise NodeLost(f"of {count} nodes {joined} joined the Ray cluster in {START_SECONDS:.0f} s")
        waiting()
        joined = living_nodes(head)


def living_nodes(head: RayNode) -> int:
    """How many nodes the cluster of `head` has; 0 if it does not answer."""
    host, _, port = head.address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1.0).close()  # Ray itself would try for long
    except OSError:
        return 0
    os.environ.update(head.environment())
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.gcs_pb2 import GcsNodeInfo  # type: ignore[attr-defined]
    from ray.exceptions import RayError

    try:
        nodes = GcsClient(address=head.address).get_all_node_info(timeout=10)
    except RayError:
        return 0
    return sum(node.state == GcsNodeInfo.ALIVE for node in nodes.values())


def own_address(towards: str | None) -> str:
    """The address of this machine that reaches the host `towards`; loopback if there is no other host."""
    if towards is None:
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))  # sends nothing
        address: str = probe.getsockname()[0]
    return address


def _interface_of(ip: str) -> dict[str, str]:
    """Make gloo talk over the interface of `ip`: it would take the one that the host's name resolves to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                packed = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # it has no address
            if socket.inet_ntoa(packed[20:24]) == ip:
                return {"GLOO_SOCKET_IFNAME": name}
    return {}


def die_with_parent() -> None:
    """In a new process: be killed when the process that started it is gone."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _shield() -> None:
    """In a new process: never see the job's signals, nor let its children see them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS_OF_THE_JOB)
    die_with_parent()


def _new_folder(temporary: Path) -> tuple[Path, int]:
    """A folder and its lock, which goes with this process; those without an owner are removed."""
    gate = os.open(temporary / f"pbkd-{os.getuid()}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        _remove_abandoned(temporary)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=temporary))
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    finally:
        os.close(gate)
    return folder, lock


def _remove_abandoned(temporary: Path) -> None:
    """Remove what jobs left that were killed on this machine: nobody holds the locks of their folders."""
    for folder in temporary.glob(f"{PREFIX}*"):
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:
            continue  # it is gone, or another user's
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            _end_users_of(folder)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def _end_users_of(folder: Path) -> None:
    """Kill what of the daemons is left: processes of this user with `folder` in their command line."""
    deadline = time.monotonic() + 10.0
    while left := [pid for pid in _processes_of(folder) if pid != os.getpid()]:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > deadline:
            return  # not to be killed: in an uninterruptible wait for a disk
        time.sleep(0.05)


def _processes_of(folder: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
            words = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
        except OSError:
            continue
        if state not in "ZX" and f"{folder}/".encode() in words:
            found.append(int(path.name))
    return found
