"""What runs in every task of a job: Ray's nodes, and on the first one a `pbkd` command in their cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import submitit
from submitit.core.utils import UncompletedJobError

from slurm import scheduler
from slurm.fingerprint import Fingerprint
from slurm.ray_cluster import (
    POLL_SECONDS,
    ClusterLost,
    Meeting,
    NodeLost,
    RayNode,
    die_with_parent,
    living_nodes,
    new_token,
    own_address,
    wait_for_nodes,
)
from slurm.records import CANCEL, End, note, read_end, write_end

log = logging.getLogger("slurm")  # of all in this package

FINAL = (0, 1, 2)
RESTARTS = 3
MARGIN_SECONDS = 10.0
REQUEUE_SECONDS = 60.0
LOOK_SECONDS, LOST_SECONDS = 5.0, 60.0


class _Over(Exception):  # noqa: N818 - the way out, not an error
    """The job was declared ended, or is to be begun again, while the cluster was coming up."""


@dataclass
class ClusterJob:
    """A `pbkd` command in a Ray cluster over the allocation: submitit pickles it and calls it.

    Attributes:
        command: what is typed after `pbkd`.
        folder: where it was typed.
        jobs: where the job's folder is, named by its id.
        environment: Python, packages and code there; every node has to have the same.
        grace: seconds between the signal of an end that comes and the end.
        temporary: a folder of each node alone, with a short name.
        cpus, gpus: of each node; None: what Slurm has given, or the machine has.
    """

    command: tuple[str, ...]
    folder: Path
    jobs: Path
    environment: Fingerprint
    grace: float
    temporary: Path
    cpus: int | None
    gpus: int | None
    _run: _Run | None = field(default=None, init=False)

    def __call__(self) -> int:
        """Run as this task; returns the exit code of the command."""
        _log_to_stderr()
        task = submitit.JobEnvironment()
        self._run = run = _Run(self, task)
        try:
            code = run.lead() if task.global_rank == 0 else run.follow()
        except NodeLost as error:
            log.error("%s", error)
            raise SystemExit(1) from error  # it is for Slurm, or for `after_step`, to requeue
        except UncompletedJobError as error:  # submitit, in its handler of the signal
            write_end(run.place, End(140, f"{error} Submit it again: it goes on from its last checkpoint."))
            raise
        finally:
            run.close()
        return code

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """End the command with its state kept, before a time limit or preemption; what to run next time."""
        assert self._run is not None, "submitit calls it while the job runs"
        self._run.end_before_requeue()
        return submitit.helpers.DelayedSubmission(replace(self))  # as it was submitted


class _Run:
    """One task of the job, from its start to its end or requeue."""

    def __init__(self, job: ClusterJob, task: submitit.JobEnvironment) -> None:
        self.place = job.jobs / task.job_id
        self._job, self._task = job, task
        self._restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self._meeting = self.place / f"meeting-{self._restart}.json"
        self._token = new_token()  # for all clusters of this process: Ray reads it once
        self._driver: subprocess.Popen[bytes] | None = None
        self._node: RayNode | None = None

    def lead(self) -> int:
        """The first task: head of the cluster, and the command. Raises NodeLost if it is not the end."""
        hosts = list(self._task.hostnames)
        note(self.place, "begun", restart=self._restart, nodes=hosts)
        found = self._attempts(hosts)
        if found.code not in FINAL and not self._is_cancelled():
            note(self.place, "stopped", restart=self._restart, code=found.code)
            self.close()
            if scheduler.is_preempted():
                note(self.place, "requeued", restart=self._restart, why="preempted")
                scheduler.requeue()
                time.sleep(REQUEUE_SECONDS)  # Slurm ends it here
            raise NodeLost("Slurm ends this job, and nobody has cancelled it")
        write_end(self.place, found)
        end = read_end(self.place)
        assert end is not None, "just written"
        log.info("ended with code %d%s", end.code, f": {end.reason}" if end.reason else "")
        note(self.place, "ended", code=end.code)
        return end.code

    def _attempts(self, hosts: list[str]) -> End:
        """Run the command, in another cluster if the first is lost."""
        differences = self._job.environment.differences(Fingerprint.here())
        if differences and self._restart:  # somebody works on the code while a job runs
            log.warning("since the job was submitted, this has changed: %s", ", ".join(differences))
        elif differences:
            return self._refusal(differences, "the machine where it was submitted")
        end = End(1)
        for _ in range(RESTARTS + 1):
            try:
                return End(self._once(hosts))
            except ClusterLost as error:
                end = End(1, f"the Ray cluster was lost {RESTARTS + 1} times: {error}")
                log.warning("%s; it is begun again", error)
                note(self.place, "cluster lost", why=str(error))
            except _Over:
                return end  # somebody has declared another
            finally:
                self._end_processes()
        return end

    def follow(self) -> int:
        """Another task: a node of the cluster, started again if it dies, until the head says it is over."""
        here = Fingerprint.here()
        joined: Meeting | None = None
        while True:
            meeting = Meeting.read(self._meeting)
            if meeting is not None and (differences := meeting.environment.differences(here)):
                refusal = self._refusal(differences, "the first node")
                write_end(self.place, refusal)
                return refusal.code
            if meeting is not None and meeting.address is None:
                end = read_end(self.place)
                return end.code if end is not None else 0
            is_lost = self._node is not None and not self._node.is_alive()
            if meeting is not None and meeting.address is not None and (meeting != joined or is_lost):
                if is_lost:
                    log.warning(
                        "Ray died on this node and is started again:\n%s", self._node and self._node.log()
                    )
                self._end_processes()
                self._node = self._new_node(meeting.token, meeting.address.rpartition(":")[0])
                self._node.start(head=meeting.address)
                joined = meeting
            time.sleep(POLL_SECONDS)

    def _is_cancelled(self) -> bool:
        """Whether somebody wants this end, and no other beginning."""
        return (self.place / CANCEL).exists() or scheduler.job_id() == "" or scheduler.is_cancelled()

    def end_before_requeue(self) -> None:
        """Let the command keep its state; unless it came to its own end, the job is begun again."""
        log.info("the allocation ends: keeping the state of the trainings")
        code = None
        if self._driver is not None:
            _send(self._driver.pid, signal.SIGUSR2)
            deadline = time.monotonic() + self._job.grace - MARGIN_SECONDS
            while (code := _exit_code(self._driver.pid)) is None and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        note(self.place, "checkpointed", code=code, restart=self._restart)
        is_cancelled = (self.place / CANCEL).exists()
        if is_cancelled or code in FINAL:
            write_end(self.place, End(143 if code is None or code not in FINAL else code))
        self.close()
        if is_cancelled or code in FINAL:
            raise SystemExit(0)
        note(self.place, "requeued", restart=self._restart, why="signal")

    def close(self) -> None:
        """End what this task has started; the first one tells the others that it is over."""
        self._say_it_is_over()
        self._end_processes()

    def _say_it_is_over(self) -> None:
        if self._task.global_rank == 0 and (meeting := Meeting.read(self._meeting)) is not None:
            replace(meeting, address=None).publish(self._meeting)

    def _end_processes(self) -> None:
        if self._driver is not None:
            self._driver.kill()
            self._driver.wait()
            self._driver = None
        if self._node is not None:
            self._node.stop()
            self._node = None

    def _once(self, hosts: list[str]) -> int:
        """Bring a cluster up and run the command in it; returns its exit code."""
        began = time.monotonic()
        self._node = node = self._new_node(self._token, hosts[1] if len(hosts) > 1 else None)
        node.start()
        Meeting(node.address, node.token, Fingerprint.here()).publish(self._meeting)
        wait_for_nodes(node, len(hosts), self._look)
        seconds = time.monotonic() - began
        log.info("Ray is up on %d nodes after %.1f s at %s", len(hosts), seconds, node.address)
        note(self.place, "cluster up", seconds=seconds, nodes=len(hosts))
        self._driver = subprocess.Popen(
            [sys.executable, "-u", "-m", "pipelines.cli", *self._job.command],
            cwd=self._job.folder,
            env=os.environ | node.environment() | {"RAY_ADDRESS": node.address},
            stdin=subprocess.DEVNULL,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - there are no threads here
        )
        has_asked, seen, looked = False, time.monotonic(), time.monotonic()
        while (code := _exit_code(self._driver.pid)) is None:
            if not node.is_alive():
                raise ClusterLost(f"Ray's head died:\n{node.log()}")
            if time.monotonic() - looked >= LOOK_SECONDS:
                looked = time.monotonic()
                seen = looked if living_nodes(node) >= len(hosts) else seen
            if looked - seen > LOST_SECONDS:
                raise NodeLost(f"one of {', '.join(hosts)} has not been seen for {LOST_SECONDS:.0f} s")
            if not has_asked and (self.place / CANCEL).exists():
                has_asked = True
                log.info("asked to cancel: keeping the state of the trainings")
                _send(self._driver.pid, signal.SIGTERM)
            time.sleep(POLL_SECONDS)
        self._say_it_is_over()  # first: Slurm may be about to kill all
        return code if code >= 0 else 128 - code

    def _look(self) -> None:
        """While the cluster comes up: has somebody declared the end?"""
        time.sleep(POLL_SECONDS)
        if (self.place / CANCEL).exists():
            write_end(self.place, End(143, "cancelled before it began"))
        if read_end(self.place) is not None:
            raise _Over

    def _refusal(self, differences: list[str], where: str) -> End:
        """This node would not compute the same as others."""
        reason = f"node {socket.gethostname()} has {', '.join(differences)} ({where})"
        log.error("refused: %s", reason)
        return End(2, f"{reason}; use one Python environment on a shared folder")

    def _new_node(self, token: str, towards: str | None) -> RayNode:
        job = self._job
        cpus = job.cpus or int(os.environ.get("SLURM_CPUS_ON_NODE", "0")) or len(os.sched_getaffinity(0))
        return RayNode(token, own_address(towards), cpus, job.gpus, job.temporary)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s {socket.gethostname()} %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def _exit_code(pid: int) -> int | None:
    """Of a child that has ended, negative for a signal; None while it runs.

    It may be asked in a handler that has interrupted the asking, which would hang with `Popen.wait`.
    """
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
