"""Inside a worker: it learns that it is not wanted any more, and one that hangs ends itself."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from pbkd.storage import Folder
from pipelines import guard as guard_module
from pipelines.exhaustion import exhaustion
from pipelines.guard import Guard
from pipelines.lease import try_acquire
from tests.integration.pbkd_process import until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
KEY = "ab" * 32


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "LOOK_SECONDS", 0.01)


@pytest.mark.parametrize("how", ["asked", "fenced out", "released"])
def test_a_training_ends_when_its_owner_asks_or_has_lost_it(how: str, tmp_path: Path) -> None:
    lease = try_acquire(Folder(tmp_path), KEY)
    assert lease is not None
    with Guard(lease, 1e9) as guard:
        assert not guard.step()
        if how == "asked":
            lease.ask_to_stop()
            assert lease.is_current(), "what it has finished may still be published"
        elif how == "released":
            lease.release()
        else:
            assert try_acquire(Folder(tmp_path), KEY, dead=1) is not None
        until(guard.step, "the guard to see it")


HANGING = """
import sys, threading, time
from pathlib import Path
from pbkd.storage import Folder
from pipelines import guard
from pipelines.lease import try_acquire
guard.LOOK_SECONDS, guard.LONGER = 0.05, 4
what, patience = sys.argv[2], 0.3
with guard.Guard(try_acquire(Folder(Path(sys.argv[1])), "ab" * 32), patience) as watch:
    if what != "hangs before the first step":
        watch.step()
    if what in ("hangs between steps", "computes between steps"):
        watch.pause()
    if what == "waits between steps":
        watch.pause()
        threading.Event().wait(2 * patience)
        sys.exit(0)
    if what == "computes between steps":
        until = time.monotonic() + 2 * guard.LONGER * patience
        while time.monotonic() < until:
            pass
        sys.exit(0)
    threading.Event().wait()
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("hangs in a step", "no step for 0.3 s"),
        ("hangs between steps", "nothing computed for 1.2 s"),
        ("hangs before the first step", "nothing computed for 1.2 s"),
        ("computes between steps", ""),
        ("waits between steps", ""),
    ],
)
def test_a_worker_that_hangs_ends_itself_and_says_where(what: str, said: str, tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-c", HANGING, tmp_path, what],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.returncode == bool(said), found.stderr
    assert (f"{said}: this worker has hung" in found.stderr and "wait" in found.stderr) == bool(said)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_full_or_read_only_disk_is_explained(number: int) -> None:
    said = exhaustion(OSError(number, "no room", "/store/work"))
    assert said is not None
    assert said.startswith("/store/work: no room\n") and "type the same command again" in said
    assert len(said.splitlines()) <= 3


def test_too_little_memory_is_explained_and_other_errors_are_not() -> None:
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):
        said = exhaustion(error)
        assert said is not None and "out of memory" in said and "data.batch_size" in said
    assert exhaustion(RuntimeError("shapes differ")) is None
    assert exhaustion(FileNotFoundError(errno.ENOENT, "none", "x")) is None
