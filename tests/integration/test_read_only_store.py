"""A store that may only be read, as an archive or a colleague's: what only reads works, the rest refuses."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from tests.conftest import NO_MOUNT
from tests.integration.pbkd_process import ROOT, SMOKE

DIGITS = str(ROOT / "pipelines" / "recipes" / "digits.yaml")


@pytest.fixture(scope="module")
def protected(small_demo: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The demo's store: for root, whom permissions do not stop, on a file system mounted read-only."""
    store = Path(shutil.copytree(small_demo["store"], tmp_path_factory.mktemp("protected") / "runs"))

    def mount(*arguments: str) -> bool:
        done = subprocess.run(["mount", *arguments, store], capture_output=True, check=False)
        return done.returncode == 0

    if os.geteuid() != 0:
        subprocess.run(["chmod", "-R", "a-w", store], check=True)
        yield store
        subprocess.run(["chmod", "-R", "u+w", store], check=True)
    elif mount("--bind", str(store)):
        assert mount("-o", "remount,bind,ro")
        yield store
        subprocess.run(["umount", "--lazy", store], check=True)  # MLflow holds its database open
    else:
        pytest.skip(NO_MOUNT + "root, whom permissions do not stop, may not mount here")


@pytest.fixture
def typed(
    protected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Types a command in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PBKD_STORE", str(protected))

    def type_(*words: str) -> tuple[int, str, str]:
        return main(words), *capsys.readouterr()

    return type_


READING = {
    ("plan", DIGITS, *SMOKE): "done",
    ("report",): "report-ID.html",
    ("lineage", "STUDENT"): "teacher",
    ("export", "STUDENT"): "100.00 % of 256 test images get the same class",
    ("store", "check", "--full"): "16 finished stages (weights too): 0 damaged",
    ("store", "gc"): "to remove: pbkd store gc --apply",
}


@pytest.mark.parametrize("words", READING, ids=lambda words: " ".join(words[:2]).replace(DIGITS, ""))
def test_what_only_reads_works(
    words: tuple[str, ...],
    small_demo: dict[str, Any],
    tmp_path: Path,
    typed: Callable[..., tuple[int, str, str]],
) -> None:
    (student,) = (row["key"] for row in small_demo["stages"] if row["name"] == small_demo["student"])
    (pipeline,) = (path.name for path in (Path(small_demo["store"]) / "pipelines").iterdir())
    code, out, err = typed(*(student if word == "STUDENT" else word for word in words))
    assert code == 0, err
    assert READING[words].replace("ID", pipeline) in out
    if words == ("report",):
        assert Path(out.strip()) == tmp_path / f"report-{pipeline}.html"
        assert (tmp_path / f"report-{pipeline}_figures" / "accuracy_macs.png").is_file()


def test_of_what_is_not_there_nothing_is_made(typed: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = typed("lineage", "0123456789abcdef0123456789abcdef")  # not in its MLflow either
    assert (code, out) == (2, "") and "is not in the store" in err


@pytest.mark.parametrize(
    "words",
    [
        ("run", DIGITS, *SMOKE),  # all of it finished, too
        ("run", DIGITS, "compute.executor=local"),
        ("tune", "joint", DIGITS, "data.val_fraction=0.2"),
        ("ui",),
        ("store", "gc", "--apply"),
        ("store", "replay"),
        ("store", "drop", "STUDENT"),
    ],
    ids=" ".join,
)
def test_what_writes_is_refused(
    words: tuple[str, ...], protected: Path, typed: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, err = typed(*words)
    assert (code, out) == (2, "")
    assert f"store {protected}: cannot be used: " in err
    assert "Read-only file system" in err or "Permission denied" in err
    assert "choose a folder you may write to" in err and len(err.splitlines()) == 2
