"""The digest of a data set: stable, sensitive, and cheap the second time."""

import os
from pathlib import Path

import pytest

from pbkd.data import DataSettings, data_digest
from pbkd.data.digest import file_hashes
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


def test_cifar_is_hashed_once_while_its_files_do_not_change(cifar: DataSettings, tmp_path: Path):
    digest = data_digest(cifar, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["data-digests.json"]
    path = tmp_path / "data" / "cifar-10-batches-py" / "test_batch"
    status = path.stat()
    path.write_bytes(b"TEST_BATCH")  # other bytes, but size and time say that nothing changed
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert data_digest(cifar, tmp_path) == digest
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
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


def test_a_folder_s_digest_follows_names_and_sizes(tmp_path: Path):
    files = [
        tmp_path / "root" / part / name / "a.jpg" for part in ("train", "val") for name in ("cat", "dog")
    ]
    for path in files:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"12345")
    settings = DataSettings(name="folder", root=tmp_path / "root")
    seen = {data_digest(settings, tmp_path)}
    assert data_digest(settings, tmp_path) in seen
    files[0].write_bytes(b"123456")
    seen.add(data_digest(settings, tmp_path))
    files[1].rename(files[1].with_name("b.jpg"))
    seen.add(data_digest(settings, tmp_path))
    files[2].with_name("c.jpg").write_bytes(b"12345")
    seen.add(data_digest(settings, tmp_path))
    assert len(seen) == 4
