"""FFCV's file format, version 2: header, field descriptors, one row of metadata a sample, pages of data,
allocation table."""

import hashlib
import os
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

VERSION = 2
PAGE_SIZE = 1 << 23
"""Bytes of a page, FFCV's usual; a sample lies in one page, so this is also the most that one may take."""

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
SAMPLE = np.dtype(
    {
        "names": ["mode", "width", "height", "data_ptr", "label"],
        "formats": ["u1", "<u2", "<u2", "<u8", "<i8"],
        "offsets": [0, 1, 3, 5, 16],
        "itemsize": 24,
    }
)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
JPEG, RAW = 0, 1
"""Modes of a stored image."""

FIELDS = np.array([(2, b"image", b""), (1, b"label", b"")], FIELD)
"""The fields of our betons: an `RGBImageField` and an `IntField`, which have no arguments."""

SAMPLES_AT = HEADER.itemsize + FIELDS.nbytes


class FormatError(ValueError):
    """A file that is not a beton, or a damaged one; says what is wrong, not where."""


def aligned(position: int) -> int:
    """The first byte of the first page that begins at `position` or behind it."""
    return -(-position // PAGE_SIZE) * PAGE_SIZE


@dataclass(frozen=True)
class Tables:
    """All of a beton but the images: `samples` (N,) of SAMPLE, `allocations` (N,) of ALLOCATION."""

    samples: NDArray[np.void]
    allocations: NDArray[np.void]

    @property
    def allocations_at(self) -> int:
        """Where the allocation table begins: behind the last page."""
        last = self.allocations[-1]
        return aligned(int(last["ptr"]) + int(last["size"]))

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width) that all images share, or None."""
        heights, widths = self.samples["height"], self.samples["width"]
        same = bool((heights == heights[0]).all() and (widths == widths[0]).all())
        return (int(heights[0]), int(widths[0])) if same else None

    def front(self) -> bytes:
        """What stands before the pages."""
        count = len(self.samples)
        header = np.array([(VERSION, len(FIELDS), PAGE_SIZE, count, self.allocations_at)], HEADER)
        return header.tobytes() + FIELDS.tobytes() + self.samples.tobytes()

    def digest(self) -> str:
        """sha256 (hex) of everything but the pages."""
        return hashlib.sha256(self.front() + self.allocations.tobytes()).hexdigest()


def read_tables(file: BinaryIO) -> Tables:
    """Read a beton of ours without its images. Raises FormatError when its structure is not sound.

    Every pointer of what it returns lies in the file. No length is believed before it was compared with
    the size of the file.
    """
    size = os.fstat(file.fileno()).st_size
    if size < SAMPLES_AT:
        raise FormatError(f"is no beton: {size} bytes hold no header")
    header = np.frombuffer(_at(file, 0, HEADER.itemsize), HEADER)[0]
    if header[["version", "num_fields", "page_size"]].tolist() != (VERSION, len(FIELDS), PAGE_SIZE):
        raise FormatError(f"has no header of FFCV's version {VERSION} as pbkd writes it")
    if _at(file, HEADER.itemsize, FIELDS.nbytes) != FIELDS.tobytes():
        raise FormatError("has not the fields image (RGBImageField) and label (IntField)")
    count, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
    pages = aligned(SAMPLES_AT + count * SAMPLE.itemsize)
    if count == 0 or not pages < table <= size or size - table != count * ALLOCATION.itemsize:
        raise FormatError(f"has no allocation table for its {count} samples: it was cut")
    tables = Tables(
        np.frombuffer(_at(file, SAMPLES_AT, count * SAMPLE.itemsize), SAMPLE),
        np.frombuffer(_at(file, table, count * ALLOCATION.itemsize), ALLOCATION),
    )
    _check(tables, pages, table)
    return tables


def _at(file: BinaryIO, start: int, count: int) -> bytes:
    file.seek(start)
    content = file.read(count)
    if len(content) != count:
        raise FormatError("was cut while it was read")
    return content


def _check(tables: Tables, pages: int, table: int) -> None:
    """Raise FormatError for the first sample whose rows do not fit each other or the pages."""
    samples, allocations = tables.samples, tables.allocations
    ends = allocations["ptr"] + allocations["size"]
    pixels = 3 * samples["width"].astype(np.uint64) * samples["height"]
    raw, jpeg = samples["mode"] == RAW, samples["mode"] == JPEG
    checks: list[tuple[str, NDArray[Any]]] = [
        ("is neither raw nor JPEG", raw | jpeg),
        ("has no pixels", pixels > 0),
        ("is not at its place in the allocation table", allocations["sample_id"] == np.arange(len(samples))),
        ("has two places", allocations["ptr"] == samples["data_ptr"]),
        ("has not the size of its pixels", jpeg | (allocations["size"] == pixels)),
        ("is empty or larger than a page", (allocations["size"] > 0) & (allocations["size"] <= PAGE_SIZE)),
        ("lies outside of the pages", (allocations["ptr"] >= pages) & (ends <= table)),
        ("crosses a page", allocations["ptr"] // PAGE_SIZE == (ends - 1) // PAGE_SIZE),
        ("overlaps the one before", np.append(True, allocations["ptr"][1:] >= ends[:-1])),
    ]
    for what, holds in checks:
        if not holds.all():
            raise FormatError(f"is damaged: sample {int(np.argmin(holds))} {what}")
    if tables.allocations_at != table:
        raise FormatError("is damaged: its allocation table is not behind the last page")
