"""Preprocessing: what makes a network's input of an image file. It travels with the network.

This file too: an MLflow model has a copy, so it imports nothing of pbkd.
"""

from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict

Resize = Literal["short_side", "both", "none"]
Crop = Literal["center", "none"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Orientation = Literal["stored", "exif"]

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels, as PIL takes it."""


_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "TIFF", "WEBP", "JPEG2000", "AVIF")
"""The decoders of PIL that are used, where it was built with them: safe to try on any file."""


@cache
def formats() -> tuple[str, ...]:
    """The image formats that this PIL reads, of those that are used."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def decode(file: Path | BytesIO, *, upright: bool) -> Image.Image:
    """An image file in mode RGB; transparency is dropped, 16-bit grey keeps its upper byte.

    `upright` turns it as its EXIF tag says. Raises what PIL raises, and ValueError for numbers without a
    fixed range (32-bit integers, floats).
    """
    with Image.open(file, formats=formats()) as image:
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode} have no fixed range")
        if image.mode.startswith("I;16"):
            # PIL would clip it at 255.
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if "transparency" in image.info:
            # PIL warns when a palette with transparency goes to RGB directly.
            return image.convert("RGBA").convert("RGB")
        return image.convert("RGB")


class WrongSizeError(ValueError):
    """An image of a size that a network does not take."""


class Preprocessing(BaseModel):
    """From an image file to a network's input, step by step.

    orientation: `exif` turns a photograph as its EXIF tag says; `stored` takes the pixels as they are stored,
      as torchvision's and timm's readers do.
    colours: order of the channels: `RGB`, or `grey`.
    resize: `short_side` scales to `resize_size` pixels there and keeps the ratio, `both` scales both sides to
      it, `none` takes the pixels as they are.
    interpolation: of PIL, which averages over what it scales down (torchvision's `antialias=True`).
    crop: `center` takes the central `image_size` x `image_size` of that; with `none` it must have that size.
    mean, std: per channel: pixels in [0, 1], minus mean, divided by std.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    orientation: Orientation = "stored"
    colours: Literal["RGB", "grey"] = "RGB"
    resize: Resize = "none"
    resize_size: int | None = None
    interpolation: Interpolation = "bilinear"
    crop: Crop = "none"
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def filter(self) -> Image.Resampling:
        """PIL's name of `interpolation`."""
        return Image.Resampling[self.interpolation.upper()]

    def view(self, width: int, height: int) -> tuple[tuple[int, int], Box]:
        """Width and height to which an image of that size is scaled, and the box of it that is cut out.

        Raises WrongSizeError when the image has not the size it must have.
        """
        side = self.image_size
        scaled = width, height
        if self.resize_size is not None:
            scaled = self.resize_size, self.resize_size
            if self.resize == "short_side":  # the longer side is cut off, as torchvision does
                scaled = tuple(  # type: ignore[assignment]  # two of them
                    int(self.resize_size * length / min(width, height)) for length in (width, height)
                )
        if scaled != (side, side) and (self.crop == "none" or min(scaled) < side):
            raise WrongSizeError(
                f"has {width} x {height} pixels\n"
                f"expected {side} x {side}, since resize is {self.resize} and crop is {self.crop}"
            )
        left, top = round((scaled[0] - side) / 2), round((scaled[1] - side) / 2)
        return scaled, (left, top, left + side, top + side)

    def pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """The pixels (S, S) or (S, S, 3) that the network sees of an image in its colours and orientation.

        Raises WrongSizeError; see `view`.
        """
        scaled, box = self.view(*image.size)
        if scaled != image.size:
            image = image.resize(scaled, self.filter)
        return np.asarray(image.crop(box))
