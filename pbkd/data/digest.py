"""The identity of a data set: one sha256 that changes when the data change, cheap to ask for again."""

import hashlib
import json
import os
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from pydantic import TypeAdapter

from pbkd.data.datasets import CIFAR_FILES, fetch_cifar, load_digits, missing_cifar
from pbkd.data.folder import list_images
from pbkd.data.settings import DataSettings

_CACHE = "data-digests.json"
_KNOWN = TypeAdapter(dict[str, str])  # "path|size|mtime" -> sha256


def data_digest(settings: DataSettings, cache: Path) -> str:
    """sha256 (hex) of the data that `settings` name.

    CIFAR: of its official files' bytes; each file is hashed once and remembered in the folder `cache` by its
    path, size and time of change. Digits: of the arrays. A folder: of its sorted list of (relative path,
    size), read anew each time; images' content is not hashed: a change that keeps the size goes unnoticed.

    With `download` a missing CIFAR is fetched first. Raises UserError with the cure when data are missing.
    """
    if settings.name == "digits":
        digits = load_digits()
        return hashlib.sha256(digits.images.tobytes() + digits.labels.astype("<i8").tobytes()).hexdigest()
    if settings.name == "folder":
        return folder_digest(settings.data_root())
    folder, names = CIFAR_FILES[settings.name]
    paths = [settings.data_root() / folder / name for name in names]
    if not all(path.is_file() for path in paths):
        if not settings.download:
            raise missing_cifar(settings)
        fetch_cifar(settings)
    hashes = file_hashes(paths, cache)
    lines = [f"{path.name}\0{digest}\n" for path, digest in zip(paths, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def folder_digest(root: Path, without: Collection[str] = ()) -> str:
    """`data_digest` of the folder `root`, as if the files `without` (relative to `root`) were not in it."""
    paths = [path for classes in list_images(root).values() for images in classes for path in images]
    sizes = {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}
    lines = sorted(f"{name}\0{size}\n" for name, size in sizes.items() if name not in without)
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def file_hashes(paths: list[Path], cache: Path) -> list[str]:
    """sha256 (hex) of each file; each is hashed once, and remembered in the folder `cache` by its path, size
    and time of change."""
    cache /= _CACHE
    try:
        known = _KNOWN.validate_json(cache.read_bytes())
    except (OSError, ValueError):  # no cache yet, or a damaged one: it is only a cache
        known = {}
    before = dict(known)
    hashes = []
    for path in (path.resolve() for path in paths):
        status = path.stat()
        key = f"{path}|{status.st_size}|{status.st_mtime_ns}"
        if key not in known:
            with path.open("rb") as file:
                known[key] = hashlib.file_digest(file, "sha256").hexdigest()
        hashes.append(known[key])
    if known != before:
        with suppress(OSError):  # where it cannot be kept, they are hashed again
            _write_atomically(cache, json.dumps(known, indent=1, sort_keys=True))
    return hashes


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
