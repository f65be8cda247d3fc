"""Real processes, real faults: nothing is lost, nothing corrupt is accepted, no finished stage runs again."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import kill_once, undisturbed
from benchmarks.injected import injected
from pipelines.store import Store
from pipelines.tracking import connect, default_uri, replay
from tests.faults.long_run import LONG, has_checkpoint, leases
from tests.integration.pbkd_process import (
    LOCAL,
    SMALL,
    call,
    digests,
    pbkd,
    run_here,
    states,
    until,
    with_database,
)

KILLS = 2


def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    few = ["--until", "stabilized"]  # make proof: all stages, and fifty kills
    expected, steps = undisturbed(tmp_path / "undisturbed", few)
    draw = random.Random(20181)
    for number in range(KILLS):
        outcome = kill_once(tmp_path / str(number), few, expected, steps, draw, driver=number % 2 == 1)
        assert outcome.survived, number


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a run that was stopped with two checkpoints."""
    store = with_database(tmp_path_factory.mktemp("stopped"))
    with pbkd("run", SMALL, LOCAL, *LONG, "--store", store) as command:
        until(lambda: len(list(store.glob("work/*/step-*"))) > 1, "two checkpoints")
        command.signal(signal.SIGTERM)
        assert command.wait()[0] == 143
    return store


def cut(content: bytes) -> bytes:
    return content[:-9]


def flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def empty(content: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("damages", [[flip], [cut, empty]], ids=["the newest", "both"])
def test_damaged_checkpoints_are_passed_over_with_one_warning(
    damages: list[Callable[[bytes], bytes]], stopped: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(stopped, store)
    damaged = sorted(store.glob("work/*/step-*"), reverse=True)[: len(damages)]
    for path, damage in zip(damaged, damages, strict=True):
        path.write_bytes(damage(path.read_bytes()))
    code, out, err = call("run", SMALL, LOCAL, *LONG, "--store", store, "--json")
    assert code == 0, err
    assert err.count("warning") == 1
    assert all(err.count(f"{path.name.rpartition('-')[0]} is damaged") == 1 for path in damaged)
    assert ("begins again" in err) == (len(damages) > 1)
    assert digests(json.loads(out)) == digests(expected)


def test_a_suspended_worker_is_replaced(expected: dict[str, Any], tmp_path: Path) -> None:
    store = with_database(tmp_path)
    settings = [*LONG, "compute.watchdog_seconds=3", "--store", store, "--json"]
    with pbkd("run", SMALL, LOCAL, *settings) as command:
        until(lambda: has_checkpoint(store), "a checkpoint")
        (worker,) = command.processes("pbkd-rank")
        os.kill(worker, signal.SIGSTOP)
        code, out, err = command.wait()
    assert code == 0, err
    assert f"process {worker} has not run for 3 s and is ended" in err
    assert digests(json.loads(out)) == digests(expected)


def test_a_second_interrupt_leaves_at_once_and_the_last_checkpoint_counts(
    expected: dict[str, Any], tmp_path: Path
) -> None:
    store = with_database(tmp_path)
    with pbkd("run", SMALL, LOCAL, *LONG, "--store", store) as command:
        until(lambda: has_checkpoint(store), "a checkpoint")
        (worker,) = command.processes("pbkd-rank")
        os.kill(worker, signal.SIGSTOP)  # it does not end when it is asked to: the driver has to wait for it
        command.signal(signal.SIGINT)
        until(lambda: all(lease["stopping"] for lease in leases(store)), "the orderly end to begin")
        command.signal(signal.SIGINT)
        until(command.has_ended, "the driver to leave")
        os.kill(worker, signal.SIGCONT)
        assert command.wait() == (130, "", ""), "it did not come to the end of the orderly one"
        until(lambda: not command.processes(), "the end of every process")
    assert not any(lease["released"] for lease in leases(store))
    assert digests(run_here(SMALL, LOCAL, *LONG, "--store", store)) == digests(expected)


JUMPING_CLOCK = """
import os, socket, time

# A day back, right, a day ahead: twice a second another one. The host has another name than its neighbour's,
# so that neither can see whether the other's processes live.
_real, _since = time.time, time.monotonic()
time.time = lambda: _real() + 86400.0 * (int(2 * (time.monotonic() - _since)) % 3 - 1)
socket.gethostname = lambda: os.environ["PBKD_HOST"]
"""


def test_clocks_that_jump_by_days_take_nobodys_stage_away(expected: dict[str, Any], tmp_path: Path) -> None:
    store = with_database(tmp_path / "store")
    clock = injected(JUMPING_CLOCK, tmp_path / "code")
    arguments = ["run", SMALL, LOCAL, *LONG, "--store", store, "--json"]
    with pbkd(*arguments, PBKD_HOST="one", **clock) as one:
        until(lambda: has_checkpoint(store), "a checkpoint")
        (worker,) = one.processes("pbkd-rank")
        os.kill(worker, signal.SIGSTOP)  # until the other has watched for long enough
        with pbkd(*arguments, "name=other", PBKD_HOST="other", **clock) as other:
            until(lambda: len(list(store.glob("pipelines/*/journal.jsonl"))) == 2, "the other run to begin")
            (lease,) = leases(store)
            until(lambda: leases(store)[0]["counter"] >= lease["counter"] + 3, "three beats of the owner")
            os.kill(worker, signal.SIGCONT)
            reports = [one.succeed(), other.succeed()]
    assert [list(states(report).values()) for report in reports] == [["ran"], ["reused"]]
    assert digests(reports[0]) == digests(reports[1]) == digests(expected)


KILLED_BEFORE_THE_SECOND_RECORD = """
import os, signal

def change(module):
    record_end = module.Driver._record_end
    recorded = []
    def killed(driver, node):
        if recorded:
            os.kill(os.getpid(), signal.SIGKILL)
        recorded.append(node)
        record_end(driver, node)
    module.Driver._record_end = killed

when_imported("pipelines.driver", change)
"""


def test_killed_between_a_stages_end_and_its_record_mlflow_has_both_stages_once(tmp_path: Path) -> None:
    with_database(tmp_path / "store")
    store = Store(tmp_path / "store")
    some = [SMALL, LOCAL, "--until", "stabilized", "--store", store.root]
    with pbkd("run", *some, **injected(KILLED_BEFORE_THE_SECOND_RECORD, tmp_path / "code")) as command:
        assert command.wait()[0] == -signal.SIGKILL
        until(lambda: not command.processes("pbkd-rank"), "the end of its processes")
    (pipeline_id,) = store.pipelines()
    journal = store.journal(pipeline_id)
    (recorded,) = (record["key"] for record in journal.read()[0] if record["type"] == "finished")
    finished = set(store.keys())
    assert {recorded} < finished, "the end of one of them is not in the journal"
    journal.append({"type": "ended", "status": "stopped"})  # what the next run begins with
    replay(default_uri(store), store)
    before = runs_of(store)
    assert [key for key, (one,) in before.items() if one["status"] == "FINISHED"] == [recorded]
    report = run_here(*some)
    after = runs_of(store)
    assert set(after) == {stage["key"] for stage in report["stages"]}
    assert [one["status"] for (one,) in after.values()] == ["FINISHED"] * len(after)
    assert after[recorded] == before[recorded], "it never changed"
    assert finished <= {stage["key"] for stage in report["stages"] if stage["state"] == "reused"}


def runs_of(store: Store) -> dict[str, list[dict[str, Any]]]:
    """By stage key, what MLflow says of each of its runs, every value of every metric included."""
    client = connect(default_uri(store))
    found: dict[str, list[dict[str, Any]]] = {}
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    for each in client.search_runs(experiments, max_results=1000):
        key = each.data.tags.get("pbkd.stage_key")
        if key is None:
            continue
        values = {
            name: [(metric.step, metric.timestamp, metric.value) for metric in history]
            for name in each.data.metrics
            if (history := client.get_metric_history(each.info.run_id, name)) and "latency" not in name
        }
        steps = [step for step, *_ in values.get("train_loss", [])]
        assert len(steps) == len(set(steps)), "no epoch twice"
        info = each.info
        about = {"run": info.run_id, "status": info.status, "start": info.start_time, "end": info.end_time}
        found.setdefault(key, []).append(about | {"values": values})
    return found
