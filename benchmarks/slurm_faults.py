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
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import LOG_STEPS, ROOT, prepared_recipe
from benchmarks.injected import injected
from benchmarks.marked_processes import MARK, marked_processes
from benchmarks.slurm_lab import SlurmLab
from pipelines.jobs import processor
from pipelines.tracking import connect

RESULTS = Path(__file__).parent / "results" / "slurm_faults.csv"
STEPS, RANKS, INTERVAL = 300, 2, 20
TRAINING = (
    f"stages.teacher.steps={STEPS}", "compute.workers=2", "compute.executor=ray", "compute.fuse=false",
    f"compute.checkpoint_steps={INTERVAL}", "--until", "teacher",
)  # fmt: skip
LONGEST_SECONDS = 600.0
SLOW_SECONDS = 40.0
SLOW_STORE = """
def slow_down(module):
    import time
    for name in ("read", "create", "replace", "append", "names"):
        def slow(self, *given, _method=getattr(module.Folder, name), **named):
            if os.path.exists(os.environ["PBKD_FAULTS_SLOW"]):
                time.sleep(1.0)
            return _method(self, *given, **named)
        setattr(module.Folder, name, slow)

when_imported("pbkd.storage", slow_down)
"""
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Outcome:
    """What came of one fault.

    Attributes:
        survived: the weights are those of an undisturbed run, and nothing is left.
        steps_repeated: of the steps taken before the fault.
        restarts: how often the job was begun, less one.
        recovery_seconds: from the last fault to the first step after it.
        queue_seconds: of these, until the job was begun again, which is Slurm's to decide.
        cluster_seconds: from the first beginning of the job until Ray was up on all nodes.
        first_step_seconds: from submission to the first training step.
    """

    fault: str
    survived: bool
    steps_repeated: int
    restarts: int
    recovery_seconds: float | None
    queue_seconds: float | None
    cluster_seconds: float | None = None
    first_step_seconds: float | None = None


class Bench:
    """A Slurm, and a folder for stores and logs of steps."""

    def __init__(self, lab: SlurmLab, folder: Path) -> None:
        """Use a lab that runs."""
        self.lab, self.folder, self.recipe = lab, folder, prepared_recipe(folder)
        self.temporary = tempfile.TemporaryDirectory(prefix="p-", dir="/tmp")  # sockets want short names
        self._database: Path | None = None
        self._expected: dict[str, str] | None = None

    def store(self) -> Path:
        """A new store, empty but for MLflow's database, which takes MLflow seconds to make."""
        if self._database is None:
            self._database = self.folder / "mlflow.db"
            connect(f"sqlite:///{self._database}").search_experiments()
        store = self.folder / uuid.uuid4().hex[:8] / "runs"
        (store / "mlflow").mkdir(parents=True)
        shutil.copy(self._database, store / "mlflow" / "mlflow.db")
        return store

    def expected(self) -> dict[str, str]:
        """The weights of the training by two processes of this machine, undisturbed."""
        if self._expected is None:
            found = subprocess.run(
                [
                    *_PBKD, "run", self.recipe, *TRAINING, "compute.executor=local",
                    "--store", self.store(), "--json",
                ],
                cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=LONGEST_SECONDS,
            )  # fmt: skip
            report = json.loads(found.stdout)
            self._expected = {stage["key"]: stage["digest"] for stage in report["stages"]}
        return self._expected


