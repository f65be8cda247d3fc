"""Opening and verifying betons: whatever happened to a file is an error that names it, never a crash."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pbkd.data import DataSettings
from pbkd.data.beton import BetonManifest, BetonSettings, manifest_path, open_checked, verify
from pbkd.data.beton_format import (
    ALLOCATION,
    HEADER,
    PAGE_SIZE,
    SAMPLE,
    SAMPLES_AT,
    FormatError,
    Tables,
    read_tables,
)
from pbkd.data.beton_write import prepare
from pbkd.errors import UserError
from tests.unit.image_folders import save_folder

pytestmark = pytest.mark.ffcv  # for libturbojpeg, which comes with it


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A beton of 18 JPEG images, and its manifest."""
    folder = tmp_path_factory.mktemp("prepared")
    root = save_folder(folder / "images")
    prepare(DataSettings(name="folder", root=root), folder / "out", BetonSettings(mode="jpeg"))
    return folder / "out" / "train.beton"


@pytest.fixture
def beton(prepared: Path, tmp_path: Path) -> Path:
    """One that may be damaged."""
    for path in (prepared, manifest_path(prepared)):
        shutil.copy(path, tmp_path)
    return tmp_path / prepared.name


def tables_of(path: Path) -> Tables:
    with path.open("rb") as file:
        return read_tables(file)


def overwrite(path: Path, place: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        file.write(content)


def change_manifest(path: Path, seal: bool, **changes) -> None:
    """With `seal` as a program would that means to."""
    manifest = BetonManifest.model_validate_json(manifest_path(path).read_bytes())
    manifest = manifest.model_copy(update=changes)
    manifest_path(path).write_text((manifest.sealed() if seal else manifest).model_dump_json())


def in_table(path: Path, sample: int, column: str) -> int:
    dtype = SAMPLE if column in SAMPLE.fields else ALLOCATION
    start = SAMPLES_AT if dtype is SAMPLE else tables_of(path).allocations_at
    return start + sample * dtype.itemsize + dtype.fields[column][1]


def test_an_intact_beton_passes(beton: Path):
    manifest = open_checked(beton, None)
    assert manifest == verify(beton, full=True, workers=2) == open_checked(beton, manifest.source_digest)
    told: list[tuple[int, int]] = []
    verify(beton, full=True, progress=lambda done, count: told.append((done, count)))
    assert told == [(done, 18) for done in range(1, 19)]


QUICKLY_FOUND: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda path: path.unlink(), "cannot be read: No such file"),
    "neither": (lambda path: (path.unlink(), manifest_path(path).unlink()), "there is no such file"),
    "no manifest": (lambda path: manifest_path(path).unlink(), "has no manifest train.beton.json"),
    "manifest not JSON": (lambda path: manifest_path(path).write_text("{"), "cannot be read: .*JSON"),
    "manifest emptied": (lambda path: manifest_path(path).write_text(""), "cannot be read: .*JSON"),
    "manifest of a later version": (lambda path: change_manifest(path, True, version=2), "version"),
    "samples edited": (lambda path: change_manifest(path, False, samples=17), "was edited"),
    "classes edited": (lambda path: change_manifest(path, False, classes=2), "was edited"),
    "other split": (
        lambda path: change_manifest(path, True, split="test"),
        "the test split under another name",
    ),
    "emptied": (lambda path: os.truncate(path, 0), "has 0 bytes"),
    "last kilobyte cut": (lambda path: os.truncate(path, path.stat().st_size - 1024), "was cut or replaced"),
    "table cut": (lambda path: os.truncate(path, tables_of(path).allocations_at), "was cut or replaced"),
    "longer": (lambda path: os.truncate(path, path.stat().st_size + 24), "was cut or replaced"),
    "no header": (lambda path: overwrite(path, 0, bytes(HEADER.itemsize)), "has no header of FFCV"),
    "other fields": (lambda path: overwrite(path, HEADER.itemsize, b"\xff"), "has not the fields"),
    "label changed": (
        lambda path: overwrite(path, in_table(path, 3, "label"), b"\x01"),
        "not what was written",
    ),
    "label outside": (
        lambda path: overwrite(path, in_table(path, 3, "label"), b"\x03"),
        "label 3 of sample 3",
    ),
    "label negative": (
        lambda path: overwrite(path, in_table(path, 0, "label"), b"\xff" * 8),
        "label -1 of sample 0",
    ),
    "place outside": (
        lambda path: overwrite(path, in_table(path, 4, "ptr"), b"\xff" * 8),
        "sample 4 has two places",
    ),
    "size outside": (lambda path: overwrite(path, in_table(path, 17, "size"), b"\xff" * 4), "sample 17"),
    "mode unknown": (
        lambda path: overwrite(path, in_table(path, 2, "mode"), b"\x07"),
        "neither raw nor JPEG",
    ),
    "width zero": (
        lambda path: overwrite(path, in_table(path, 2, "width"), b"\0\0"),
        "sample 2 has no pixels",
    ),
}


