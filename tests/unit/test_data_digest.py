"""The digest of a data set: stable, sensitive, and cheap the second time."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pbkd.data import DataSettings, data_digest, data_identity, inventory
from pbkd.data.inventory import file_hashes, recall_listing
from pbkd.errors import UserError

NAMES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]


@pytest.fixture
def cifar(tmp_path: Path) -> DataSettings:
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_bytes(name.encode())
    return DataSettings(name="cifar10", root=tmp_path / "data")


def test_digits_have_one_digest_whatever_the_settings(tmp_path: Path):
    digest = data_digest(DataSettings(name="digits"), tmp_path)
    assert digest == data_digest(DataSettings(name="digits", limit=3, batch_size=7), tmp_path)
    assert digest == "0b7e9c3202d7bcd255d6a19a238d3743bf5e320ba74812a6679958a017c55382"


def test_cifar_s_digest_follows_the_bytes_not_the_place(cifar: DataSettings, tmp_path: Path):
    digest = data_digest(cifar, tmp_path / "cache")
    assert digest == data_digest(cifar, tmp_path / "other cache")
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = DataSettings(name="cifar10", root=tmp_path / "moved")
    assert digest == data_digest(moved, tmp_path / "cache")
    (tmp_path / "moved" / "cifar-10-batches-py" / "test_batch").write_bytes(b"other bytes")
    assert digest != data_digest(moved, tmp_path / "cache")


def test_cifar_is_hashed_once_while_its_files_do_not_change(
    cifar: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    digest = data_digest(cifar, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["data-digests.json"]
    path = tmp_path / "data" / "cifar-10-batches-py" / "test_batch"
    status = path.stat()
    with no_file_read(monkeypatch):
        assert data_digest(cifar, tmp_path) == digest
    path.write_bytes(
        b"TEST_BATCH"
    )  # size and time of its content say that nothing changed; its inode's time not
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert data_digest(cifar, tmp_path) != digest


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_damaged_cache_is_only_a_cache(cifar: DataSettings, tmp_path: Path, text: str):
    digest = data_digest(cifar, tmp_path)
    (tmp_path / "data-digests.json").write_text(text)
    assert data_digest(cifar, tmp_path) == digest


def test_a_missing_file_is_named_with_the_cure(cifar: DataSettings, tmp_path: Path):
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(UserError, match=r"data_batch_3 is missing(.|\n)*data\.download=true"):
        data_digest(cifar, tmp_path)


def test_hashes_that_cannot_be_remembered_are_told_all_the_same(tmp_path: Path):
    (path := tmp_path / "file").write_bytes(b"12345")
    assert file_hashes([path], path / "no folder can be here") == file_hashes([path], tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """root/{train,val}/{cat,dog}/{a,b}.jpg, no two the same."""
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "root" / part / name).mkdir(parents=True)
            for file in "ab":
                (tmp_path / "root" / part / name / f"{file}.jpg").write_text(f"{part} {name} {file}")
    return tmp_path / "root"


def test_a_folder_s_digest_follows_names_content_and_order(folder: Path, tmp_path: Path) -> None:
    settings = DataSettings(name="folder", root=folder)
    first, second = (folder / "train" / "cat" / name for name in ("a.jpg", "b.jpg"))
    seen = {data_digest(settings, tmp_path)}
    assert data_digest(settings, tmp_path) in seen
    assert data_digest(settings, tmp_path / "another cache") in seen

    def exchange() -> None:
        first.rename(folder / "c.jpg")
        second.rename(first)
        (folder / "c.jpg").rename(second)

    for change in (
        exchange,
        lambda: first.write_bytes(first.read_bytes()[::-1]),
        lambda: second.rename(second.with_name("c.jpg")),
        lambda: second.write_text("one more"),
    ):
        change()
        seen.add(data_digest(settings, tmp_path))
    assert len(seen) == 5
    for part in ("train", "val"):
        (folder / part / "dog").rename(folder / part / "cow")
    identity = data_identity(settings, tmp_path)
    assert identity.classes == ("cat", "cow") and identity.digest not in seen
    moved = folder.rename(folder.with_name("moved"))
    assert data_digest(settings.model_copy(update={"root": moved}), tmp_path / "cache") == identity.digest


def test_a_folder_s_files_are_read_once_and_changed_ones_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DataSettings(name="folder", root=folder)
    digest = data_digest(settings, tmp_path)
    with no_file_read(monkeypatch):
        assert data_digest(settings, tmp_path) == digest
    (changed := folder / "val" / "cat" / "a.jpg").write_text("another")
    read: list[Path] = []
    monkeypatch.setattr(inventory, "_sha256", lambda path: read.append(path) or "0" * 64)
    assert data_digest(settings, tmp_path) != digest and read == [changed]


def test_a_listing_is_recalled_by_its_digest_alone(folder: Path, tmp_path: Path) -> None:
    settings = DataSettings(name="folder", root=folder)
    places = settings.places()
    assert recall_listing(folder, places, "0" * 64, tmp_path) is None
    digest = data_digest(settings, tmp_path)
    listing = recall_listing(folder, places, digest, tmp_path)
    assert listing is not None and listing.parts["train"].paths[0] == "train/cat/a.jpg"
    assert recall_listing(folder, places, "0" * 64, tmp_path) is None
    (remembered,) = tmp_path.glob("files-*.json")
    whole = remembered.read_text()
    remembered.write_text(whole.replace("train/cat/a.jpg", "train/cat/b.jpg"))
    assert recall_listing(folder, places, digest, tmp_path) is None
    for damage in ("", "[]", "{", '{"listing": 1}', re.sub(r'"hashes": .*', '"hashes": {}}', whole)):
        remembered.write_text(damage)
        assert recall_listing(folder, places, digest, tmp_path) is None
        assert data_digest(settings, tmp_path) == digest


@contextmanager
def no_file_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(inventory, "_sha256", lambda path: pytest.fail(f"{path} was read again"))
        yield
