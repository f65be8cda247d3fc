"""From sample indices to uint8 batches: indexing arrays in memory, or decoding image files in threads."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pbkd.data.augment import (
    cut_out,
    draw_views,
    random_crop,
    random_flip,
    resized_crop_flip,
)
from pbkd.data.datasets import Arrays, Files
from pbkd.data.draws import sample_keys
from pbkd.data.folder import read_rgb
from pbkd.data.settings import Augmentation
from pbkd.errors import UserError
from pbkd.preprocessing import Preprocessing, WrongSizeError

PADDING: dict[Augmentation, int] = {"crop_flip": 4, "crop_flip_cutout": 4, "shift": 1}
"""Zero pixels around an image that is cropped to its own size."""

FLIPPED: tuple[Augmentation, ...] = ("crop_flip", "crop_flip_cutout")
_AHEAD = 3  # batches that are decoded while the consumer works on the one before

Indices = NDArray[np.int64]
_Started = TypeVar("_Started")


class Views(NamedTuple):
    """What, with a sample's index, determines its augmented view.

    side: of the view in pixels. fill: what a part that is cut out becomes, (C,). seen: how an image file is
    looked at; `none` and what crops by some pixels begin with its fixed view.
    """

    augmentation: Augmentation
    seed: int
    epoch: int
    side: int
    fill: NDArray[np.uint8]
    seen: Preprocessing

    def keys(self, indices: Indices) -> NDArray[np.uint64]:
        """The key of every sample's random draws."""
        return sample_keys(self.seed, self.epoch, indices)


def read_arrays(source: Arrays, views: Views, batches: Iterator[Indices]) -> Iterator[tuple[Tensor, Indices]]:
    """For each batch of indices: uint8 pixels (N, C, H, W) in memory of their own, and the indices."""
    for indices in batches:
        yield torch.from_numpy(shifted(source.images[indices], indices, views)), indices


def shifted(pixels: NDArray[np.uint8], indices: Indices, views: Views) -> NDArray[np.uint8]:
    """Images (N, C, H, W) cropped by some pixels, mirrored and with a part cut out, as `views` say."""
    padding = PADDING.get(views.augmentation)
    if padding is None:
        return pixels
    keys = views.keys(indices)
    pixels = random_crop(pixels, keys, padding)
    if views.augmentation in FLIPPED:
        random_flip(pixels, keys)
    if views.augmentation == "crop_flip_cutout":
        cut_out(pixels, keys, views.fill)
    return pixels


def read_files(
    source: Files, views: Views, workers: int, batches: Iterator[Indices]
) -> Iterator[tuple[Tensor, Indices]]:
    """For each batch of indices: uint8 pixels (N, 3, S, S) decoded by `workers` threads, and the
    indices.

    Decodes a few batches ahead and gives them in order. The threads end with the iteration, however it ends.
    Raises UserError naming the file when one cannot be read.
    """
    side, seen = views.side, views.seen

    def decode(index: int, numbers: list[float] | None, target: NDArray[np.uint8]) -> None:
        path = source.path(index)
        image = read_rgb(path, upright=seen.orientation == "exif")
        if numbers is None:
            with of_right_size(f"image {path}"):
                target[:] = seen.pixels(image)
        else:
            target[:] = np.asarray(resized_crop_flip(image, side, numbers, seen.filter))

    def start(indices: Indices) -> tuple[NDArray[np.uint8], Indices, list[Future[None]]]:
        pixels = np.empty((len(indices), side, side, 3), np.uint8)
        random = views.augmentation == "resized_crop_flip"
        numbers = draw_views(views.keys(indices)).tolist() if random else [None] * len(indices)
        tasks = zip(indices.tolist(), numbers, pixels, strict=True)
        return pixels, indices, [threads.submit(decode, *task) for task in tasks]

    threads = ThreadPoolExecutor(workers, "pbkd-decode")
    try:
        for pixels, indices, work in started_ahead(start, batches):
            for future in work:
                future.result()
            yield torch.from_numpy(shifted(pixels.transpose(0, 3, 1, 2), indices, views)), indices
    finally:
        threads.shutdown(cancel_futures=True)


@contextmanager
def of_right_size(name: str) -> Iterator[None]:
    """Raise UserError for an image, of this name, that the network does not take."""
    try:
        yield
    except WrongSizeError as error:
        cure = "data.resize=short_side, or data.image_size with the images' own"
        raise UserError(f"{name}: {error}\ncure: {cure}") from None


def started_ahead(start: Callable[[Indices], _Started], batches: Iterator[Indices]) -> Iterator[_Started]:
    """What `start` gives for each batch, in order, a few batches after it was started."""
    waiting: deque[_Started] = deque()
    for indices in batches:
        waiting.append(start(indices))
        if len(waiting) > _AHEAD:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()
