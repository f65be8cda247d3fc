"""`pbkd data` as it is typed: its output, its exit codes, and what a full disk and a killed process leave."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.injected import injected
from pbkd.data import DataSettings, open_data
from pipelines.cli import main
from tests.conftest import NO_MOUNT
from tests.unit.image_folders import picture, save_folder

pytestmark = [pytest.mark.slow, pytest.mark.ffcv]  # for libturbojpeg, which comes with it

ROOT = Path(__file__).parents[2]
COMPLETE = ["test.beton", "test.beton.json", "train.beton", "train.beton.json"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "images")


@pytest.fixture(autouse=True)
def _same_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from pipelines.cli import main; sys.exit(main())", *arguments]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_prepare_and_verify_tell_machines_what_there_is(root: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["data", "prepare", str(root), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    folder = root / "beton" / "folder"
    assert report["out"] == str(folder)
    assert names(folder) == COMPLETE
    assert [row["state"] for row in report["betons"]] == ["written", "written"]
    assert report["betons"][0]["manifest"]["settings"]["mode"] == "jpeg"
    assert main(["data", "prepare", str(root), "--json"]) == 0
    assert [row["state"] for row in json.loads(capfd.readouterr().out)["betons"]] == ["kept", "kept"]
    assert main(["data", "verify", str(folder), "--full", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["betons"]
    assert [(row["path"], row["full"]) for row in rows] == [
        (str(folder / name), True) for name in ("test.beton", "train.beton")
    ]
    assert rows[0]["manifest"] == json.loads((folder / "test.beton.json").read_text())


def test_people_see_lines_without_a_terminal(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    assert main(["data", "prepare", str(root), "--out", str(out), "--mode", "raw"]) == 0
    told = capfd.readouterr()
    assert "train: 18 of 18 images" in told.err
    assert f"{out / 'test.beton'}: 9 samples, 17 MB, written" in told.out
    assert main(["data", "verify", str(out / "train.beton")]) == 0
    assert "18 samples, sound; --full checks the images too" in capfd.readouterr().out


def test_skipped_images_are_told(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    (root / "train" / "cat" / "00.JPEG").write_bytes(b"")
    assert main(["data", "prepare", str(root), "--out", str(tmp_path / "out"), "--skip-broken"]) == 0
    assert "left out 1 broken images, listed in the manifests: train/cat/00.JPEG" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prepare", "cifar10"], "--root is missing"),
        (
            ["prepare", "cifar10", "--root", "."],
            "cure: --root DIR with the folder that holds it, or --download",
        ),
        (["prepare", "nowhere"], "nowhere: there is no such folder"),
        (["prepare", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["prepare", "."], "cure: pbkd data prepare ROOT"),
        (["prepare", ".", "--root", "."], "--root and --download are for cifar10 and cifar100"),
        (["prepare", ".", "--quality", "101"], "--quality"),
        (["verify", "."], "holds no beton"),
        (["verify", "train.beton"], "train.beton: there is no such file"),
    ],
)
def test_mistakes_exit_with_2_and_name_the_cure(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == 2
    assert expected in capfd.readouterr().err
    assert names(tmp_path) == []


def test_verify_finds_a_beton_whose_file_is_gone(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    main(["data", "prepare", str(root), "--out", str(out)])
    (out / "train.beton").unlink()
    assert main(["data", "verify", str(out)]) == 2
    assert f"{out / 'train.beton'}: cannot be read" in capfd.readouterr().err


def test_a_full_disk_is_told_and_nothing_is_left_on_it(root: Path, tmp_path: Path):
    picture(0, 1000, 1000).save(root / "train" / "cat" / "99.png")
    out = tmp_path / "out"
    out.mkdir()
    limit = 10_000_000  # bytes, of a file of this process: the first page fits, the second does not
    ended = subprocess.run(
        command("data", "prepare", str(root), "--mode", "raw", "--out", str(out)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert ended.returncode == 2, ended.stderr
    assert f"{out / 'train.beton'}: the disk is full" in " ".join(ended.stderr.split())
    assert names(out) == []


def test_a_small_disk_that_is_full_stays_empty(root: Path, tmp_path: Path):
    picture(0, 1000, 1000).save(root / "train" / "cat" / "99.png")
    out = tmp_path / "disk"
    out.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(NO_MOUNT + mounted.stderr.strip())
    try:
        assert main(["data", "prepare", str(root), "--mode", "raw", "--out", str(out)]) == 2
        assert names(out) == []
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_the_data_of_a_recipe_are_prepared_as_it_sees_them(root: Path, tmp_path: Path):
    """Parts that are CSV files, a validation part of its own, photographs upright."""
    for part, name in (("train", "train.csv"), ("val", "valid.csv"), ("val", "test.csv")):
        rows = [f"{path.relative_to(root)},{path.parent.name}" for path in sorted((root / part).rglob("*.*"))]
        (root / name).write_text("\n".join(["path,label", *rows]))
    recipe = tmp_path / "photos.yaml"
    data = {"name": "folder", "root": str(root), "orientation": "exif", "image_size": 16}
    data |= {"splits": {"train": "train.csv", "val": "valid.csv", "test": "test.csv"}}
    train = {"kind": "train", "network": {"arch": "resnet20"}, "epochs": 1}
    content = {"name": "photos", "data": data, "teacher": "t", "student": "s"}
    recipe.write_text(json.dumps(content | {"stages": {"t": train, "s": {"kind": "prune", "macs": 0.8}}}))
    assert main(["data", "prepare", str(recipe)]) == 0
    parts = sorted(path.stem for path in (root / "beton" / "folder").glob("*.beton"))
    assert parts == ["test", "train", "val"]
    settings = DataSettings.model_validate(data)
    found = open_data(settings)
    assert found.settings.loader == "ffcv" and found.classes == ("cat", "dog", "emu")
    assert found.sizes == open_data(settings.model_copy(update={"loader": "torch"})).sizes


WAIT_FOR_TEST = """
def wait(module):
    import os, time
    read = module.read_sound
    def waiting(path, *rest):
        if path.parent.parent.name == "val":
            open(os.environ["WAITS"], "w").close()
            time.sleep(600)
        return read(path, *rest)
    module.read_sound = waiting

when_imported("pbkd.data.beton_samples", wait)
"""


def test_a_killed_writer_leaves_no_beton_and_the_same_command_finishes(root: Path, tmp_path: Path):
    out, waits = tmp_path / "out", tmp_path / "waits"
    process = subprocess.Popen(
        command("data", "prepare", str(root), "--out", str(out), "--json"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | injected(WAIT_FOR_TEST, tmp_path / "hook") | {"WAITS": str(waits)},
    )
    deadline = time.monotonic() + 120
    while not waits.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert names(out) == ["test.beton.partial", "train.beton", "train.beton.json"]
    assert main(["data", "prepare", str(root), "--out", str(out)]) == 0
    assert names(out) == COMPLETE
