"""Writing betons: `prepare` makes those of a data set, each complete and checked, or none.

FFCV's own writer hangs for ever when a worker fails, and places the images in an order that differs from run
to run. Decoding releases the interpreter's lock, so threads do the work here, and one of them writes: nothing
can die unseen, and the same data and settings give the same bytes for any number of workers.
"""

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from pbkd.data.beton import (
    BetonManifest,
    BetonSettings,
    find_intact,
    in_order,
    manifest_path,
    read_manifest,
)
from pbkd.data.beton_format import ALLOCATION, PAGE_SIZE, SAMPLE, SAMPLES_AT, Tables, aligned
from pbkd.data.beton_samples import Stored, encoder, read_sound
from pbkd.data.datasets import Arrays, Files, load_splits
from pbkd.data.digest import data_digest
from pbkd.data.folder import BrokenImageError, PartName
from pbkd.data.inventory import Inventory, take_inventory
from pbkd.data.settings import DataSettings
from pbkd.errors import UserError
from pbkd.storage import user_cache

Progress = Callable[[str, int, int], None]
"""Told (split, samples done, of all)."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BUFFER = 1 << 20  # bytes
_AHEAD = 8  # samples a worker may be ahead of the file


@dataclass(frozen=True)
class Prepared:
    """A beton that is complete: `written` now in `seconds`, or found as it should be."""

    path: Path
    manifest: BetonManifest
    written: bool
    seconds: float


def prepare(
    data: DataSettings,
    out: Path,
    settings: BetonSettings,
    *,
    workers: int = 1,
    skip_broken: bool = False,
    progress: Progress | None = None,
) -> list[Prepared]:
    """Make `out`/train.beton, `out`/test.beton, and val.beton of a part of its own, each with its manifest.

    Sample i of a beton is sample i of the split's source, before train is divided into train and val. Every
    sample is decoded and converted to RGB by one of `workers` threads before it is written. A split that is
    there, made of the same data with the same settings, and intact, is kept; an interrupted one starts over.
    A file appears under its name only when it is complete, the manifest last.

    `skip_broken` leaves out images that cannot be read, and lists them in the manifests. The betons then are
    those of the data set without these files, and can be trained with when the files are removed from it.

    Raises UserError naming file and cure: for data that are missing or wrong, the first broken image, a full
    disk, another process that writes to `out`. Nothing unfinished is left then.
    """
    preparation = _Preparation(data, settings, workers, skip_broken, progress)
    with _sole_writer(out):
        return preparation.run(out)


class _Preparation:
    def __init__(
        self,
        data: DataSettings,
        settings: BetonSettings,
        workers: int,
        skip_broken: bool,
        progress: Progress | None,
    ) -> None:
        name = data.name
        if name == "digits":
            raise UserError("digits: they are read into memory at once\ncure: use them without a beton")
        data = data.model_copy(update={"val_fraction": 0.0, "limit": None})
        self._name: Literal["cifar10", "cifar100", "folder"] = name
        self._inventory = self._look(data)
        listing = None if self._inventory is None else self._inventory.listing
        self._digest = data_digest(data, user_cache())
        self._splits = load_splits(data, listing)
        self._classes = data.describe(None if listing is None else len(listing.classes)).num_classes
        self._data = data
        self._settings = settings
        self._workers = workers
        self._skip_broken = skip_broken
        self._progress = progress
        self._broken: set[str] = set()  # of both splits, relative to the root

    def _look(self, data: DataSettings) -> Inventory | None:
        """A folder's inventory now; what has not changed since the last is not read again."""
        if data.name != "folder":
            return None
        return take_inventory(data.data_root(), data.places(), user_cache())

    def run(self, out: Path) -> list[Prepared]:
        if self._skip_broken:
            self._broken = self._still_broken(out)
        made = [self._prepare(out / f"{split}.beton", split) for split in self._data.places()]
        return [self._with_all_broken(prepared) for prepared in made]

    def _prepare(self, path: Path, split: PartName) -> Prepared:
        began = time.monotonic()
        for leftover in path.parent.glob(f"{path.name}*.partial"):  # of one that was killed
            leftover.unlink()
        manifest = find_intact(path, self._settings, self._source_digest())
        written = manifest is None
        if manifest is None:
            partial = path.with_name(path.name + ".partial")
            try:
                manifest = self._write(partial, split)
                _publish(manifest, path, partial)
            except OSError as error:
                raise _cannot_write(path, error) from error
            finally:
                partial.unlink(missing_ok=True)
        return Prepared(path, manifest, written, time.monotonic() - began)

    def _write(self, partial: Path, split: PartName) -> BetonManifest:
        source = self._source(split)
        with partial.open("wb", buffering=_BUFFER) as file, closing(self._samples(split)) as samples:
            tables = write_beton(file, samples, len(source.labels))
            file.flush()
            os.fsync(file.fileno())
        with partial.open("rb") as file:  # read back: what counts is what the disk gives
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
        names = None
        if isinstance(source, Files):
            if (now := self._look(self._data)) is None or now.digest() != self._digest:
                raise UserError(
                    f"{source.root}: files changed while they were read\ncure: prepare again when none does"
                )
            names = now.listing.classes
        return BetonManifest(
            name=self._name,
            split=split,
            bytes=size,
            sha256=sha256,
            tables=tables.digest(),
            samples=len(tables.samples),
            classes=self._classes,
            class_names=names,
            settings=self._settings,
            shape=tables.shape,
            source_digest=self._source_digest(),
            broken=tuple(sorted(self._broken)),
        ).sealed()

    def _samples(self, split: PartName) -> Generator[tuple[Stored, int]]:
        """The samples that can be read, in order, each with its label; finds out which cannot."""
        source = self._source(split)
        labels = checked_labels(source.labels, self._classes)
        encode = encoder(source, self._settings)

        def attempt(index: int) -> Stored | BrokenImageError:
            try:
                return encode(index)
            except BrokenImageError as error:
                return error

        without = set(range(self._classes))  # classes of which no image has been read
        with ThreadPoolExecutor(self._workers) as executor:
            results = in_order(executor, attempt, range(len(labels)), ahead=_AHEAD * self._workers)
            for index, stored in enumerate(results):
                if isinstance(stored, Stored):
                    without.discard(int(labels[index]))
                    yield stored, int(labels[index])
                elif self._skip_broken and isinstance(source, Files):
                    self._broken.add(source.names[index])
                else:
                    raise UserError(f"{stored}, or leave out all such files: --skip-broken") from stored
                if self._progress:
                    self._progress(split, index + 1, len(labels))
        if without:
            raise UserError(
                f"{self._data.data_root()}: no image of class {min(without)} of {split} can be read\n"
                "cure: replace its images, or remove the class from train and val"
            )

    def _source(self, split: PartName) -> Arrays | Files:
        source = self._splits[split].source
        assert isinstance(source, Arrays | Files)
        return source

    def _source_digest(self) -> str:
        if self._inventory is None or not self._broken:
            return self._digest
        return self._inventory.digest(self._broken)

    def _still_broken(self, out: Path) -> set[str]:
        """What the manifests in `out` list as broken, and still is."""
        broken = set()
        for split in self._data.places():
            with suppress(UserError):  # no manifest that tells anything
                broken |= set(read_manifest(out / f"{split}.beton").broken)
        return {name for name in broken if _is_broken(self._data.data_root() / name)}

    def _with_all_broken(self, prepared: Prepared) -> Prepared:
        """The same; its manifest knows also of the broken images that were found after it was written."""
        if prepared.manifest.source_digest == self._source_digest():
            return prepared
        found = {"source_digest": self._source_digest(), "broken": tuple(sorted(self._broken))}
        manifest = prepared.manifest.model_copy(update=found).sealed()
        _publish(manifest, prepared.path)
        return replace(prepared, manifest=manifest)


