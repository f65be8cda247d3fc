"""Ray clusters of several jobs on one machine: they do not meet, and of a killed job nothing stays."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from benchmarks.marked_processes import MARK, marked_processes
from slurm.ray_cluster import LOOPBACK, RayNode, new_token
from tests.integration.pbkd_process import ROOT, until

HEAD = """
import signal, sys
from pathlib import Path
from slurm.ray_cluster import LOOPBACK, RayNode, new_token
node = RayNode(new_token(), LOOPBACK, 1, 0, Path(sys.argv[1]))
node.start()
print(node.address, node.token, node.folder, flush=True)
signal.pause()
"""


@pytest.fixture
def temporary() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="p-", dir="/tmp") as folder:  # a short name, for sockets
        yield Path(folder)


def answer(address: str, token: str | None) -> str:
    """What the head at `address` says to whoever has `token`, or has none."""
    headers = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address) as channel:
        nodes = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            nodes.GetAllNodeInfo(gcs_service_pb2.GetAllNodeInfoRequest(), timeout=30, metadata=headers)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def is_up(address: str, token: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 1.0).close()  # gRPC itself would not try again at once
    except OSError:
        return False
    return answer(address, token) == "OK"


def wait_for(address: str, token: str, folder: Path) -> None:
    """Wait until the head and its raylet are up."""
    until(lambda: is_up(address, token), "a head")
    until((folder / "r" / "session_latest" / "sockets" / "raylet").exists, "a raylet")


def listening(folder: Path) -> set[str]:
    """The ports at which the daemons that have `folder` in their command line listen."""
    sockets = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{folder}/".encode() in (process / "cmdline").read_bytes():
                sockets |= {str(file.readlink()) for file in (process / "fd").iterdir()}
        except OSError:
            continue
    tables = [Path("/proc/net") / name for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return {row[1].partition(":")[2] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets}


def test_two_clusters_on_one_machine_do_not_meet_and_one_ends_without_the_other(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, mark := uuid.uuid4().hex)
    with (
        RayNode(new_token(), LOOPBACK, 1, 0, temporary) as one,
        RayNode(new_token(), LOOPBACK, 1, 0, temporary) as other,
    ):
        one.start()
        other.start()
        for node in (one, other):
            wait_for(node.address, node.token, node.folder)
            assert (node.folder / "token").stat().st_mode & 0o777 == 0o600
            assert node.folder.stat().st_mode & 0o777 == 0o700
        assert [answer(one.address, token) for token in (None, other.token)] == ["UNAUTHENTICATED"] * 2
        assert answer(other.address, one.token) == "UNAUTHENTICATED"
        ports = [listening(node.folder) for node in (one, other)]
        assert all(ports) and ports[0].isdisjoint(ports[1])
        left = one.folder
        one.stop()
        assert not left.exists() and answer(other.address, other.token) == "OK" and other.is_alive()
    # The kernel takes a moment to end what was killed.
    until(lambda: marked_processes(mark) in ([], [os.getpid()]), "the end of every process")
    assert not list(temporary.glob("pbkd-ray-*"))


def test_the_daemons_of_a_killed_job_end_and_the_next_one_removes_what_is_left(temporary: Path) -> None:
    mark = uuid.uuid4().hex
    killed = subprocess.Popen(
        [sys.executable, "-c", HEAD, temporary],
        cwd=ROOT, env=os.environ | {MARK: mark}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert killed.stdout is not None
    with killed.stdout as out:
        address, token, folder = out.readline().split()
        wait_for(address, token, Path(folder))
        with RayNode(new_token(), LOOPBACK, 1, 0, temporary) as node:
            node.start()
            assert answer(address, token) == "OK", "a job that runs is left alone"
            killed.send_signal(signal.SIGKILL)
            killed.wait()
            for daemon in ("ray.scripts.scripts", "gcs_server", "raylet/raylet"):
                until(lambda words=daemon: not marked_processes(mark, words), f"the end of {daemon}")
            assert Path(folder).exists()
            node.start()  # two agents of the raylet would notice only after a minute
            assert not Path(folder).exists() and not marked_processes(mark)
