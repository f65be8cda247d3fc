"""A machine that has no more memory or disk, or may not write: the cure is named, nothing is lost."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from tests.conftest import NO_MOUNT
from tests.faults.long_run import LONG, has_checkpoint
from tests.integration.pbkd_process import (
    LOCAL,
    RAY,
    ROOT,
    SMALL,
    digests,
    pbkd,
    run_here,
    until,
    with_database,
)


@pytest.mark.parametrize("executor", [LOCAL, pytest.param(RAY, marks=pytest.mark.proof)])
def test_too_little_memory_is_explained(
    executor: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    absurd = "stages.teacher.network.base_width=200000"  # terabytes
    arguments = ["run", SMALL, executor, absurd, "--store", with_database(tmp_path)]
    joined = request.getfixturevalue("ray_cluster").for_runs() if executor == RAY else {}
    with pbkd(*arguments, **joined) as command:
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
    if (mounted := subprocess.run(mount, capture_output=True, text=True, check=False)).returncode != 0:
        pytest.skip(NO_MOUNT + mounted.stderr.strip())
    yield place
    subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path) -> Callable[[], None]:
    """Write until there is no room left."""
    ballast = disk / "ballast"
    with suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(bytes(1 << 12))
            file.flush()
    return ballast.unlink


def write_protect(disk: Path) -> Callable[[], None]:
    """Mount it read-only, as a kernel does that has met an error of the disk."""

    def remount(how: str) -> bool:
        command = ["mount", "-o", f"remount,{how}", str(disk)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    until(lambda: remount("ro"), "a moment in which nobody has a file open")
    return lambda: until(lambda: remount("rw"), "the disk")


FAULTS = {"No space left on device": fill, "Read-only file system": write_protect}


@pytest.mark.parametrize(
    "message", ["No space left on device", pytest.param("Read-only file system", marks=pytest.mark.proof)]
)
def test_a_disk_that_takes_no_more_is_explained_and_the_run_goes_on_when_it_does(
    message: str,
    small_disk: Path,
    expected: dict[str, Any],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    store = with_database(small_disk / "runs")
    mlflow = f"tracking.uri=sqlite:///{with_database(tmp_path / 'elsewhere')}/mlflow/mlflow.db"
    with pbkd("run", SMALL, LOCAL, *LONG, mlflow, "--store", store) as command:
        until(lambda: has_checkpoint(store), "a checkpoint")
        mend = FAULTS[message](small_disk)
        code, _, err = command.wait()
    assert code == 1 and message in err and "type the same command again" in err, err
    assert f"{ROOT}/pipelines/" not in err, "no traceback of ours; MLflow logs its own"
    if "Read-only" in message:
        with pbkd("run", SMALL, LOCAL, *LONG, mlflow, "--store", store) as command:
            code, _, err = command.wait()
        assert code == 2 and message in err and "--store" in err and len(err.splitlines()) <= 3
    mend()
    again = run_here(SMALL, LOCAL, *LONG, mlflow, "--store", store)
    assert digests(again) == digests(expected)
    assert main(["store", "check", "--full", "--store", str(store)]) == 0, capfd.readouterr().out
