"""The FFCV reader: batches of views from betons, by compiled threads.

It takes FFCV's file format and JPEG decoder, but not its `Loader`, which compiles anew for every
file (seconds), draws augmentations that no two runs share, hands out batches that it overwrites later,
ignores what its decoder says of damaged images, waits for ever when its thread has died, and crashes when a
mapped file is cut.
"""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pbkd.data.augment import (
    crop_offsets,
    cutout_boxes,
    draw_views,
    flips,
    is_flipped,
    resized_crop_box,
)
from pbkd.data.beton import open_checked
from pbkd.data.beton_format import RAW, read_tables
from pbkd.data.datasets import CLASSES, Split, divided
from pbkd.data.inventory import file_hashes
from pbkd.data.loader import without_ffcv
from pbkd.data.memory import RecycledMemory
from pbkd.data.pixels import FLIPPED, PADDING, Indices, Views, of_right_size, shifted, started_ahead
from pbkd.data.settings import DataSettings
from pbkd.errors import UserError
from pbkd.storage import open_file

_ONE_AT_A_TIME = threading.Lock()
"""Held while a kernel runs: two readers of a process then share its threads instead of doubling them, and no
threading layer of numba has to bear two callers."""

FileState = tuple[int, int, int, int]
_Pixels = NDArray[np.uint8]
_States = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Beton:
    """A data set in a beton that was found sound.

    labels, offsets (place in the file), sizes (bytes), are_raw: (N,). shapes: (height, width), (N, 2).
    class_names: of a folder, whose images may have any size; None: of a CIFAR.
    state: of the file, which must not change while it is used.
    """

    path: Path
    labels: NDArray[np.int64]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    shapes: NDArray[np.int64]
    are_raw: NDArray[np.bool_]
    class_names: tuple[str, ...] | None
    state: FileState

    def open(self) -> int:
        """A descriptor of the file. Raises UserError if it is gone."""
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self._changed(f"cannot be opened ({error.strerror})") from error

    def require_unchanged(self, file: int) -> None:
        """Raise UserError if `file`, or what now has its path, is not what was checked."""
        try:
            found = {_state(os.fstat(file)), _state(self.path.stat())}
        except OSError as error:
            raise self._changed(f"cannot be found ({error.strerror})") from error
        if found != {self.state}:
            raise self._changed("was changed or replaced since it was opened")

    def require_samples(self, indices: Indices) -> None:
        """Raise IndexError unless every index is that of a sample."""
        outside = (indices < 0) | (indices >= len(self.labels))
        if outside.any():
            raise IndexError(f"{self.path}: sample {indices[outside][0]} of {len(self.labels)}")

    def broken(self, sample: int, what: str) -> UserError:
        """The error for a sample that cannot be used."""
        return UserError(
            f"{self.path}: sample {sample} {what}\n"
            "cure: pbkd data prepare again, or data.loader=torch to read the images themselves"
        )

    def _changed(self, what: str) -> UserError:
        return UserError(
            f"{self.path}: {what}\ncure: pbkd data prepare, if it is not as it should be; run again"
        )


def open_beton(path: Path, cache: Path | None = None) -> Beton:
    """Open and check a beton; with a folder `cache` also its sha256, computed once for a state of the file.

    Raises UserError naming the file and the cure.
    """
    manifest = open_checked(path, None)
    with open_file(path) as file:
        state = _state(os.fstat(file.fileno()))
        tables = read_tables(file)
        if tables.digest() != manifest.tables or (
            cache is not None and file_hashes([path], cache) != [manifest.sha256]
        ):
            raise UserError(
                f"{path}: its content is not what was written: the sha256 differs\n"
                "cure: pbkd data prepare, which writes what is damaged"
            )
        samples, places = tables.samples, tables.allocations
        beton = Beton(
            path=path,
            labels=samples["label"].astype(np.int64),
            offsets=places["ptr"].astype(np.int64),
            sizes=places["size"].astype(np.int64),
            shapes=np.stack([samples["height"], samples["width"]], axis=1).astype(np.int64),
            are_raw=samples["mode"] == RAW,
            class_names=manifest.class_names,
            state=state,
        )
        beton.require_unchanged(file.fileno())
    return beton


def beton_splits(
    settings: DataSettings, cache: Path | None = None
) -> tuple[dict[str, Split[Beton]], tuple[str, ...]]:
    """`load_splits` from the betons of `settings`, and the classes' names; see `open_beton`.

    Raises UserError when FFCV cannot be imported or a beton is not sound.
    """
    _kernels()
    parts = {name: open_beton(path, cache) for name, path in settings.beton_paths().items()}
    return divided(settings, parts), parts["train"].class_names or CLASSES[settings.name]


