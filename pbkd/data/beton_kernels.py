"""Compiled reading of betons: stored images to views, on several threads, without Python's lock.

Imported only where FFCV is used. A kernel is compiled at its first call on a machine and then kept by numba;
it serves every file, split, augmentation, seed and epoch: they are arguments. FFCV's JPEG decoder is called
by its name in FFCV's library, which is opened without the package: that takes seconds to import, and
addresses, as it hands them to numba, could not be kept.
"""

import ctypes
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numba import njit, prange, types
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Whole = NDArray[np.int64]

INTACT, UNREADABLE, UNDECODABLE = 0, 1, 2
"""What a kernel says of each sample."""

set_threads = numba.set_num_threads
MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS


def _named(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    """A function of a library, as compiled code calls it."""
    llvmlite.binding.add_symbol(f"pbkd_{name}", ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    return types.ExternalFunction(f"pbkd_{name}", result(*arguments))


def _library() -> ctypes.CDLL:
    package = find_spec("ffcv")
    if package is None or package.origin is None:
        raise ImportError("FFCV is not installed")
    found = list(Path(package.origin).parent.glob("_libffcv.*"))
    if not found:
        raise ImportError(f"{package.origin}: its library _libffcv is missing")
    try:
        return ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise ImportError(str(error)) from error


_pread = _named(ctypes.CDLL(None), "pread", types.int64, types.int32, types.uintp, types.uint64, types.int64)
# Content and its bytes; height, width; where to; the part: height, width, top, left; the scale; crop, flip.
_imdecode = _named(
    _library(), "imdecode", types.int32,
    *(types.uintp, types.uint64, types.uint32, types.uint32, types.uintp), *[types.uint32] * 8,
)  # fmt: skip

FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
"""How `photographs` scales, by number: as PIL does (Pillow's Resample.c), but always across first and then
down, where PIL takes the cheaper order: roundings differ."""

_NEAREST, _BOX, _BILINEAR, _HAMMING, _, _LANCZOS = range(6)
_SUPPORT = np.array([0.0, 0.5, 1.0, 1.0, 2.0, 3.0])
_PRECISION = 22  # bits of a weight; a sum of weighted bytes then fits into 32


def _read(file: int, offset: int, target: Pixels) -> int:
    done = 0
    while done < target.size:
        rest = target[done:]
        count = _pread(file, rest.ctypes.data, rest.size, offset + done)
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


def _sinc(x: float) -> float:
    return 1.0 if x == 0.0 else math.sin(math.pi * x) / (math.pi * x)


def _weight(kind: int, x: float) -> float:
    if kind == _BOX:
        return 1.0 if -0.5 < x <= 0.5 else 0.0
    x = abs(x)
    weight = 0.0
    if x >= _SUPPORT[kind]:
        pass
    elif kind == _BILINEAR:
        weight = 1.0 - x
    elif kind == _HAMMING:
        weight = _sinc_compiled(x) * (0.54 + 0.46 * math.cos(math.pi * x))
    elif kind == _LANCZOS:
        weight = _sinc_compiled(x) * _sinc_compiled(x / 3)
    elif x < 1.0:  # bicubic
        weight = (1.5 * x - 2.5) * x * x + 1.0
    else:
        weight = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return weight


def _weights(source: int, scaled: int, first: int, count: int, kind: int) -> tuple[Whole, Whole]:
    """Of `count` lines from `first` on, of `scaled` ones made of `source`: where the lines begin that each is
    made of and how many they are, (count, 2), and their weights, (count, most)."""
    scale = source / scaled
    wide = max(scale, 1.0)
    support = _SUPPORT[kind] * wide
    places = np.empty((count, 2), np.int64)
    weights = np.zeros((count, 2 * math.ceil(support) + 1), np.int32)
    own = np.empty(weights.shape[1])
    for line in range(count):
        centre = (first + line + 0.5) * scale
        begin = max(0, int(centre - support + 0.5))
        number = min(source, int(centre + support + 0.5)) - begin
        total = 0.0
        for index in range(number):
            own[index] = _weight_compiled(kind, (index + begin - centre + 0.5) / wide)
            total += own[index]
        for index in range(number):
            share = own[index] / total * (1 << _PRECISION) if total else 0.0
            weights[line, index] = int(share - 0.5) if share < 0 else int(share + 0.5)
        places[line, 0], places[line, 1] = begin, number
    return places, weights


def _byte(total: int) -> int:
    return min(255, max(0, total >> _PRECISION))


def _resample(image: Pixels, height: int, width: int, y: int, x: int, kind: int, view: Pixels) -> None:
    """`view` (S, S, 3), which begins at (y, x) of `image` scaled to height x width."""
    side = len(view)
    rows, row_weights = _weights_compiled(image.shape[0], height, y, side, kind)
    columns, column_weights = _weights_compiled(image.shape[1], width, x, side, kind)
    begin = rows[0, 0]
    end = rows[side - 1, 0] + rows[side - 1, 1]
    half = 1 << (_PRECISION - 1)
    if height == image.shape[0]:
        begin, end = y, y + side
    lines = np.empty((end - begin, side, 3), np.uint8)
    if width == image.shape[1]:
        lines[:] = image[begin:end, x : x + side]
    else:
        for line in range(end - begin):
            for column in range(side):
                red = green = blue = half
                start = columns[column, 0]
                for index in range(columns[column, 1]):
                    weight = column_weights[column, index]
                    red += weight * image[begin + line, start + index, 0]
                    green += weight * image[begin + line, start + index, 1]
                    blue += weight * image[begin + line, start + index, 2]
                lines[line, column, 0] = _byte_compiled(red)
                lines[line, column, 1] = _byte_compiled(green)
                lines[line, column, 2] = _byte_compiled(blue)
    if height == image.shape[0]:
        view[:] = lines
        return
    sums = np.empty(3 * side, np.int32)  # narrow, and one after the other: the processor adds many at a time
    flat = lines.reshape(len(lines), 3 * side)
    target = view.reshape(side, 3 * side)
    for line in range(side):
        sums[:] = half
        for index in range(rows[line, 1]):
            weight = row_weights[line, index]
            source = flat[rows[line, 0] - begin + index]
            for place in range(3 * side):
                sums[place] += weight * source[place]
        for place in range(3 * side):
            target[line, place] = _byte_compiled(sums[place])


def _pick(image: Pixels, height: int, width: int, y: int, x: int, view: Pixels) -> None:
    """`_resample` by the nearest pixel."""
    side = len(view)
    down, right = image.shape[0] / height, image.shape[1] / width
    row = down * 0.5
    for line in range(y + side):
        if line >= y:
            column = right * 0.5
            for place in range(x + side):
                if place >= x:
                    view[line - y, place - x] = image[int(row), int(column)]
                column += right
        row += down


def _view_photograph(image: Pixels, row: Whole, view: Pixels) -> None:
    top, left, bottom, right, height, width = row[1], row[2], row[3], row[4], row[5], row[6]
    y, x, flipped, kind = row[7], row[8], row[9], row[10]
    part = image[top:bottom, left:right]
    if kind == _NEAREST:
        _pick_compiled(part, height, width, y, x, view)
    else:
        _resample_compiled(part, height, width, y, x, kind, view)
    if flipped:
        side = len(view)
        for line in range(side):
            for column in range(side // 2):
                for channel in range(3):
                    other = view[line, side - 1 - column, channel]
                    view[line, side - 1 - column, channel] = view[line, column, channel]
                    view[line, column, channel] = other


_sinc_compiled = njit(nogil=True, cache=True)(_sinc)
_weight_compiled = njit(nogil=True, cache=True)(_weight)
_weights_compiled = njit(nogil=True, cache=True)(_weights)
_byte_compiled = njit(nogil=True, cache=True)(_byte)
_resample_compiled = njit(nogil=True, cache=True)(_resample)
_pick_compiled = njit(nogil=True, cache=True)(_pick)
_read_compiled = njit(nogil=True, cache=True)(_read)
_view_small_compiled = njit(nogil=True, cache=True)(_view_small)
_view_photograph_compiled = njit(nogil=True, cache=True)(_view_photograph)


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
        height, width = shape[0], shape[1]
        if state == INTACT and _imdecode(
            stored.ctypes.data, size, height, width, pixels.ctypes.data, height, width, 0, 0, 1, 1, 0, 0
        ):
            state = UNDECODABLE
    if state == INTACT:
        _view_photograph_compiled(pixels, row, view)
    return state


_photograph_compiled = njit(nogil=True, cache=True)(_photograph)


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


small: Any = njit(nogil=True, parallel=True, cache=True)(_small)
"""Views (N, H, W, C) of raw images of that size: a window of the image among zeros, mirrored, a part cut out.

A row of `rows` (N, 8): sample; top and left of the window in the image; whether it is mirrored; top, left,
bottom, right of the part that becomes `fill` (C,). Of sample i, `offsets` has the place in `file`, an open
descriptor. `states` (N,) is filled with how it went.
"""

photographs: Any = njit(nogil=True, parallel=True, cache=True)(_photographs)
"""Views (N, S, S, 3) of images of any size: of each a part, scaled, of that a square, perhaps mirrored.

A row of `rows` (N, 11): sample; top, left, bottom, right of the part; height and width that it is scaled to;
top and left of the square in that; whether it is mirrored; the number of the filter in `FILTERS`. Of sample
i, `offsets` and `sizes` have place and bytes in `file`, an open descriptor, `shapes` height and width, and
`are_raw` whether it is stored as pixels or as JPEG. `states` (N,) is filled with how it went.
"""
