"""Ask free compute nodes, before a job waits for hours, if they see the store and have the same Python."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pbkd.errors import UserError
from slurm.allocation import Allocation
from slurm.fingerprint import Fingerprint

IMMEDIATELY_SECONDS = 3
SECONDS = 120
BUSY = (
    "Immediate execution impossible",
    "Requested nodes are busy",
    "Unable to allocate resources: Job/step",
)


def probe(allocation: Allocation, paths: Sequence[Path]) -> list[str]:
    """Compare this machine with as many nodes as are asked for; returns what could not be found out.

    Asked is the Python of the tasks, in their container, and then the one outside that ends the job.

    Raises:
        UserError: a node lacks one of `paths`, cannot start Python, or has another Python, package or pbkd.
    """
    if allocation.python is None:
        return _ask(allocation, shlex.quote(sys.executable), allocation.srun, paths)
    return _ask(allocation, allocation.python, allocation.srun, paths) or _ask(
        allocation, shlex.quote(sys.executable), (), paths
    )


def _ask(allocation: Allocation, python: str, srun: Sequence[str], paths: Sequence[Path]) -> list[str]:
    command = _command(allocation, python, srun, paths)
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return [f"the compute nodes did not answer in {SECONDS} s; the job itself compares, when it starts"]
    if any(word in found.stderr for word in BUSY):
        return ["no node is free to be asked; the job itself compares environments, when it starts"]
    reports = [json.loads(line) for line in found.stdout.splitlines() if line.startswith('{"host"')]
    here = Fingerprint.here()
    for report in reports:
        host = report["host"]
        if report["missing"]:
            raise UserError(
                f"{report['missing'][0]}: compute node {host} does not see it\n"
                "store, recipe and code have to lie on a file system that all nodes share; --store DIR"
            )
        if differences := here.differences(Fingerprint(**report["fingerprint"])):
            raise UserError(
                f"compute node {host} has {', '.join(differences)} (on this machine)\n"
                "use one Python environment on a shared folder, or `setup` in the site profile"
            )
    if found.returncode != 0 or len(reports) < allocation.nodes:
        said = [line for line in found.stderr.splitlines() if line.strip()] or ["nothing"]
        raise UserError(
            f"compute nodes cannot start Python ({python}): {said[0].removeprefix('srun: error: ')}\n"
            "it has to lie where all nodes see it; see `setup` and `python` of the site profile"
        )
    return []


def _command(allocation: Allocation, python: str, srun: Sequence[str], paths: Sequence[Path]) -> list[str]:
    given = {
        "partition": allocation.partition,
        "account": allocation.account,
        "qos": allocation.qos,
        "nodes": allocation.nodes,
        "gpus-per-node": allocation.gpus_per_node or None,
        "time": 2,
        "ntasks-per-node": 1,
        "immediate": IMMEDIATELY_SECONDS,
        "job-name": "pbkd-probe",
        "chdir": "/",  # this folder, too, may not be there
    } | allocation.flags()
    options = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in given.items()
        if value not in (None, False)
    ]
    line = f"{python} -m slurm.fingerprint {shlex.join(map(str, paths))}"
    return ["srun", *options, *srun, "bash", "-c", "\n".join([*allocation.setup, line])]