class Job:
    """A job submitted by `pbkd slurm run`, and every process that comes of it."""

    def __init__(
        self,
        bench: Bench,
        store: Path,
        *arguments: object,
        recipe: Path | None = None,
        nodes: int = 2,
        minutes: int = 30,
    ) -> None:
        """Submit it."""
        self._bench, self.store = bench, store
        self._mark = uuid.uuid4().hex
        where = ["--nodes", nodes, "--cpus-per-node", 2 // nodes, "--time", minutes, "--store", store]
        environment = {
            MARK: self._mark,
            "PBKD_FAULTS_LOG": str(store.parent / "steps"),
            "PBKD_SLURM_PROFILES": str(_profile(store.parent, bench.temporary.name)),
            "PBKD_FAULTS_SLOW": str(store.parent / "slow"),
            **injected(LOG_STEPS + SLOW_STORE, store.parent / "hook"),
        }
        self._environment = os.environ | bench.lab.environment | environment
        self.submitted_at = time.time()
        told = self.pbkd("run", recipe or bench.recipe, *arguments, *where, "--json")
        self.id: str = json.loads(told)["jobs"][0]

    def pbkd(self, *words: object) -> str:
        """What `pbkd slurm WORDS` says; raises CalledProcessError if it fails."""
        command = [*_PBKD, "slurm", *map(str, words)]
        return subprocess.run(
            command,
            env=self._environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=120,
        ).stdout

    def status(self) -> dict[str, Any]:
        """What `pbkd slurm status` knows."""
        row: dict[str, Any] = json.loads(self.pbkd("status", self.id, "--store", self.store, "--json"))[
            "jobs"
        ][0]
        return row

    def steps(self) -> list[str]:
        """Every step taken so far in this store, by each rank: its process, the training, its number."""
        log = self.store.parent / "steps"
        return log.read_text().splitlines() if log.exists() else []

    def steps_repeated(self) -> int:
        """How many steps have been taken more than once by a rank."""
        return len(self.steps()) - RANKS * STEPS

    def wait_for_steps(self, count: int) -> None:
        """Wait until so many steps more have been taken."""
        goal = len(self.steps()) + count
        wait_until(lambda: len(self.steps()) >= goal, f"{count} more steps of job {self.id}", self)

    def wait_for_other_workers(self, former: set[str]) -> float:
        """Wait until processes have taken steps that are not among `former`; returns when."""
        wait_until(lambda: self.workers() - former, "the training to go on", self)
        return time.time()

    def workers(self) -> set[str]:
        """The processes that have taken steps."""
        return {line.partition(" ")[0] for line in self.steps()}

    def wait(self) -> dict[str, Any]:
        """Wait for the end; the status then."""
        wait_until((self.store / "slurm" / self.id / "ended.json").exists, "the end", self)
        return self.status()

    def processes(self, words: str = "") -> list[int]:
        """The living processes of the job with `words` in their command line, on whatever node."""
        return marked_processes(self._mark, words)

    def queue(self) -> str:
        """The job's state in Slurm's queue; empty once it has left it."""
        return self._bench.lab.ask("squeue", "--noheader", "--jobs", self.id, "--format", "%T")

    def wait_until_over(self) -> None:
        """Wait until the job has left the queue, and no process of it runs on any node."""
        wait_until(lambda: not self.queue(), "the queue to be empty", self)
        wait_until(lambda: not self.processes(), "the processes to be gone", self)

    def is_clean(self) -> bool:
        """Wait until it is over; whether no socket or log is left on a node then.

        Of a job that was killed, they are, until the next one comes.
        """
        self.wait_until_over()
        return not list(Path(self._bench.temporary.name).glob("pbkd-ray-*"))

    def event(self, type_: str, number: int = 0) -> float:
        """When something happened to the job for the `number`th time."""
        times = [event["time"] for event in self.status()["events"] if event["type"] == type_]
        return float(times[number])


_PBKD = [sys.executable, "-m", "pipelines.cli"]


def _profile(folder: Path, temporary: str) -> Path:
    """A site profile for short jobs."""
    path = folder / "profiles.yaml"
    path.write_text(f"default: {{grace_seconds: 45, probe: false, temporary: {temporary}}}\n")
    return path


def wait_until(condition: Callable[[], object], what: str, job: Job | None = None) -> None:
    """Wait for what others do, and no longer than LONGEST_SECONDS."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            said = job.pbkd("logs", job.id, "--store", job.store) if job else ""
            raise TimeoutError(f"waited {LONGEST_SECONDS:.0f} s in vain for {what}\n{said[-4000:]}")
        time.sleep(POLL_SECONDS)


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
    pids = job.processes("submitit.core._submit")
    os.kill(min(pids, key=lambda pid: "srun" in Path(f"/proc/{pid}/cmdline").read_text()), signal.SIGKILL)


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


def suffer(bench: Bench, *faults: str) -> Outcome:
    """Train on two nodes; do the faults one after another, each after some steps; see how it ends."""
    expected, store = bench.expected(), bench.store()
    job = Job(bench, store, *TRAINING)
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
    survived = end["code"] == 0 and digests == expected and job.is_clean()
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
            writer.writerow([field.name for field in fields(Outcome)] + ["processor", "torch", "date"])
        row = [round(cell, 1) if isinstance(cell, float) else cell for cell in astuple(outcome)]
        writer.writerow([*row, processor(), torch.__version__, datetime.now(UTC).date().isoformat()])


def main() -> None:
    """The command. Exit code 1 if a job did not survive."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    known = [*FAULTS, "requeued_twice", "scancel", "submitted_twice"]
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"one of {', '.join(known)}; all")
    arguments = parser.parse_args()
    special: dict[str, Callable[[Bench], Outcome]] = {
        "requeued_twice": lambda bench: suffer(bench, "time_limit", "preemption"),
        "scancel": cancelled,
        "submitted_twice": submitted_twice,
    }
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # and the lab is stopped
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="pbkd-slurm-faults-") as place:
        lab = SlurmLab()
        lab.start()
        try:
            bench = Bench(lab, Path(place))
            for name in arguments.faults or known:
                try:
                    outcome = special[name](bench) if name in special else suffer(bench, name)
                except TimeoutError as error:
                    sys.stderr.write(f"{name}: {error}\n")
                    lab.ask("scancel", "--user=root")
                    outcome = Outcome(name, False, 0, 0, None, None)
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
