"""From sample indices to uint8 batches: indexing arrays in memory, or decoding image files in threads."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pbkd.data.augment import (
    centre_crop,
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

PADDING: dict[Augmentation, int] = {"crop_flip": 4, "crop_flip_cutout": 4, "shift": 1}
"""Zero pixels around an image that is cropped to its own size."""

FLIPPED: tuple[Augmentation, ...] = ("crop_flip", "crop_flip_cutout")
_AHEAD = 3  # batches that are decoded while the consumer works on the one before

Indices = NDArray[np.int64]
_Started = TypeVar("_Started")


class Views(NamedTuple):
    """What, with a sample's index, determines its augmented view.

    side: of the view in pixels. fill: what a part that is cut out becomes, (C,).
    """

    augmentation: Augmentation
    seed: int
    epoch: int
    side: int
    fill: NDArray[np.uint8]

    def keys(self, indices: Indices) -> NDArray[np.uint64]:
        """The key of every sample's random draws."""
        return sample_keys(self.seed, self.epoch, indices)


def read_arrays(source: Arrays, views: Views, batches: Iterator[Indices]) -> Iterator[tuple[Tensor, Indices]]:
    """For each batch of indices: uint8 pixels (N, C, H, W) in memory of their own, and the indices."""
    padding = PADDING.get(views.augmentation)
    for indices in batches:
        pixels = source.images[indices]
        if padding is not None:
            keys = views.keys(indices)
            pixels = random_crop(pixels, keys, padding)
            if views.augmentation in FLIPPED:
                random_flip(pixels, keys)
            if views.augmentation == "crop_flip_cutout":
                cut_out(pixels, keys, views.fill)
        yield torch.from_numpy(pixels), indices


def read_files(
    source: Files, views: Views, workers: int, batches: Iterator[Indices]
) -> Iterator[tuple[Tensor, Indices]]:
    """For each batch of indices: uint8 pixels (N, 3, S, S) decoded by `workers` threads, and the
    indices.

    Decodes a few batches ahead and gives them in order. The threads end with the iteration, however it ends.
    Raises UserError naming the file when one cannot be read.
    """
    side = views.side

    def decode(index: int, numbers: list[float] | None, target: NDArray[np.uint8]) -> None:
        image = read_rgb(source.paths[index])
        view = centre_crop(image, side) if numbers is None else resized_crop_flip(image, side, numbers)
        target[:] = np.asarray(view)

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
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2), indices
    finally:
        threads.shutdown(cancel_futures=True)


def started_ahead(start: Callable[[Indices], _Started], batches: Iterator[Indices]) -> Iterator[_Started]:
    """What `start` gives for each batch, in order, a few batches after it was started."""
    waiting: deque[_Started] = deque()
    for indices in batches:
        waiting.append(start(indices))
        if len(waiting) > _AHEAD:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()
