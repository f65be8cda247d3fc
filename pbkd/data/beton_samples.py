"""What a beton stores of an image: its pixels, a JPEG made of it, or the JPEG file it came from."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin

from pbkd.data.beton import BetonSettings
from pbkd.data.beton_format import JPEG, PAGE_SIZE, RAW
from pbkd.data.datasets import Arrays, Files
from pbkd.data.folder import BrokenImageError, read_rgb
from pbkd.data.turbojpeg import complaint
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
        return lambda index: _encode_file(source.path(index), settings)
    images = source.images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UserError(
            f"images are {images.dtype} of shape {images.shape}\nexpected uint8 of shape (N, 3, H, W)"
        )
    return lambda index: _fitting(
        _encode(Image.fromarray(np.ascontiguousarray(images[index].transpose(1, 2, 0))), settings),
        f"image {index}",
    )


def read_sound(path: Path, upright: bool = False) -> tuple[Image.Image, bytes | None]:
    """The image in RGB, and the file's content if that is a JPEG that every decoder takes as this image.

    `upright` turns it as its EXIF tag says.

    Raises BrokenImageError naming the file when it cannot be read, or is a JPEG with damaged data, which PIL
    decodes to noise without a word.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BrokenImageError(
            f"cannot read image {path}: {error.strerror}\ncure: replace the file, or remove it"
        ) from None
    image = read_rgb(path, content, upright=upright)
    with Image.open(BytesIO(content)) as header:
        if header.format not in ("JPEG", "MPO") or _frame_marker(content) not in _HUFFMAN_FRAMES:
            return image, None
        said = complaint(content, header.mode, *header.size)
        if said and said.startswith("Corrupt JPEG data") and "extraneous" not in said:
            raise BrokenImageError(f"damaged image {path}: {said}\ncure: replace the file, or remove it")
        is_plain = not said and header.mode == "RGB" and JpegImagePlugin.get_sampling(header) >= 0
        is_turned = upright and header.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return image, content if is_plain and not is_turned else None


def _encode_file(path: Path, settings: BetonSettings) -> Stored:
    image, content = read_sound(path, settings.orientation == "exif")
    keeps = settings.quality is None and max(image.size) <= (settings.max_resolution or _LARGEST_SIDE)
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


def _frame_marker(content: bytes) -> int | None:
    """The marker of a JPEG's first frame, which tells how it is coded."""
    position = 2
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
            return marker
        position += 2 + int.from_bytes(content[position + 2 : position + 4])
    return None
