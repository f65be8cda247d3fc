"""The reader: batches as a pure function of (seed, epoch, batch), the same for every world size."""

import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pbkd.data.beton_reader import Beton, beton_splits, read_beton
from pbkd.data.datasets import CLASSES, Arrays, Files, Source, Split, list_folder, load_splits
from pbkd.data.draws import shuffled
from pbkd.data.inventory import recall_listing
from pbkd.data.loader import resolve_loader
from pbkd.data.memory import RecycledMemory
from pbkd.data.pixels import Indices, Views, read_arrays, read_files
from pbkd.data.settings import Augmentation, DataInfo, DataSettings
from pbkd.errors import UserError
from pbkd.preprocessing import Preprocessing

Batch = tuple[Tensor, Tensor]
"""images (N, C, H, W) float32 normalized, labels (N,) int64."""

_CACHED = 2**20
"""Numbers that are normalized at a time: few enough to stay in the processor's cache."""


class Reader:
    """Iterates over the batches of one split; made by `Data.reader`.

    An iteration gives batches (images (N, C, H, W) float32 normalized, labels (N,) int64) on `device`; N is
    this rank's contiguous share of the global batch, shares differing by one sample at most. The order
    depends only on (seed, epoch) and a sample's augmented view only on (seed, epoch, sample).

    A shuffled reader keeps the last, smaller batch of an epoch unless it holds fewer than two samples per
    rank, which batch normalization cannot train on. A reader that does not shuffle gives every sample exactly
    once over all ranks; a rank whose share of the last batch is empty skips it.
    """

    def __init__(
        self,
        split: Split[Source],
        info: DataInfo,
        seen: Preprocessing,
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        device: torch.device,
        augmentation: Augmentation,
        progressive: tuple[tuple[int, int], ...],
        shuffle: bool,
        channels_last: bool,
        workers: int,
    ) -> None:
        """See `Data.reader`."""
        self._split = split
        self._labels = torch.from_numpy(split.source.labels)
        self._seen = seen
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world = world
        self._device = device
        self._augmentation = augmentation
        self._progressive = progressive
        self._shuffle = shuffle
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        self._workers = workers
        mean, std = (
            torch.tensor(row, dtype=torch.float64).view(1, -1, 1, 1) for row in (info.mean, info.std)
        )
        self._fill = (255 * mean).round().to(torch.uint8).flatten().numpy()
        self._scale = (1 / (255 * std)).to(device, torch.float32)
        self._shift = (-mean / std).to(device, torch.float32)
        self._memory = RecycledMemory()
        self._epoch = 0
        self._first = 0
        self._closed = False
        self._running: weakref.WeakSet[Generator[Batch]] = weakref.WeakSet()

    def __len__(self) -> int:
        """Batches an epoch, the same for every rank."""
        batches, rest = divmod(len(self._split.indices), self._batch_size)
        smallest = 2 * self._world if self._shuffle else 1
        return batches + (rest >= smallest)

    def global_count(self, batch: int) -> int:
        """Samples of global batch `batch` over all ranks."""
        if not 0 <= batch < len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        return min(self._batch_size, len(self._split.indices) - batch * self._batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Take the order and views of `epoch` from the next iteration on."""
        self._epoch = epoch

    def resume_at(self, batch: int) -> None:
        """Begin the next iteration, and only that one, at global batch `batch`; at `len(self)` it is
        empty."""
        if not 0 <= batch <= len(self):
            raise IndexError(f"batch {batch} of {len(self)}")
        self._first = batch

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch. Raises UserError naming the file when an image cannot be read."""
        if self._closed:
            raise RuntimeError("the reader is closed")
        first, self._first = self._first, 0
        batches = self._batches(self._epoch, first)
        self._running.add(batches)
        return batches

    def close(self) -> None:
        """End every iteration and its threads."""
        self._closed = True
        for batches in list(self._running):
            batches.close()

    def _batches(self, epoch: int, first: int) -> Generator[Batch]:
        source = self._split.source
        usual = self._seen.image_size
        side = next((side for start, side in reversed(self._progressive) if start <= epoch), usual)
        views = Views(self._augmentation, self._seed, epoch, side, self._fill, self._seen)
        shares = self._shares(epoch, first)
        if isinstance(source, Arrays):
            batches = read_arrays(source, views, shares)
        elif isinstance(source, Beton):
            batches = read_beton(source, views, self._workers, self._memory, shares)
        else:
            assert isinstance(source, Files)
            batches = read_files(source, views, self._workers, shares)
        for pixels, indices in batches:
            yield self._on_device(pixels, self._labels[torch.from_numpy(indices)])

    def _shares(self, epoch: int, first: int) -> Iterator[Indices]:
        order = self._split.indices
        if self._shuffle:
            order = shuffled(order, self._seed, epoch)
        for batch in range(first, len(self)):
            start = batch * self._batch_size
            share = np.array_split(order[start : start + self._batch_size], self._world)[self._rank]
            if len(share):
                yield share

    def _on_device(self, pixels: Tensor, labels: Tensor) -> Batch:
        is_cuda = self._device.type == "cuda"
        if is_cuda:  # only copies from pinned memory overlap with computation
            pixels, labels = pixels.pin_memory(), labels.pin_memory()
        pixels = pixels.to(self._device, non_blocking=True)
        labels = labels.to(self._device, non_blocking=True)
        # As rows in the images' own layout, factors and summands are read like the pixels, not one by one.
        scale, shift = (
            each.expand(1, pixels.shape[1], 1, pixels.shape[3]).contiguous(memory_format=self._format)
            for each in (self._scale, self._shift)
        )
        images = self._empty(pixels.shape)
        few = len(pixels) if is_cuda else max(1, _CACHED // pixels[0].numel())
        for target, part in zip(images.split(few), pixels.split(few), strict=True):
            # Two operations, each rounded by itself: a fused one may round differently at the end of a part.
            target.copy_(part).mul_(scale).add_(shift)
        return images, labels

    def _empty(self, shape: torch.Size) -> Tensor:
        if self._device.type != "cpu":
            return torch.empty(shape, device=self._device, memory_format=self._format)
        if self._format == torch.contiguous_format:
            return torch.from_numpy(self._memory.empty(shape, np.float32))
        count, channels, height, width = shape
        stored = self._memory.empty((count, height, width, channels), np.float32)
        return torch.from_numpy(stored).permute(0, 3, 1, 2)


class Data:
    """An open data set: `info`, `settings`, `classes` (names, in the order of the labels), `sizes` ({"train",
    "val", "test"} -> samples) and readers."""

    def __init__(
        self, settings: DataSettings, splits: Mapping[str, Split[Source]], classes: Sequence[str]
    ) -> None:
        """See `open_data`."""
        self.settings = settings
        self.classes = tuple(classes)
        self.info = settings.describe(len(classes))
        self.sizes = {name: len(split.indices) for name, split in splits.items()}
        self._splits = splits

    def reader(
        self,
        split: str,
        batch_size: int,
        seed: int = 0,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        augment: bool = False,
        shuffle: bool = False,
        channels_last: bool = False,
    ) -> Reader:
        """A reader of `split` ("train", "val" or "test") for rank `rank` of `world`; see `Reader`.

        `batch_size` counts the samples of all ranks. `augment` gives the views that `settings.augment` names,
        else the fixed ones for evaluation. `channels_last` sets the memory format of the images. Raises
        UserError when the split is empty, or too small to train on with `world` ranks.
        """
        assert 0 <= rank < world
        assert batch_size >= 1
        size = self.sizes[split]
        if not size:
            raise UserError(f"the {split} split of {self.info.name} is empty\ncure: data.val_fraction=0.1")
        if shuffle and (batch_size < world or size < min(batch_size, 2 * world)):
            raise UserError(
                f"{size} samples in batches of {batch_size} are too few to train on with {world} workers\n"
                f"cure: fewer workers, or data.batch_size and data.limit of {2 * world} or more"
            )
        return Reader(
            self._splits[split],
            self.info,
            self.settings.preprocessing(),
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world=world,
            device=torch.device(device),
            augmentation=self.settings.augmentation if augment else "none",
            progressive=self.settings.progressive if augment else (),
            shuffle=shuffle,
            channels_last=channels_last,
            workers=self.settings.workers,
        )


def open_data(settings: DataSettings, digest: str | None = None, cache: Path | None = None) -> Data:
    """Open the data set by the loader that `settings` name; `Data.settings` has the one that `auto` took.

    With `torch`, CIFAR and digits are read into memory, a folder is listed and checked; with `ffcv`, the
    betons are opened and checked. `digest` is `data_digest` of the data, for callers who know it; with a
    folder `cache` the betons' content is compared with their sha256, once for each state of a file, and a
    folder is not listed again when it was listed with that digest.

    Raises UserError with the cure when data are missing or damaged. Images of a folder are decoded when a
    reader needs them; an unreadable one raises UserError there.
    """
    settings = resolve_loader(settings, digest)
    if settings.loader == "ffcv":
        return Data(settings, *beton_splits(settings, cache))
    if settings.name != "folder":
        return Data(settings, load_splits(settings), CLASSES[settings.name])
    listing = None
    if digest is not None and cache is not None:
        listing = recall_listing(settings.data_root(), settings.places(), digest, cache)
    listing = listing or list_folder(settings)
    return Data(settings, load_splits(settings, listing), listing.classes)
