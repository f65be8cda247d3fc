"""Does to jobs of `pbkd slurm run`, on a real two-node Slurm, what happens to jobs, and asks what was lost.

    python -m benchmarks.slurm_faults [FAULT...]

Starts a Slurm of its own (benchmarks/slurm_lab; root), trains benchmarks/faults.yaml's teacher with one
worker on each of two nodes, does one fault to each job, and compares with a run of the same recipe by two
processes of this machine. A job has survived if every stage ends with the same weights and nothing is left
running. Steps are logged by the processes themselves. Appends a row for each fault to
benchmarks/results/slurm_faults.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks.faults import ROOT
from benchmarks.slurm_jobs import INTERVAL, LONGEST_SECONDS, PBKD, TRAINING, Bench, Job, wait_until
from benchmarks.slurm_lab import SlurmLab
from pipelines.jobs import processor

RESULTS = Path(__file__).parent / "results" / "slurm_faults.csv"
SLOW_SECONDS = 40.0
LOG_HOSTS = """
def log_hosts(module):
    import socket
    take_step = module._Training.take_step
    def logged(training, *arguments):
        with open(os.environ["PBKD_FAULTS_LOG"] + ".hosts", "a") as log:
            log.write(socket.gethostname() + "\\n")
        take_step(training, *arguments)
    module._Training.take_step = logged

when_imported("pbkd.engine.loop", log_hosts)
"""


@dataclass(frozen=True)
class Outcome:
    """What came of one fault.

    Attributes:
        survived: the weights are those of an undisturbed run, and nothing is left.
        steps_repeated: of the steps taken before the fault; None: not asked.
        restarts: how often the job was begun, less one.
        recovery_seconds: from the last fault to the first step after it.
        queue_seconds: of these, until the job was begun again, which is Slurm's to decide.
        cluster_seconds: from the first beginning of the job until Ray was up on all nodes.
        first_step_seconds: from submission to the first training step.
    """

    fault: str
    survived: bool
    steps_repeated: int | None
    restarts: int
    recovery_seconds: float | None
    queue_seconds: float | None
    cluster_seconds: float | None = None
    first_step_seconds: float | None = None


# What happens to jobs. Each gets a job that has taken steps, and returns when it was done.


def time_limit(job: Job, bench: Bench) -> None:
    """The signal that Slurm sends before the end of the time."""
    bench.lab.ask("scancel", "--signal=USR2", job.id)


def preemption(job: Job, bench: Bench) -> None:
    """A job of a partition with a higher priority takes the nodes."""
    bench.lab.ask(
        "sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )


def worker_raylet_killed(job: Job, bench: Bench) -> None:
    """Ray's daemon on the second node dies."""
    os.kill(_raylet(job, head=False), signal.SIGKILL)


def head_raylet_killed(job: Job, bench: Bench) -> None:
    """Ray's daemon on the first node dies, and with it the cluster."""
    os.kill(_raylet(job, head=True), signal.SIGKILL)


def worker_node_lost(job: Job, bench: Bench) -> None:
    """The second node loses power, and comes back after Slurm has noticed."""
    _lose(bench, "n2", until_noticed=True)


def worker_node_blinks(job: Job, bench: Bench) -> None:
    """The second node loses power, and is back before Slurm has noticed."""
    _lose(bench, "n2", until_noticed=False)


def head_node_lost(job: Job, bench: Bench) -> None:
    """The first node loses power, and comes back after Slurm has noticed."""
    _lose(bench, "n1", until_noticed=True)


def head_node_blinks(job: Job, bench: Bench) -> None:
    """The first node loses power, and is back before Slurm has noticed."""
    _lose(bench, "n1", until_noticed=False)


def store_slow(job: Job, bench: Bench) -> None:
    """Each operation on the shared folder takes a second longer, for a while; nobody is to give up."""
    slow = job.store.parent / "slow"
    slow.touch()
    time.sleep(SLOW_SECONDS)
    slow.unlink()


def task_killed(job: Job, bench: Bench) -> None:
    """The supervisor on the first node gets SIGKILL, as from the kernel when memory is short."""
    (pid,) = [
        pid
        for pid in job.processes("submitit.core._submit")
        if b"SLURM_PROCID=0" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        and not Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"srun\0")
    ]
    os.kill(pid, signal.SIGKILL)


FAULTS: dict[str, Callable[[Job, Bench], None]] = {
    fault.__name__: fault
    for fault in (
        time_limit,
        preemption,
        worker_raylet_killed,
        head_raylet_killed,
        task_killed,
        worker_node_lost,
        worker_node_blinks,
        head_node_lost,
        head_node_blinks,
        store_slow,
    )
}


def suffer(bench: Bench, *faults: str, is_contained: bool = False) -> Outcome:
    """Train on two nodes; do the faults one after another, each after some steps; see how it ends."""
    expected, store = bench.expected(), bench.store()
    job = Job(bench, store, *TRAINING, is_contained=is_contained)
    job.wait_for_steps(1)
    first_step = time.time() - job.submitted_at
    recovery, queued = None, None
    for fault in faults:
        job.wait_for_steps(2 * INTERVAL)
        begun, former, done_at = job.status()["begun"], job.workers(), time.time()
        FAULTS[fault](job, bench)
        if fault != "store_slow":  # which the workers are to live through
            recovery = job.wait_for_other_workers(former) - done_at
        is_restarted = job.status()["begun"] > begun
        queued = job.event("begun", -1) - done_at if is_restarted else None
    end = job.wait()
    digests = _digests(store)
    survived = end["code"] == 0 and digests == expected and job.is_clean() and job.accounted() == "COMPLETED"
    cluster = next(event["seconds"] for event in end["events"] if event["type"] == "cluster up")
    restarts = end["begun"] - 1
    return Outcome(
        "+".join(faults), survived, job.steps_repeated(), restarts, recovery, queued, cluster, first_step
    )


def cancelled(bench: Bench) -> Outcome:
    """`scancel`, then the same command again: nothing is requeued, and nothing is lost."""
    expected, store = bench.expected(), bench.store()
    job = Job(bench, store, *TRAINING)
    job.wait_for_steps(2 * INTERVAL)
    bench.lab.ask("scancel", job.id)
    job.wait_until_over()
    stopped = job.status()
    is_stopped = stopped["begun"] == 1 and stopped["state"] in ("stopped", "cancelled")
    again = Job(bench, store, *TRAINING)
    again.wait_for_steps(1)
    recovery = time.time() - again.submitted_at
    survived = again.wait()["code"] == 0 and _digests(store) == expected and again.is_clean()
    return Outcome("scancel", survived and is_stopped, again.steps_repeated(), 0, recovery, None)


def submitted_twice(bench: Bench) -> Outcome:
    """The same recipe in two jobs at once, each on a node of its own: one trains, the other waits for it."""
    expected, store = bench.expected(), bench.store()
    jobs = [Job(bench, store, *TRAINING, nodes=1) for _ in range(2)]
    codes = [job.wait()["code"] for job in jobs]
    survived = codes == [0, 0] and _digests(store) == expected and all(job.is_clean() for job in jobs)
    return Outcome("submitted_twice", survived, jobs[0].steps_repeated(), 0, None, None)


def searched(bench: Bench) -> Outcome:
    """No fault, but a search: each node carries trials, and what trials share runs once, on either."""
    space, trials = "stabilization_lengths", ["--trials", "4", "--sampler", "fixed"]
    here, store = bench.store(), bench.store()
    subprocess.run(
        [*PBKD, "tune", space, bench.recipe, *trials, "--store", here, "--json"],
        env=os.environ | {"RAY_worker_niceness": "0"},  # by itself Ray gives way to everybody
        cwd=ROOT, stdout=subprocess.DEVNULL, check=True, timeout=LONGEST_SECONDS,
    )  # fmt: skip
    job = Job(bench, store, *trials, space=space, hook=LOG_HOSTS)
    job.wait_for_steps(1)
    first_step = time.time() - job.submitted_at
    end = job.wait()
    told = subprocess.run(
        [*PBKD, "tune", space, bench.recipe, *trials, "--report", "--store", store, "--json"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=LONGEST_SECONDS,
    )  # fmt: skip
    report = json.loads(told.stdout)
    is_shared = report["stages_run"] == report["stages_distinct"] < report["stages_requested"]
    hosts = set((store.parent / "steps.hosts").read_text().split())
    survived = end["code"] == 0 and _digests(store) == _digests(here) and job.is_clean()
    cluster = next(event["seconds"] for event in end["events"] if event["type"] == "cluster up")
    is_spread = hosts == {"n1", "n2"}
    return Outcome("search", survived and is_shared and is_spread, None, 0, None, None, cluster, first_step)


def _digests(store: Path) -> dict[str, str]:
    """The weights of every finished stage, by key."""
    manifests = [json.loads(path.read_bytes()) for path in (store / "manifests").glob("*.json")]
    return {manifest["key"]: manifest["digest"] for manifest in manifests}


def _raylet(job: Job, head: bool) -> int:
    """The raylet of the first node, or of the second."""
    found = [
        pid
        for pid in job.processes("raylet/raylet")
        if ("--head" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")) == head
    ]
    return found[0]


def _lose(bench: Bench, node: str, *, until_noticed: bool) -> None:
    bench.lab.lose_node(node)
    if until_noticed:
        wait_until(
            lambda: "down" in bench.lab.ask("sinfo", "-h", "-n", node, "-o", "%t"), f"{node} to be down"
        )
    bench.lab.bring_node_back(node)


def _record(outcome: Outcome) -> None:
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(
                [field.name for field in fields(Outcome)] + ["load", "processor", "torch", "date"]
            )
        row = [round(cell, 1) if isinstance(cell, float) else cell for cell in astuple(outcome)]
        load = f"{os.getloadavg()[1]:.1f}"  # processes that ran or would have, in the last five minutes
        writer.writerow([*row, load, processor(), torch.__version__, datetime.now(UTC).date().isoformat()])


def main() -> None:
    """The command. Exit code 1 if a job did not survive."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    known = [*FAULTS, "time_limit_in_container", "requeued_twice", "scancel", "submitted_twice", "search"]
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"one of {', '.join(known)}; all")
    arguments = parser.parse_args()
    special: dict[str, Callable[[Bench], Outcome]] = {
        "time_limit_in_container": lambda bench: replace(
            suffer(bench, "time_limit", is_contained=True), fault="time_limit_in_container"
        ),
        "requeued_twice": lambda bench: replace(
            suffer(bench, "time_limit", "preemption"), fault="requeued_twice"
        ),
        "scancel": cancelled,
        "submitted_twice": submitted_twice,
        "search": searched,
    }
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # and the lab is stopped
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="pbkd-slurm-faults-") as place:
        lab = SlurmLab()
        lab.start()
        try:
            with Bench(lab, Path(place)) as bench:
                for name in arguments.faults or known:
                    try:
                        outcome = special[name](bench) if name in special else suffer(bench, name)
                    except (TimeoutError, subprocess.CalledProcessError) as error:
                        sys.stderr.write(f"{name}: {error}\n")
                        lab.ask("scancel", "--user=root")
                        outcome = Outcome(name, False, None, 0, None, None)
                    outcomes.append(outcome)
                    _record(outcome)
                    sys.stdout.write(f"{outcome}\n")
                    sys.stdout.flush()
        finally:
            lab.stop()
    if not all(outcome.survived for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
