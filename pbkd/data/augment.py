"""Random views of images: where they are (crops, flips, boxes), and how they look in uint8 batches and PIL
images. Both readers take the first from here."""

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from pbkd.data.draws import below, draw, unit
from pbkd.preprocessing import Box

_FLIP, _TOP, _LEFT = 1, 2, 3
_CUT_TOP, _CUT_LEFT = 4, 5
_ATTEMPTS = 10
_FIRST_ATTEMPT = 4  # attempt a draws area, ratio, top, left as the numbers 4 + 4a … 7 + 4a


def crop_offsets(keys: NDArray[np.uint64], padding: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Top and left, (N,) each, of a window of an image's size in the image padded by `padding` pixels."""
    bound = 2 * padding + 1
    return below(draw(keys, _TOP), bound), below(draw(keys, _LEFT), bound)


def flips(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of N images are mirrored left to right: half of them."""
    return below(draw(keys, _FLIP), 2).astype(bool)


def cutout_boxes(keys: NDArray[np.uint64], side: int) -> NDArray[np.int64]:
    """The part of each image that is cut out, (N, 4): top, left, bottom, right in pixels.

    A square of half the side whose centre is anywhere in the image, clipped at its borders (DeVries and
    Taylor 2017).
    """
    first = np.stack([below(draw(keys, _CUT_TOP), side), below(draw(keys, _CUT_LEFT), side)], axis=1)
    first -= side // 4
    return np.concatenate([first, first + side // 2], axis=1).clip(0, side)


def random_crop(images: NDArray[np.uint8], keys: NDArray[np.uint64], padding: int) -> NDArray[np.uint8]:
    """Each image of (N, C, H, W) padded with `padding` zeros on all sides, and a random H x W part of it."""
    count, channels, height, width = images.shape
    canvas = np.zeros((count, channels, height + 2 * padding, width + 2 * padding), np.uint8)
    canvas[:, :, padding : padding + height, padding : padding + width] = images
    windows = sliding_window_view(canvas, (height, width), axis=(2, 3))
    top, left = crop_offsets(keys, padding)
    cropped: NDArray[np.uint8] = windows[np.arange(count), :, top, left]
    return cropped


def random_flip(images: NDArray[np.uint8], keys: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Half of the images of (N, C, H, W) mirrored left to right, in place; returns `images`."""
    chosen = flips(keys)
    images[chosen] = images[chosen][..., ::-1]
    return images


def cut_out(
    images: NDArray[np.uint8], keys: NDArray[np.uint64], fill: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """A random part of each image of (N, C, S, S) replaced by `fill` (C,), in place; returns `images`."""
    boxes = cutout_boxes(keys, images.shape[-1]).tolist()
    for image, (top, left, bottom, right) in zip(images, boxes, strict=True):
        image[:, top:bottom, left:right] = fill[:, None, None]
    return images


def draw_views(keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """All numbers in [0, 1) that `resized_crop_box` and the flip need, shape (N, 44); column = draw
    number."""
    return np.stack([unit(draw(keys, number)) for number in range(_FIRST_ATTEMPT + 4 * _ATTEMPTS)], axis=1)


def resized_crop_box(width: int, height: int, numbers: list[float]) -> Box:
    """A part with 0.08 to 1 of the area and a ratio of 3/4 to 4/3, chosen as torchvision's RandomResizedCrop
    does.

    `numbers` is a row of `draw_views`. An image in which ten attempts do not fit gives its central part.
    """
    for first in range(_FIRST_ATTEMPT, len(numbers), 4):
        area = width * height * (0.08 + 0.92 * numbers[first])
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * numbers[first + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(numbers[first + 2] * (height - h + 1))
            left = int(numbers[first + 3] * (width - w + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def is_flipped(numbers: list[float]) -> bool:
    """Whether the view that a row of `draw_views` describes is mirrored left to right."""
    return numbers[_FLIP] >= 0.5


def resized_crop_flip(
    image: Image.Image, size: int, numbers: list[float], filter_: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """A random part of `image` scaled to size x size by `filter_`, and half of them mirrored."""
    image = image.crop(resized_crop_box(*image.size, numbers)).resize((size, size), filter_)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped(numbers) else image