@pytest.mark.parametrize(("damage", "expected"), QUICKLY_FOUND.values(), ids=QUICKLY_FOUND)
def test_damage_is_found_without_reading_the_images(
    damage: Callable[[Path], object], expected: str, beton: Path
):
    damage(beton)
    with pytest.raises(UserError, match=f"(?s){beton}.*{expected}.*cure: ") as error:
        open_checked(beton, None)
    assert len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: overwrite(path, in_table(path, 3, "label"), b"\x03"),
        lambda path: (
            overwrite(path, in_table(path, 3, "ptr"), b"\xff" * 8),
            overwrite(path, in_table(path, 3, "data_ptr"), b"\xff" * 8),
        ),
        lambda path: os.truncate(path, path.stat().st_size - 24),
        lambda path: os.truncate(path, SAMPLES_AT - 1),
        lambda path: overwrite(path, HEADER.fields["num_samples"][1], b"\xff" * 8),
        lambda path: overwrite(path, HEADER.fields["alloc_table_ptr"][1], b"\xff" * 8),
    ],
    ids=["label", "pointer", "short table", "short header", "count", "table's place"],
)
def test_a_manifest_that_agrees_with_the_damage_does_not_hide_it(
    damage: Callable[[Path], object], beton: Path
):
    damage(beton)
    change_manifest(beton, True, bytes=beton.stat().st_size)
    with pytest.raises(UserError, match=str(beton)):
        open_checked(beton, None)


def test_overwritten_images_are_found_by_full_verification(beton: Path):
    place = tables_of(beton).allocations[5]
    overwrite(beton, int(place["ptr"]) + int(place["size"]) // 2, b"\x12\x34\x56")
    open_checked(beton, None)
    with pytest.raises(UserError, match=r"train\.beton: .*sha256 differs"):
        verify(beton, full=True)


def test_an_image_that_cannot_be_decoded_is_found_whatever_the_checksum_says(beton: Path):
    place = tables_of(beton).allocations[5]
    overwrite(beton, int(place["ptr"]), bytes(40))
    change_manifest(beton, True, sha256=hashlib.sha256(beton.read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"train\.beton: holds an image that cannot be decoded"):
        verify(beton, full=True, workers=2)


def test_a_beton_of_other_data_is_refused(beton: Path):
    with pytest.raises(UserError, match=r"(?s)train\.beton: was made from other data.*cure: .*data\.beton"):
        open_checked(beton, "0" * 64)


def test_a_file_that_is_no_file_is_an_error(tmp_path: Path, beton: Path):
    beton.unlink()
    beton.mkdir()
    with pytest.raises(UserError, match=r"train\.beton: cannot be read"):
        open_checked(beton, None)


TABLES_END = SAMPLES_AT + 18 * SAMPLE.itemsize


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(
    place=st.one_of(
        st.integers(0, HEADER.itemsize - 1), st.integers(SAMPLES_AT, TABLES_END - 1), st.integers(-432, -1)
    ),
    content=st.binary(min_size=1, max_size=12),
)
def test_no_damage_to_the_tables_gives_a_pointer_out_of_the_file(prepared: Path, place: int, content: bytes):
    size = prepared.stat().st_size
    start = place % size
    with prepared.open("r+b") as file:
        before = os.pread(file.fileno(), len(content), start)
        os.pwrite(file.fileno(), content[: len(before)], start)
        try:
            tables = read_tables(file)
        except FormatError:
            return
        finally:
            os.pwrite(file.fileno(), before, start)
    ends = tables.allocations["ptr"].astype(object) + tables.allocations["size"].astype(object)
    assert max(ends) <= tables.allocations_at <= size
    assert int(tables.samples["data_ptr"].min()) >= PAGE_SIZE
    raw = tables.samples["mode"] == 1
    pixels = 3 * tables.samples["width"].astype(np.int64) * tables.samples["height"]
    assert (tables.allocations["size"][raw] == pixels[raw]).all()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(size=st.integers(0, 2 * PAGE_SIZE))
def test_no_length_that_is_cut_is_taken_for_a_beton(prepared: Path, size: int):
    whole = prepared.read_bytes()
    copy = prepared.with_name("cut")
    copy.write_bytes(whole[: min(size, len(whole) - 1)])
    with copy.open("rb") as file, pytest.raises(FormatError):
        read_tables(file)