def write_beton(file: BinaryIO, samples: Iterable[tuple[Stored, int]], at_most: int) -> Tables:
    """Write `at_most` or fewer `samples`, each with its label, as a beton; returns its tables.

    As FFCV lays it out: no image crosses a page, and the tables tell where each lies.
    """
    position = aligned(SAMPLES_AT + at_most * SAMPLE.itemsize)
    file.seek(position)
    rows, places = np.zeros(at_most, SAMPLE), np.zeros(at_most, ALLOCATION)  # zeros between the columns too
    count = 0
    for stored, label in samples:
        size = len(stored.content)
        if position // PAGE_SIZE != (position + size - 1) // PAGE_SIZE:
            position = aligned(position)
            file.seek(position)
        file.write(stored.content)
        rows[count] = (stored.mode, stored.width, stored.height, position, label)
        places[count] = (count, position, size)
        position += size
        count += 1
    tables = Tables(rows[:count], places[:count])
    file.seek(tables.allocations_at)
    file.write(tables.allocations.tobytes())
    file.seek(0)
    file.write(tables.front())
    return tables


def checked_labels(labels: NDArray[Any], classes: int) -> NDArray[np.int64]:
    """`labels` as they can be written. Raises UserError unless they are whole numbers in [0, classes)."""
    if labels.dtype.kind not in "iu":
        raise UserError(f"labels are {labels.dtype}\nexpected whole numbers from 0 to {classes - 1}")
    outside = (labels < 0) | (labels >= classes)
    if outside.any():
        index = int(np.argmax(outside))
        raise UserError(f"label {labels[index]} of sample {index}\nexpected 0 to {classes - 1}")
    return labels.astype(np.int64)


@contextmanager
def _sole_writer(out: Path) -> Iterator[None]:
    """Make the folder `out` and keep other writers out of it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _cannot_write(out, error) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{out}: another pbkd data prepare is writing there\ncure: wait for it, or --out DIR"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _publish(manifest: BetonManifest, path: Path, partial: Path | None = None) -> None:
    """Put the manifest of `path` in its place, after the beton `partial` if that is given.

    Nothing but renaming is left to do when the first of the two appears.
    """
    place = manifest_path(path)
    staged = place.with_name(place.name + ".partial")
    try:
        staged.write_text(manifest.model_dump_json(indent=1) + "\n")
        if partial is not None:
            place.unlink(missing_ok=True)  # never a manifest beside another's file
            partial.replace(path)
        staged.replace(place)
    except OSError as error:
        raise _cannot_write(place, error) from error
    finally:
        staged.unlink(missing_ok=True)


def _is_broken(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        read_sound(path)
    except BrokenImageError:
        return True
    return False


def _cannot_write(path: Path, error: OSError) -> UserError:
    if error.errno in _FULL:
        return UserError(
            f"{path}: the disk is full ({error.strerror}); nothing unfinished was left on it\n"
            "cure: --out DIR on a larger one, or less to write: --mode jpeg, --max-resolution 512"
        )
    return UserError(f"{path}: cannot be written: {error.strerror}\ncure: --out DIR with a folder that can")
