"""Workers of a Ray Train job that hang and that are suspended: both are replaced, and nothing is lost."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.injected import injected
from tests.faults.long_run import LONG, has_checkpoint, newest
from tests.integration.pbkd_process import RAY, SMALL, digests, pbkd, until, with_database

WORKER = "ray::RayTrainWorker"
HANG = """
import os, threading

def change(module):
    take_step = module._Training.take_step
    def hanging(training, *arguments):
        take_step(training, *arguments)
        if training.step == 30 and not os.path.exists(os.environ["PBKD_HUNG"]):
            open(os.environ["PBKD_HUNG"], "w").close()
            threading.Event().wait()
    module._Training.take_step = hanging

when_imported("pbkd.engine.loop", change)
"""


@pytest.mark.proof  # on every run: a suspended one here, and a killed one on Ray
def test_workers_that_hang_or_are_suspended_are_replaced(expected: dict[str, Any], tmp_path: Path) -> None:
    store, hung = with_database(tmp_path / "store"), tmp_path / "hung"
    settings = [*LONG, "compute.watchdog_seconds=8", "--store", store, "--json"]
    environment = injected(HANG, tmp_path / "code") | {"PBKD_HUNG": str(hung)}
    with pbkd("run", SMALL, RAY, *settings, **environment) as command:
        until(hung.exists, "the worker to hang")
        (first,) = command.processes(WORKER)
        until(lambda: first not in command.processes(WORKER), "the end of it")
        # Not its first: while Ray is still starting a worker it waits for its answer without end.
        until(lambda: newest(store) > "step-000000060", "checkpoints of the next")
        (second,) = command.processes(WORKER)
        os.kill(second, signal.SIGSTOP)
        report = command.succeed()
        assert second not in command.processes(WORKER)
    assert has_checkpoint(store) is False and digests(report) == digests(expected)
