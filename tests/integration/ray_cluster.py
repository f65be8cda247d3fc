"""A Ray cluster as an administrator starts it, which `ray job` and `pbkd` commands join."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from benchmarks.marked_processes import MARK, marked_processes
from pipelines.ray_settings import QUIET
from tests.integration.pbkd_process import ROOT, SECONDS, until

BIN = Path(sys.executable).parent


class Cluster:
    """A Ray cluster of one node with two CPUs, on loopback, that answers only to its token.

    Attributes:
        folder: of its token.
        dashboard: its port.
        address: of the cluster itself, HOST:PORT.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        """Start one whose workers see the variables of `environment`."""
        self.folder = folder
        self._mark = uuid.uuid4().hex
        (folder / "token").write_text("5" * 64)
        self._home = Path(tempfile.mkdtemp(prefix="pbkd-", dir="/tmp"))  # a short name, for sockets
        port, self.dashboard = _free_ports(2)
        self.address = f"127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [
                BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
                "--num-cpus=2", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
                f"--dashboard-port={self.dashboard}", "--dashboard-agent-listen-port=0",
                f"--temp-dir={self._home}", "--min-worker-port=0", "--max-worker-port=0",
                "--include-log-monitor=false",
            ],
            env=self.environment() | environment | {MARK: self._mark},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def environment(self, token: str = "token") -> dict[str, str]:
        """What `ray` needs to reach it, with the token of that file."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PBKD_"))}
        return (
            kept
            | QUIET
            | {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(self.folder / token),
                "RAY_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
                "RAY_worker_niceness": "0",
                "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            }
        )

    def ray(self, *words: str, token: str = "token") -> subprocess.CompletedProcess[str]:
        """What `ray job WORDS` says, typed in the checkout."""
        return subprocess.run(
            [BIN / "ray", "job", *words],
            cwd=ROOT, env=self.environment(token), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=SECONDS, check=False,
        )  # fmt: skip

    def answers(self) -> bool:
        """Whether it takes jobs."""
        try:
            self._asked("jobs/")
        except OSError:  # among them HTTP's errors
            return False
        return True

    def status(self, job: str) -> str:
        """What it says of a job, as `ray job status` does, which takes three seconds to start."""
        return str(self._asked(f"jobs/{job}")["message"])

    def _asked(self, what: str) -> Any:
        token = (self.folder / "token").read_text()
        url, header = f"http://127.0.0.1:{self.dashboard}/api/{what}", {"Authorization": f"Bearer {token}"}
        with urlopen(Request(url, headers=header), timeout=SECONDS) as answer:
            return json.load(answer)

    def for_runs(self) -> dict[str, str]:
        """The environment in which a `pbkd` command joins it."""
        names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
        return {name: self.environment()[name] for name in names} | {"RAY_ADDRESS": self.address}

    def processes(self, words: str) -> list[int]:
        """Those with `words` in their command line, of whatever run has joined it."""
        return marked_processes(self._mark, words)

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        until(self._is_over, "the cluster's processes to end, which write below its folder until then")

    def _is_over(self) -> bool:
        left = marked_processes(self._mark)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        shutil.rmtree(self._home, ignore_errors=True)
        return not left and not self._home.exists()


def _free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports
