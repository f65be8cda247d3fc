"""`pbkd` commands forked of a process that has imported what they import: seconds for each are saved.

But for that they are what `python -m pipelines.cli` makes: a process of its own session, with its own
environment and output, that ends as Python does.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from importlib import import_module
from pathlib import Path
from select import select

IMPORTED = [
    "pipelines.seldom_collected",
    "pipelines.run",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
]
"""Not Ray, which reads the environment when it is imported."""
MESSAGE_BYTES = 1 << 17


class ForkedCommand:
    """A running command, with the interface of `subprocess.Popen`."""

    def __init__(
        self, arguments: list[str], folder: Path, environment: dict[str, str], out: int, err: int
    ) -> None:
        """Start it in `folder`, with these file descriptors as stdout and stderr."""
        answers, written = os.pipe()
        try:
            order = {"arguments": arguments, "folder": str(folder), "environment": environment}
            socket.send_fds(_server(), [json.dumps(order).encode()], [out, err, written])
        finally:
            os.close(written)
        self._answers = os.fdopen(answers, "rb", buffering=0)
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None and select([self._answers], [], [], 0)[0]:
            self.returncode = int(self._answers.readline())
            self._answers.close()
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The exit code; raises subprocess.TimeoutExpired if it still runs after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if (left := deadline - time.monotonic()) <= 0:
                raise subprocess.TimeoutExpired("pbkd", timeout)
            select([self._answers], [], [], left)
        return code


@cache
def _server() -> socket.socket:
    """The way to this process's server, which ends with it."""
    from pipelines.cli import ENVIRONMENT  # not above: in the server, each command imports it for itself

    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(its.fileno())],
            env=os.environ | ENVIRONMENT,
            pass_fds=[its.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    @atexit.register
    def _end() -> None:
        ours.close()
        server.wait()

    return ours


def _command(orders: socket.socket) -> list[str] | None:
    """Fork for each order: returns in the command's process what to do; None when nobody can order more."""
    while True:
        message, descriptors, *_ = socket.recv_fds(orders, MESSAGE_BYTES, 3)
        if not message:
            return None
        order = json.loads(message)
        out, err, answers = descriptors
        if os.fork() == 0:  # who waits for the command
            orders.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if (command := os.fork()) == 0:
                os.setsid()
                os.dup2(out, 1)
                os.dup2(err, 2)
                os.write(answers, b"%d\n" % os.getpid())
                for descriptor in descriptors:
                    os.close(descriptor)
                os.chdir(order["folder"])
                os.environ.clear()
                os.environ.update(order["environment"])
                return order["arguments"]
            _, status = os.waitpid(command, 0)
            os.write(answers, b"%d\n" % os.waitstatus_to_exitcode(status))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _serve(descriptor: int) -> None:
    for name in IMPORTED:
        import_module(name)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who wait for commands end unseen
    arguments = _command(socket.socket(fileno=descriptor))
    if arguments is not None:
        sys.argv[1:] = arguments
        runpy.run_module("pipelines.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
