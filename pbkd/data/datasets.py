"""The data sets: what their samples are, and which of them make up the train, val and test splits."""

import fcntl
import gzip
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pbkd.data.draws import shuffled
from pbkd.data.folder import Listing, Part, PartName, list_files
from pbkd.data.settings import DataSettings
from pbkd.errors import AbsentDataError, UserError
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

_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel
can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion
lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter
palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road
rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower
sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
CLASSES = {
    "digits": tuple("0123456789"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    "cifar100": tuple(_CIFAR100.split()),
}
"""Names of the classes, in the order of the labels, as the official files have them."""


@dataclass(frozen=True)
class Arrays:
    """A data set in memory: images (N, C, H, W) uint8, labels (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Files:
    """A data set of image files: paths below `root`, labels (N,)."""

    root: Path
    names: list[str]
    labels: NDArray[np.int64]

    def path(self, index: int) -> Path:
        """Of sample `index`."""
        return self.root / self.names[index]


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


def load_splits(settings: DataSettings, listing: Listing | None = None) -> dict[str, Split[Arrays | Files]]:
    """The splits `train`, `val` and `test`; of a folder, what `listing` has, else what is there now.

    Raises UserError with the cure when the data are missing or damaged.
    """
    if settings.name == "digits":
        digits = load_digits()
        order = _fixed_order(len(digits.labels))
        bounds = [_DIGITS_TRAIN, _DIGITS_TRAIN + _DIGITS_VAL]
        parts = dict(zip(("train", "val", "test"), np.split(order, bounds), strict=True))
        splits: dict[str, Split[Arrays | Files]] = {}
        splits |= {name: Split(digits, indices) for name, indices in parts.items()}
        return _limited(settings, splits)
    if settings.name == "folder":
        listing = listing or list_folder(settings)
        root = settings.data_root()
        return divided(settings, {name: files(root, part) for name, part in listing.parts.items()})
    train, test = _load_cifar(settings)
    return divided(settings, {"train": train, "test": test})


def divided(settings: DataSettings, parts: Mapping[PartName, SourceT]) -> dict[str, Split[SourceT]]:
    """The splits `train`, `val` and `test` of a data set that comes in two parts, or in these."""
    splits = {name: Split(source, _fixed_order(len(source.labels))) for name, source in parts.items()}
    if "val" not in parts:
        train, order = parts["train"], splits["train"].indices
        kept = len(order) - round(len(order) * settings.val_fraction)
        splits |= {"train": Split(train, order[:kept]), "val": Split(train, order[kept:])}
    return _limited(settings, {name: splits[name] for name in ("train", "val", "test")})


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
        raise AbsentDataError(
            f"data.root={root}: the download of {settings.name} failed: {reason}\n"
            "cure: try again, or data.root=DIR with the folder that holds it"
        ) from error


def missing_cifar(settings: DataSettings) -> AbsentDataError:
    """The error for a CIFAR that is not complete under `root`, naming the file and the cure."""
    root = settings.data_root()
    folder, names = CIFAR_FILES[settings.name]
    absent = [name for name in names if not (root / folder / name).is_file()]
    found = f"{root / folder / absent[0]} is missing" if absent else f"a file in {root / folder} is damaged"
    return AbsentDataError(
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


def list_folder(settings: DataSettings) -> Listing:
    """The files of a folder. Raises UserError; see `list_files`."""
    listing = list_files(settings.data_root(), settings.places())
    require_classes(settings, len(listing.classes))
    return listing


def require_classes(settings: DataSettings, found: int) -> None:
    """Raise UserError if the settings name another number of classes than the data have."""
    if settings.num_classes not in (None, found):
        place = settings.data_root() / settings.splits.train
        raise UserError(
            f"data.num_classes={settings.num_classes}, but {place} has {found} classes\n"
            f"cure: data.num_classes={found}, or leave it out"
        )


def files(root: Path, part: Part) -> Files:
    """A listed part as a source of samples."""
    return Files(root, part.paths, np.array(part.labels, np.int64))


def _fixed_order(count: int) -> NDArray[np.int64]:
    return shuffled(np.arange(count, dtype=np.int64), _SPLIT_SEED, 0)


def _cifar_class(settings: DataSettings) -> Any:
    datasets = import_torchvision().datasets
    return datasets.CIFAR10 if settings.name == "cifar10" else datasets.CIFAR100