def read_beton(
    source: Beton, views: Views, threads: int, memory: RecycledMemory, batches: Iterator[Indices]
) -> Iterator[tuple[Tensor, Indices]]:
    """For each batch of indices: uint8 pixels (N, 3, S, S) in memory of their own, and the indices.

    Reads a few batches ahead, with up to `threads` threads but no more than torch has, and gives them in
    order. What was started ends with the iteration, however it ends.

    Raises UserError naming the file when an image is damaged, or the file was changed or replaced; IndexError
    for an index of no sample, with which a kernel would read what is not its own.
    """
    kernels = _kernels()
    read_views = _read_photographs if source.class_names else _read_small

    def read(indices: Indices, pixels: _Pixels) -> _Pixels:
        source.require_unchanged(file)
        source.require_samples(indices)
        with _ONE_AT_A_TIME:
            states = read_views(kernels, source, file, views, indices, pixels)
        if states.any():
            first = int(np.argmax(states != kernels.INTACT))
            how = "read" if states[first] == kernels.UNREADABLE else "decoded"
            raise source.broken(int(indices[first]), f"cannot be {how}")
        return pixels

    def start(indices: Indices) -> tuple[Future[_Pixels], Indices]:
        pixels = memory.empty((len(indices), views.side, views.side, len(views.fill)), np.uint8)
        return worker.submit(read, indices, pixels), indices

    file = source.open()
    # Its futures carry whatever goes wrong in it to the consumer: nothing can die unseen.
    threads = min(threads, torch.get_num_threads(), kernels.MOST_THREADS)
    worker = ThreadPoolExecutor(1, "pbkd-beton", initializer=kernels.set_threads, initargs=(threads,))
    try:
        for future, indices in started_ahead(start, batches):
            yield torch.from_numpy(future.result()).permute(0, 3, 1, 2), indices
    finally:
        worker.shutdown(cancel_futures=True)
        os.close(file)


def _read_small(
    kernels: ModuleType, source: Beton, file: int, views: Views, indices: Indices, pixels: _Pixels
) -> _States:
    rows = np.zeros((len(indices), 8), np.int64)
    rows[:, 0] = indices
    keys = views.keys(indices)
    if (padding := PADDING.get(views.augmentation)) is not None:
        top, left = crop_offsets(keys, padding)
        rows[:, 1], rows[:, 2] = top - padding, left - padding
    if views.augmentation in FLIPPED:
        rows[:, 3] = flips(keys)
    if views.augmentation == "crop_flip_cutout":
        rows[:, 4:] = cutout_boxes(keys, views.side)
    states = np.zeros(len(indices), np.uint8)
    kernels.small(file, source.offsets, rows, views.fill, pixels, states)
    return states


def _read_photographs(
    kernels: ModuleType, source: Beton, file: int, views: Views, indices: Indices, pixels: _Pixels
) -> _States:
    sizes = source.shapes[indices].tolist()
    if views.augmentation == "resized_crop_flip":
        numbers = draw_views(views.keys(indices)).tolist()
        drawn = zip(sizes, numbers, strict=True)
        places = [_random_place(width, height, views.side, row) for (height, width), row in drawn]
    else:
        named = zip(indices.tolist(), sizes, strict=True)
        places = [_fixed_place(w, h, views, f"{source.path}: sample {index}") for index, (h, w) in named]
    rows = np.column_stack([indices, np.array(places, np.int64), np.zeros_like(indices)])
    rows[:, -1] = kernels.FILTERS.index(views.seen.interpolation)
    states = np.zeros(len(indices), np.uint8)
    stored = source.offsets, source.sizes, source.shapes, source.are_raw
    kernels.photographs(file, *stored, rows, pixels, states)
    if views.augmentation in PADDING:
        fixed = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        pixels[:] = shifted(fixed, indices, views).transpose(0, 2, 3, 1)
    return states


def _random_place(width: int, height: int, side: int, numbers: list[float]) -> tuple[int, ...]:
    left, top, right, bottom = resized_crop_box(width, height, numbers)
    return top, left, bottom, right, side, side, 0, 0, is_flipped(numbers)


def _fixed_place(width: int, height: int, views: Views, name: str) -> tuple[int, ...]:
    with of_right_size(name):
        scaled, (left, top, _, _) = views.seen.view(width, height)
    return 0, 0, height, width, scaled[1], scaled[0], top, left, False


def _state(status: os.stat_result) -> FileState:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _kernels() -> ModuleType:
    try:
        from pbkd.data import beton_kernels
    except ImportError as error:
        raise without_ffcv(f"cannot be used: {error}") from error
    return beton_kernels
