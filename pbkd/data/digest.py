"""The identity of a data set: one sha256 that changes when the data change, cheap to ask for again."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from pbkd.data.datasets import CIFAR_FILES, CLASSES, fetch_cifar, load_digits, missing_cifar, require_classes
from pbkd.data.inventory import file_hashes, take_inventory
from pbkd.data.settings import DataSettings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identity:
    """Of a data set.

    digest: sha256 (hex). classes: their names, in the order of the labels. source: `DataSettings.source` of
    what was looked at.
    """

    digest: str
    classes: tuple[str, ...]
    source: str


def data_identity(settings: DataSettings, cache: Path) -> Identity:
    """What the data are that `settings` name, by their content.

    Of CIFAR, its official files' bytes; of digits, the arrays; of a folder, classes, order, names and content
    of all images. Each file is hashed once and remembered in the folder `cache` by its path, inode, size and
    time of change; then a folder is only listed. What is left out there is told as a warning.

    With `download` a missing CIFAR is fetched first. Raises UserError with the cure when data are missing.
    """
    if settings.name == "folder":
        inventory = take_inventory(settings.data_root(), settings.places(), cache)
        require_classes(settings, len(inventory.listing.classes))
        if told := inventory.listing.told():
            log.warning("%s: %s", settings.data_root(), told)
        return Identity(inventory.digest(), inventory.listing.classes, settings.source())
    if settings.name == "digits":
        digits = load_digits()
        content = digits.images.tobytes() + digits.labels.astype("<i8").tobytes()
        return Identity(hashlib.sha256(content).hexdigest(), CLASSES["digits"], settings.source())
    folder, names = CIFAR_FILES[settings.name]
    paths = [settings.data_root() / folder / name for name in names]
    if not all(path.is_file() for path in paths):
        if not settings.download:
            raise missing_cifar(settings)
        fetch_cifar(settings)
    hashes = file_hashes(paths, cache)
    lines = [f"{path.name}\0{digest}\n" for path, digest in zip(paths, hashes, strict=True)]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    return Identity(digest, CLASSES[settings.name], settings.source())


def data_digest(settings: DataSettings, cache: Path) -> str:
    """The sha256 of `data_identity`."""
    return data_identity(settings, cache).digest
