"""What a beton stores of an image: its pixels, a JPEG made of it, or the JPEG file it came from."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, JpegImagePlugin

from pbkd.data.beton import BetonSettings
from pbkd.data.beton_format import JPEG, PAGE_SIZE, RAW
from pbkd.data.datasets import Arrays, Files
from pbkd.data.folder import BrokenImageError, read_rgb
from pbkd.errors import UserError

_QUALITY = 90
_SMART_BYTES = 3 * 224 * 224
_LARGEST_SIDE = 65535
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: what every decoder takes
_NO_FRAMES = (0xC4, 0xC8, 0xCC)  # tables and extensions among the markers of frames


@dataclass(frozen=True)
class Stored:
    """`content` of mode JPEG or RAW, of an image of `width` x `height` pixels."""

    content: bytes
    mode: int
    width: int
    height: int


def encoder(source: Arrays | Files, settings: BetonSettings) -> Callable[[int], Stored]:
    """A function that gives sample i of `source` as `settings` store it.

    It decodes and converts to RGB; it raises BrokenImageError when that fails, and UserError when the result
    does not fit into a beton.
    """
    if isinstance(source, Files):
        return lambda index: _encode_file(source.paths[index], settings)
    images = source.images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UserError(
            f"images are {images.dtype} of shape {images.shape}\nexpected uint8 of shape (N, 3, H, W)"
        )
    return lambda index: _fitting(
        _encode(Image.fromarray(np.ascontiguousarray(images[index].transpose(1, 2, 0))), settings),
        f"image {index}",
    )


def _encode_file(path: Path, settings: BetonSettings) -> Stored:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BrokenImageError(
            f"cannot read image {path}: {error.strerror}\ncure: replace the file, or remove it"
        ) from None
    image = read_rgb(path, content)
    limit = settings.max_resolution or _LARGEST_SIDE
    keeps = settings.mode != "raw" and settings.quality is None and max(image.size) <= limit
    keeps = keeps and _is_plain_jpeg(content)
    return _fitting(_encode(image, settings, content if keeps else None), f"image {path}")


def _encode(image: Image.Image, settings: BetonSettings, original: bytes | None = None) -> Stored:
    limit = settings.max_resolution
    if limit is not None and max(image.size) > limit:
        scale = limit / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)  # the mean of the area, as FFCV does
    raw_bytes = 3 * image.width * image.height
    if settings.mode == "raw" or (settings.mode == "smart" and raw_bytes <= _SMART_BYTES):
        return Stored(image.tobytes(), RAW, *image.size)
    if original is None:
        stream = BytesIO()
        image.save(stream, "JPEG", quality=settings.quality or _QUALITY)
        original = stream.getvalue()
    return Stored(original, JPEG, *image.size)


def _fitting(stored: Stored, name: str) -> Stored:
    if len(stored.content) > PAGE_SIZE or max(stored.width, stored.height) > _LARGEST_SIDE:
        raise UserError(
            f"{name}: {stored.width} x {stored.height} pixels take {len(stored.content)} bytes\n"
            f"expected at most {PAGE_SIZE} bytes and sides of {_LARGEST_SIDE}\n"
            "cure: --max-resolution 1024, or --mode jpeg"
        )
    return stored


def _is_plain_jpeg(content: bytes) -> bool:
    """Whether every decoder takes it as the RGB image that PIL sees in it."""
    with Image.open(BytesIO(content)) as image:
        usual = image.format == "JPEG" and image.mode == "RGB" and JpegImagePlugin.get_sampling(image) >= 0
    return usual and _frame_marker(content) in _HUFFMAN_FRAMES


def _frame_marker(content: bytes) -> int | None:
    """The marker of a JPEG's first frame, which tells how it is coded."""
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
            return marker
        position += 2 + int.from_bytes(content[position + 2 : position + 4])
    return None
