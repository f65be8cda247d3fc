"""The data sets: what their samples are, and which of them make up the train, val and test splits."""

import fcntl
import gzip
import tarfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pbkd.data.draws import shuffled
from pbkd.data.folder import list_images
from pbkd.data.settings import DataSettings
from pbkd.errors import UserError
from pbkd.torchvision_compat import import_torchvision

_SPLIT_SEED = 1797  # fixed for ever: the splits do not depend on a recipe's seed
_DIGITS_TRAIN, _DIGITS_VAL = 700, 97

CIFAR_FILES = {
    "cifar10": (
        "cifar-10-batches-py",
        (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"),
    ),
    "cifar100": ("cifar-100-python", ("train", "test", "meta")),
}
"""Folder and files of the official archives."""


@dataclass(frozen=True)
class Arrays:
    """A data set in memory: images (N, C, H, W) uint8, labels (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Files:
    """A data set of image files, with labels (N,)."""

    paths: list[Path]
    labels: NDArray[np.int64]


class Source(Protocol):
    """Where samples come from: `Arrays`, `Files`, or a beton."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every sample, (N,)."""


SourceT = TypeVar("SourceT", bound=Source)
SourceT_co = TypeVar("SourceT_co", bound=Source, covariant=True)


@dataclass(frozen=True)
class Split(Generic[SourceT_co]):
    """Samples `indices` (M,) of `source`, in the split's fixed order."""

    source: SourceT_co
    indices: NDArray[np.int64]


def load_splits(settings: DataSettings) -> dict[str, Split[Arrays | Files]]:
    """The splits `train`, `val` and `test`. Raises UserError with the cure when the data are missing or
    damaged."""
    if settings.name == "digits":
        digits = load_digits()
        order = _fixed_order(len(digits.labels))
        bounds = [_DIGITS_TRAIN, _DIGITS_TRAIN + _DIGITS_VAL]
        parts = dict(zip(("train", "val", "test"), np.split(order, bounds), strict=True))
        splits: dict[str, Split[Arrays | Files]] = {}
        splits |= {name: Split(digits, indices) for name, indices in parts.items()}
        return _limited(settings, splits)
    train, test = _load_folder(settings) if settings.name == "folder" else _load_cifar(settings)
    return divided(settings, train, test)


def divided(settings: DataSettings, train: SourceT, test: SourceT) -> dict[str, Split[SourceT]]:
    """The splits `train`, `val` and `test` of a data set that comes in two parts."""
    order = _fixed_order(len(train.labels))
    kept = len(order) - round(len(order) * settings.val_fraction)
    splits = {
        "train": Split(train, order[:kept]),
        "val": Split(train, order[kept:]),
        "test": Split(test, _fixed_order(len(test.labels))),
    }
    return _limited(settings, splits)


def _limited(settings: DataSettings, splits: dict[str, Split[SourceT]]) -> dict[str, Split[SourceT]]:
    return {name: Split(split.source, split.indices[: settings.limit]) for name, split in splits.items()}


def load_digits() -> Arrays:
    """The 1797 digits of 8 x 8 pixels that come with scikit-learn, their 0..16 scaled to 0..255.

    Its file is read as it is: importing scikit-learn takes two seconds, and this takes five milliseconds.
    """
    package = find_spec("sklearn")
    assert package is not None and package.submodule_search_locations, "scikit-learn is a dependency"
    path = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt") as file:
        rows = np.loadtxt(file, np.uint8, delimiter=",")  # 64 pixels, then the label
    pixels = np.round(rows[:, :-1] * (255 / 16)).astype(np.uint8)
    return Arrays(pixels.reshape(-1, 1, 8, 8), rows[:, -1].astype(np.int64))


def fetch_cifar(settings: DataSettings) -> None:
    """Download the CIFAR of `settings` into `root`, where processes of one machine wait for each other.

    Raises UserError when that fails.
    """
    root = settings.data_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / ".pbkd-download.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _cifar_class(settings)(root, download=True)
    except (RuntimeError, OSError, tarfile.TarError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"data.root={root}: the download of {settings.name} failed: {reason}\n"
            "cure: try again, or data.root=DIR with the folder that holds it"
        ) from error


def missing_cifar(settings: DataSettings) -> UserError:
    """The error for a CIFAR that is not complete under `root`, naming the file and the cure."""
    root = settings.data_root()
    folder, names = CIFAR_FILES[settings.name]
    absent = [name for name in names if not (root / folder / name).is_file()]
    found = f"{root / folder / absent[0]} is missing" if absent else f"a file in {root / folder} is damaged"
    return UserError(
        f"data.root={root}: {found}\n"
        f"expected the unpacked official {settings.name} archive: {folder}/{names[0]}, …\n"
        "cure: data.root=DIR with the folder that holds it, or data.download=true"
    )


def _load_cifar(settings: DataSettings) -> tuple[Arrays, Arrays]:
    try:
        return _open_cifar(settings, train=True), _open_cifar(settings, train=False)
    except (RuntimeError, OSError) as error:  # torchvision compares the files with the official checksums
        if not settings.download:
            raise missing_cifar(settings) from error
    fetch_cifar(settings)
    return _open_cifar(settings, train=True), _open_cifar(settings, train=False)


def _open_cifar(settings: DataSettings, train: bool) -> Arrays:
    loaded = _cifar_class(settings)(settings.data_root(), train=train)
    images = np.ascontiguousarray(loaded.data.transpose(0, 3, 1, 2))
    return Arrays(images, np.asarray(loaded.targets, np.int64))


def _load_folder(settings: DataSettings) -> tuple[Files, Files]:
    root = settings.data_root()
    listing = list_images(root)
    found = len(listing["train"])
    if settings.num_classes not in (None, found):
        raise UserError(
            f"data.num_classes={settings.num_classes}, but {root / 'train'} has {found} class folders\n"
            f"cure: data.num_classes={found}, or leave it out"
        )
    parts = []
    for classes in listing.values():
        labels = np.repeat(np.arange(found, dtype=np.int64), [len(paths) for paths in classes])
        parts.append(Files([path for paths in classes for path in paths], labels))
    return parts[0], parts[1]


def _fixed_order(count: int) -> NDArray[np.int64]:
    return shuffled(np.arange(count, dtype=np.int64), _SPLIT_SEED, 0)


def _cifar_class(settings: DataSettings) -> Any:
    datasets = import_torchvision().datasets
    return datasets.CIFAR10 if settings.name == "cifar10" else datasets.CIFAR100
