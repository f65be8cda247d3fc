"""What libjpeg-turbo, which decodes for PIL and FFCV, says of a JPEG file; PIL keeps it to itself."""

import ctypes
from functools import cache

import numpy as np

from pbkd.errors import UserError

_NAMES = ("libturbojpeg.so.0", "libturbojpeg.so", "libturbojpeg.dylib")
_STOP_ON_WARNING = 8192
_RGB, _GRAY, _CMYK = 0, 6, 11
_PIXELS = {"RGB": (_RGB, 3), "L": (_GRAY, 1), "CMYK": (_CMYK, 4)}


def complaint(content: bytes, mode: str, width: int, height: int) -> str | None:
    """The first error or warning when a JPEG of PIL's `mode` is decoded, or None.

    Raises UserError where libturbojpeg is not installed.
    """
    library = _library()
    layout, channels = _PIXELS[mode]
    pixels = np.empty((height, width, channels), np.uint8)
    decoder = library.tjInitDecompress()
    assert decoder
    try:
        failed = library.tjDecompress2(
            decoder, content, len(content), pixels.ctypes.data, width, 0, height, layout, _STOP_ON_WARNING
        )
        said: bytes = library.tjGetErrorStr2(decoder)
        return said.decode("ascii", "replace") if failed else None
    finally:
        library.tjDestroy(decoder)


@cache
def _library() -> ctypes.CDLL:
    for name in _NAMES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.tjInitDecompress.restype = ctypes.c_void_p
        library.tjDestroy.argtypes = [ctypes.c_void_p]
        library.tjGetErrorStr2.argtypes = [ctypes.c_void_p]
        library.tjGetErrorStr2.restype = ctypes.c_char_p
        numbers = [ctypes.c_int] * 5
        library.tjDecompress2.argtypes = [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_ulong,
            ctypes.c_void_p,
            *numbers,
        ]
        return library
    raise UserError(
        "libturbojpeg cannot be loaded: it tells which JPEG files are damaged, and FFCV needs it too\n"
        "cure: make ffcv, or sudo apt-get install libturbojpeg0"
    )
