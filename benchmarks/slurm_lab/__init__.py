"""A real two-node Slurm on this machine, for tests and for measurements of what happens when nodes fail.

Nodes are namespaces, daemons are Debian's; needs root and the right to make namespaces and network devices.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
START_SECONDS = 120
DAEMONS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "ip")
NEEDED = {
    "namespaces": ["true"],
    "mounts in them": ["mount", "-t", "tmpfs", "shm", "/mnt"],
    "network bridges": ["ip", "link", "add", "bridge0", "type", "bridge"],
    "virtual network devices": ["ip", "link", "add", "one", "type", "veth", "peer", "name", "other"],
}
"""What the nodes are made of, and how to try it without leaving anything."""
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def why_not() -> str | None:
    """Why no Slurm can be started here; None if it can, as far as one can know before trying."""
    if os.geteuid() != 0:
        return "it needs root, to make nodes of namespaces; run the tests as root"
    if missing := [name for name in DAEMONS if shutil.which(name, path=PATH) is None]:
        return f"{', '.join(missing)} not found: make slurm"
    for needed, words in NEEDED.items():
        try:
            found = subprocess.run(
                ["unshare", "--net", "--uts", "--pid", "--mount", "--fork", *words],
                env=os.environ | {"PATH": PATH}, capture_output=True, text=True, check=False,
            )  # fmt: skip
        except OSError as error:
            return f"unshare: {error.strerror}"
        if found.returncode != 0:
            return f"it needs {needed}, and this machine allows none: {found.stderr.strip()}"
    return None


class SlurmLab:
    """Nodes n1 and n2, partitions `main` and `urgent`, which takes the nodes of jobs in `main`."""

    def __init__(self) -> None:
        """Make a folder that the users of its daemons may enter; `stop` removes it."""
        self.folder = Path(tempfile.mkdtemp(prefix="pbkd-slurm-"))
        self.folder.chmod(0o755)

    def start(self) -> None:
        """Start it. Raises RuntimeError with what was said if that fails; nothing runs then."""
        log = self.folder / "start.log"
        with log.open("wb") as out:  # no pipe: what it starts would keep it open
            started = subprocess.run(
                [HERE / "start_slurm.sh", self.folder],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=START_SECONDS, check=False,
            )  # fmt: skip
        if started.returncode != 0:
            said = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            self.stop()
            raise RuntimeError(said)

    def stop(self) -> None:
        """End all that was started."""
        subprocess.run([HERE / "stop_slurm.sh", self.folder], check=True, timeout=60)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """What Slurm's commands need."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def ask(self, *command: str) -> str:
        """What a command of Slurm says."""
        return subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()

    def lose_node(self, name: str) -> None:
        """Kill a node with all that runs on it, as a power cut does."""
        pid = self.folder / "run" / f"node.{name}.pid"
        os.kill(int(pid.read_text()), signal.SIGKILL)
        pid.unlink()

    def bring_node_back(self, name: str) -> None:
        """Switch it on again."""
        subprocess.run([HERE / "start_node.sh", self.folder, name.removeprefix("n")], check=True, timeout=60)
