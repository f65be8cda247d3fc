"""Compiled reading of betons: stored images to views, on several threads, without Python's lock.

Imported only where FFCV is used, for it imports FFCV, which takes seconds. A kernel is compiled at its first
call in a process, and then serves every file, split, augmentation, seed and epoch: they are arguments.
"""

from typing import Any

import numba
import numpy as np
from ffcv.libffcv import imdecode, read, resize_crop
from numba import njit, prange
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Whole = NDArray[np.int64]

INTACT, UNREADABLE, UNDECODABLE = 0, 1, 2
"""What a kernel says of each sample."""

set_threads = numba.set_num_threads
MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS

_pread = njit(nogil=True)(read)
_imdecode = njit(nogil=True)(imdecode)
_resize_crop = njit(nogil=True)(resize_crop)


def _read(file: int, offset: int, target: Pixels) -> int:
    done = 0
    while done < target.size:
        count = _pread(file, target[done:], offset + done)
        if count <= 0:
            return UNREADABLE
        done += count
    return INTACT


def _view_small(image: Pixels, row: Whole, fill: Pixels, view: Pixels) -> None:
    top, left, flipped = row[1], row[2], row[3]
    height, width, channels = view.shape
    first, last = max(0, -left), min(width, width - left)  # columns of the view that are in the image
    view[:] = 0
    for y in range(max(0, -top), min(height, height - top)):
        for x in range(first, last):
            to = width - 1 - x if flipped else x
            for channel in range(channels):
                view[y, to, channel] = image[y + top, x + left, channel]
    for y in range(row[4], row[6]):
        for x in range(row[5], row[7]):
            for channel in range(channels):
                view[y, x, channel] = fill[channel]


def _view_photograph(image: Pixels, row: Whole, view: Pixels) -> None:
    top, left, bottom, right, height, width = row[1], row[2], row[3], row[4], row[5], row[6]
    y, x, flipped = row[7], row[8], row[9]
    side = len(view)
    scaled = np.empty((height, width, 3), np.uint8)
    _resize_crop(image, top, bottom, left, right, scaled)
    for line in range(side):
        for column in range(side):
            to = side - 1 - column if flipped else column
            for channel in range(3):
                view[line, to, channel] = scaled[y + line, x + column, channel]


_read_compiled = njit(nogil=True)(_read)
_view_small_compiled = njit(nogil=True)(_view_small)
_view_photograph_compiled = njit(nogil=True)(_view_photograph)


def _small(file: int, offsets: Whole, rows: Whole, fill: Pixels, views: Pixels, states: Pixels) -> None:
    for number in prange(len(rows)):
        image = np.empty(views.shape[1:], np.uint8)
        states[number] = _read_compiled(file, offsets[rows[number, 0]], image.reshape(-1))
        _view_small_compiled(image, rows[number], fill, views[number])


def _photograph(
    file: int, offset: int, size: int, shape: Whole, is_raw: bool, row: Whole, view: Pixels
) -> int:
    pixels = np.empty((shape[0], shape[1], 3), np.uint8)
    state: int
    if is_raw:
        state = _read_compiled(file, offset, pixels.reshape(-1))
    else:
        stored = np.empty(size, np.uint8)
        state = _read_compiled(file, offset, stored)
        if state == INTACT and _imdecode(
            stored, pixels, shape[0], shape[1], shape[0], shape[1], 0, 0, 1, 1, False, False
        ):
            state = UNDECODABLE
    if state == INTACT:
        _view_photograph_compiled(pixels, row, view)
    return state


_photograph_compiled = njit(nogil=True)(_photograph)


def _photographs(
    file: int,
    offsets: Whole,
    sizes: Whole,
    shapes: Whole,
    are_raw: NDArray[np.bool_],
    rows: Whole,
    views: Pixels,
    states: Pixels,
) -> None:
    for number in prange(len(rows)):
        sample = rows[number, 0]
        states[number] = _photograph_compiled(
            file,
            offsets[sample],
            sizes[sample],
            shapes[sample],
            are_raw[sample],
            rows[number],
            views[number],
        )


small: Any = njit(nogil=True, parallel=True)(_small)
"""Views (N, H, W, C) of raw images of that size: a window of the image among zeros, mirrored, a part cut out.

A row of `rows` (N, 8): sample; top and left of the window in the image; whether it is mirrored; top, left,
bottom, right of the part that becomes `fill` (C,). Of sample i, `offsets` has the place in `file`, an open
descriptor. `states` (N,) is filled with how it went.
"""

photographs: Any = njit(nogil=True, parallel=True)(_photographs)
"""Views (N, S, S, 3) of images of any size: of each a part, scaled, of that a square, perhaps mirrored.

A row of `rows` (N, 10): sample; top, left, bottom, right of the part; height and width that it is scaled to;
top and left of the square in that; whether it is mirrored. Of sample i, `offsets` and `sizes` have place and
bytes in `file`, an open descriptor, `shapes` height and width, and `are_raw` whether it is stored as pixels
or as JPEG. `states` (N,) is filled with how it went.
"""
