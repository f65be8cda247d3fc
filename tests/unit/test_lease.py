"""One owner a key, a dead owner is replaced, and a fenced-out one knows it."""

import json
import multiprocessing
import pickle
import subprocess
import sys
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from pbkd.storage import Folder
from pipelines.lease import Generation, Heartbeat, Lease, LeaseWatcher, Owner, try_acquire
from tests.integration.pbkd_process import until

KEY = "ab" * 32
ELSEWHERE = replace(Owner.here(), host="another-node")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def acquired(store_dir: Path, owner: Owner | None = None) -> Lease:
    lease = try_acquire(Folder(store_dir), KEY, owner)
    assert lease is not None
    return lease


def contend(store_dir: Path, connection: Connection) -> None:
    connection.send("ready")
    connection.recv()
    lease = try_acquire(Folder(store_dir), KEY)
    connection.send(lease is not None)
    connection.recv()  # stay alive, so that the lease is not a dead process's


def test_exactly_one_of_two_processes_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ends = []
    for _ in range(2):
        here, there = context.Pipe()
        process = context.Process(target=contend, args=(tmp_path, there))
        process.start()
        ends.append((here, process))
    for here, _ in ends:
        assert here.recv() == "ready"
    for here, _ in ends:
        here.send("go")
    assert sorted(here.recv() for here, _ in ends) == [False, True]
    for here, process in ends:
        here.send("end")
        process.join()


def test_exactly_one_of_many_wins_a_generation_seen_free_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquired(tmp_path)
    monkeypatch.setattr("pipelines.lease.read_newest", lambda place: seen)
    seen = Generation(0, released=True)  # what a contender saw just before the other one created generation 1
    assert try_acquire(Folder(tmp_path), KEY) is None


def test_a_released_lease_is_free_at_once_and_the_next_has_a_higher_generation(tmp_path: Path) -> None:
    first = acquired(tmp_path)
    assert try_acquire(Folder(tmp_path), KEY) is None
    first.release()
    assert not first.is_current()
    second = acquired(tmp_path)
    assert (first.generation, second.generation) == (1, 2)
    first.release()
    assert second.is_current()


def test_a_heartbeat_does_not_take_a_release_back(tmp_path: Path) -> None:
    lease = acquired(tmp_path)
    heartbeat = Heartbeat()
    heartbeat.add(lease)
    lease.release()
    heartbeat.beat()
    assert try_acquire(Folder(tmp_path), KEY) is not None


def test_a_dead_process_on_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from pbkd.storage import Folder
from pipelines.lease import try_acquire
try_acquire(Folder(Path(sys.argv[1])), sys.argv[2])
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path), KEY], check=True)
    assert try_acquire(Folder(tmp_path), KEY) is None
    watcher = LeaseWatcher(Folder(tmp_path), KEY, clock=Clock())
    lease = try_acquire(Folder(tmp_path), KEY, dead=watcher.dead())
    assert lease is not None and lease.generation == 2


def test_a_process_with_a_reused_pid_is_not_its_predecessor() -> None:
    assert not Owner.here().is_gone()
    assert replace(Owner.here(), started="1").is_gone()
    assert not replace(Owner.here(), started="1", host="another-node").is_gone()
    assert not replace(Owner.here(), started="1", space="another boot").is_gone()


def test_an_owner_elsewhere_is_dead_when_its_counter_stands_still(tmp_path: Path) -> None:
    lease, clock = acquired(tmp_path, ELSEWHERE), Clock()
    watcher = LeaseWatcher(Folder(tmp_path), KEY, ttl=15, clock=clock)
    assert watcher.dead() == 0
    clock.now += 14.9
    assert watcher.dead() == 0
    assert lease.renew()
    clock.now += 0.1
    assert watcher.dead() == 0
    clock.now += 14.9
    assert watcher.dead() == 0
    clock.now += 0.2
    assert watcher.dead() == 1


def test_a_fenced_out_owner_knows_it_and_stops_renewing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = acquired(tmp_path, ELSEWHERE)
    heartbeat = Heartbeat()
    heartbeat.add(old)
    new = try_acquire(Folder(tmp_path), KEY, dead=old.generation)
    assert new is not None and new.is_current() and not old.is_current()
    heartbeat.beat()
    assert "taken over" in caplog.text
    assert not old.renew() and new.is_current()


def test_an_owner_whose_number_another_has_now_leaves_it_alone(tmp_path: Path) -> None:
    """Old generations are removed: by `held`, and with a finished stage by `pbkd store gc`."""
    old = acquired(tmp_path)
    old.storage.remove("000001.json")
    new = acquired(tmp_path)
    assert (new.generation, new.token != old.token) == (old.generation, True)
    assert not old.renew() and new.is_current()
    old.release()
    assert new.is_current() and new.renew()


def test_a_generation_emptied_by_a_power_cut_is_mended_by_its_living_owner(tmp_path: Path) -> None:
    lease = acquired(tmp_path)
    lease.storage.replace("000001.json", b"")
    assert not lease.is_current()
    assert lease.renew() and lease.is_current()


def test_a_judgement_on_one_generation_does_not_free_the_next(tmp_path: Path) -> None:
    first = acquired(tmp_path)
    assert try_acquire(Folder(tmp_path), KEY, dead=first.generation) is not None
    assert try_acquire(Folder(tmp_path), KEY, dead=first.generation) is None


def test_a_generation_emptied_by_a_power_cut_is_taken_over_after_the_time_to_live(tmp_path: Path) -> None:
    lease, clock = acquired(tmp_path), Clock()
    lease.storage.replace("000001.json", b"")
    watcher = LeaseWatcher(Folder(tmp_path), KEY, ttl=15, clock=clock)
    assert watcher.dead() == 0
    clock.now += 15
    assert watcher.dead() == 1


def test_a_copy_in_another_process_can_check_the_lease(tmp_path: Path) -> None:
    lease = acquired(tmp_path)
    copy: Lease = pickle.loads(pickle.dumps(lease))
    assert copy.is_current()
    lease.release()
    assert not copy.is_current()


def test_the_heartbeat_thread_renews(tmp_path: Path) -> None:
    lease = acquired(tmp_path, ELSEWHERE)
    with Heartbeat(interval=0.001) as heartbeat:
        heartbeat.add(lease)
        until(lambda: json.loads(lease.storage.read("000001.json"))["counter"] >= 3, "three beats")
    assert lease.is_current()


def test_an_owner_elsewhere_lives_if_it_renews_and_is_taken_over_if_it_does_not(tmp_path: Path) -> None:
    lease, clock = acquired(tmp_path, ELSEWHERE), Clock()
    watcher = LeaseWatcher(Folder(tmp_path), KEY, ttl=15, clock=clock)
    assert (watcher.dead(), watcher.sees_life) == (0, False)
    lease.renew()
    assert (watcher.dead(), watcher.sees_life) == (0, True)
    late = LeaseWatcher(Folder(tmp_path), KEY, ttl=15, clock=clock)
    assert late.dead() == 0
    clock.now += 15
    assert (late.dead(), late.sees_life) == (lease.generation, False)
