"""Real processes, real faults: nothing is lost, nothing corrupt is accepted, no finished stage runs again."""

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults import kill_once, undisturbed
from tests.integration.pbkd_process import SMALL, digests, pbkd, run, states, until, with_database

LOCAL = "compute.executor=local"
LONG = ["stages.teacher.steps=200", "compute.checkpoint_steps=5", "--until", "teacher"]
KILLS = 2


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(SMALL, LOCAL, *LONG, "--store", with_database(tmp_path_factory.mktemp("undisturbed")))


def has_checkpoint(store: Path) -> bool:
    return any(store.glob("work/*/step-*"))


def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    expected, steps = undisturbed(tmp_path / "undisturbed", [])
    draw = random.Random(20181)
    for number in range(KILLS):
        outcome = kill_once(tmp_path / str(number), [], expected, steps, draw, driver=number % 2 == 1)
        assert outcome.survived, number


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_checkpoint_is_passed_over_with_one_warning(
    damage: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    store = with_database(tmp_path)
    with pbkd("run", SMALL, LOCAL, *LONG, "--store", store) as command:
        until(lambda: len(list(store.glob("work/*/step-*"))) > 1, "two checkpoints")
        command.signal(signal.SIGTERM)
        assert command.wait()[0] == 143
    newest = max(store.glob("work/*/step-*"))
    step = newest.name.rpartition("-")[0]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"cut": content[:-9], "flip": content, "empty": b""}[damage])
    with pbkd("run", SMALL, LOCAL, *LONG, "--store", store, "--json") as command:
        code, _, err = command.wait()
    assert code == 0, err
    assert err.count(f"{step} is damaged") == 1 and err.count("warning") == 1
    again = run(SMALL, LOCAL, *LONG, "--store", store)
    assert digests(again) == digests(expected) and set(states(again).values()) == {"reused"}


def test_a_suspended_worker_is_replaced(expected: dict[str, Any], tmp_path: Path) -> None:
    store = with_database(tmp_path)
    settings = [*LONG, "compute.watchdog_seconds=3", "--store", store, "--json"]
    with pbkd("run", SMALL, LOCAL, *settings) as command:
        until(lambda: has_checkpoint(store), "a checkpoint")
        (worker,) = command.processes("spawn_main")
        os.kill(worker, signal.SIGSTOP)
        code, _, err = command.wait()
    assert code == 0, err
    assert f"process {worker} has not run for 3 s and is ended" in err
    assert digests(run(SMALL, LOCAL, *LONG, "--store", store)) == digests(expected)


def test_too_little_memory_is_explained(tmp_path: Path) -> None:
    absurd = "stages.teacher.network.base_width=200000"  # terabytes
    with pbkd("run", SMALL, LOCAL, *LONG, absurd, "--store", with_database(tmp_path)) as command:
        code, out, err = command.wait()
    assert (code, out) == (1, "")
    assert "stages.teacher: out of memory" in err and "lower data.batch_size" in err
    assert "Traceback" not in err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes, which root may mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root may mount a small file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(ballast: Path) -> None:
    """Write until there is no room left."""
    with suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(bytes(1 << 12))
            file.flush()


def test_a_full_disk_is_explained_and_the_run_goes_on_when_there_is_room(
    small_disk: Path, expected: dict[str, Any]
) -> None:
    store = with_database(small_disk / "runs")
    ballast = small_disk / "ballast"
    with pbkd("run", SMALL, LOCAL, *LONG, "--store", store) as command:
        until(lambda: has_checkpoint(store), "a checkpoint")
        fill(ballast)
        code, _, err = command.wait()
    assert code == 1 and "No space left on device" in err and "type the same command again" in err, err
    assert "/pipelines/" not in err, "no traceback of ours; MLflow logs its own"
    ballast.unlink()
    again = run(SMALL, LOCAL, *LONG, "--store", store)
    assert digests(again) == digests(expected)
    with pbkd("store", "check", "--full", "--store", store, "--json") as check:
        assert check.succeed()["damaged"] == 0
