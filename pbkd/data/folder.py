"""Images in class folders, as ImageNet has them: listing, checks and decoding."""

import os
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from pbkd.errors import UserError

_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_LAYOUT = "expected ROOT/train/CLASS/*.JPEG and ROOT/val/CLASS/*.JPEG"


class BrokenImageError(UserError):
    """An image file that cannot be read; names it."""


def list_classes(folder: Path) -> list[str]:
    """Names of the class folders of root/train or root/val, sorted. Raises UserError if there are none."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"data.root: cannot list {folder}: {error.strerror}\n{_LAYOUT}\ncure: data.root=ROOT"
        ) from None
    if not names:
        raise UserError(
            f"data.root: no class folders in {folder}\n{_LAYOUT}\ncure: move each image to its class's folder"
        )
    return sorted(names)


def list_images(root: Path) -> dict[str, list[list[Path]]]:
    """The image files below root/train and root/val, by class in the order of names, sorted in each class.

    Raises UserError when the two parts have different classes or a class has no image.
    """
    classes = {part: list_classes(root / part) for part in ("train", "val")}
    for part, other in (("train", "val"), ("val", "train")):
        missing = sorted(set(classes[part]) - set(classes[other]))
        if missing:
            raise UserError(
                f"data.root: {root / other} lacks {len(missing)} classes of {root / part}: {missing[0]}, …\n"
                f"{_LAYOUT}\ncure: the same class folders in both"
            )
    return {part: [_images(root / part / name) for name in names] for part, names in classes.items()}


def _images(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(
            f"data.root: cannot list {folder}: {error.strerror}\ncure: make it readable, or remove it"
        ) from None
    names = sorted(name for name in names if name.lower().endswith(_SUFFIXES))
    if not names:
        raise UserError(
            f"data.root: class folder {folder} holds no image\n"
            f"expected files named *{', *'.join(_SUFFIXES)}\n"
            "cure: add images, or remove the folder from train and val"
        )
    return [folder / name for name in names]


def read_rgb(path: Path, content: bytes | None = None) -> Image.Image:
    """Decode an image file to mode RGB; transparency is dropped, 16-bit grey keeps its upper byte.

    `content` is the file's, where it has been read already. Raises BrokenImageError naming the file when it
    cannot be read, or holds numbers without a fixed range (32-bit integers, floats).
    """
    try:
        with Image.open(path if content is None else BytesIO(content)) as image:
            if image.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {image.mode} have no fixed range")
            if image.mode.startswith("I;16"):
                # PIL would clip it at 255.
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if "transparency" in image.info:
                # PIL warns when a palette with transparency goes to RGB directly.
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more on broken files
        # PIL names a stream by its address.
        reason = str(error).partition("\n")[0].partition(" <_io.")[0]
        raise BrokenImageError(
            f"cannot read image {path}: {type(error).__name__}: {reason}\n"
            "cure: replace the file, or remove it"
        ) from error
