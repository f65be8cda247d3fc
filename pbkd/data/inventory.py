"""What is known of files: a folder's listing and every file's sha256, hashed once and remembered."""

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pbkd.data.folder import Listing, PartName, State, list_files, state_of, unfit

_Hashes = dict[str, tuple[State, str]]
"""By a file's path: its state, and its sha256 (hex) then."""

_FILES = "data-digests.json"


@dataclass(frozen=True)
class Inventory:
    """A folder's listing, and the sha256 (hex) of every file by its path from the root."""

    listing: Listing
    hashes: dict[str, str]

    def digest(self, without: Collection[str] = ()) -> str:
        """sha256 (hex) of classes, order, labels, names and content, without the files `without`."""
        whole = hashlib.sha256("".join(f"{name}\0" for name in self.listing.classes).encode())
        for name, part in self.listing.parts.items():
            lines = [
                f"{name}\0{label}\0{path}\0{self.hashes[path]}\n"
                for path, label in zip(part.paths, part.labels, strict=True)
                if path not in without
            ]
            whole.update("".join(lines).encode("utf-8", "surrogateescape"))
        return whole.hexdigest()


_INVENTORY = TypeAdapter(Inventory)
_KNOWN = TypeAdapter(_Hashes)


def take_inventory(root: Path, splits: Mapping[PartName, str], cache: Path) -> Inventory:
    """List a folder and hash its files, but for those that the folder `cache` remembers.

    Raises UserError; see `list_files`.
    """
    listing = list_files(root, splits)
    place = _place(root, splits, cache)
    before = _remembered(place)
    if before is not None and before.listing == listing:
        return Inventory(listing, before.hashes)
    known = (
        {}
        if before is None
        else {path: (state, before.hashes[path]) for path, state in _states(before.listing).items()}
    )
    inventory = Inventory(listing, _hashed(root, _states(listing), known))
    parts = {name: vars(part) for name, part in listing.parts.items()}
    _write(place, {"listing": vars(listing) | {"parts": parts}, "hashes": inventory.hashes})
    return inventory


def recall_listing(root: Path, splits: Mapping[PartName, str], digest: str, cache: Path) -> Listing | None:
    """What was listed when the data had `digest`; no file is looked at. None if that is not remembered."""
    found = _remembered(_place(root, splits, cache))
    return found.listing if found is not None and found.digest() == digest else None


def file_hashes(paths: Sequence[Path], cache: Path) -> list[str]:
    """sha256 (hex) of each file, which is hashed once, and remembered in the folder `cache`."""
    place = cache / _FILES
    known = _read(place, _KNOWN) or {}
    states = {str(path.resolve()): state_of(path) for path in paths}
    hashes = _hashed(Path("/"), states, known)
    found = {name: (state, hashes[name]) for name, state in states.items()}
    if not found.items() <= known.items():
        _write(place, known | found)
    return [hashes[str(path.resolve())] for path in paths]


def _remembered(place: Path) -> Inventory | None:
    found: Inventory | None = _read(place, _INVENTORY)
    if found is None:
        return None
    listed = (path for part in found.listing.parts.values() for path in part.paths)
    return found if all(path in found.hashes for path in listed) else None


def _states(listing: Listing) -> dict[str, State]:
    return {
        path: state
        for part in listing.parts.values()
        for path, state in zip(part.paths, part.states, strict=True)
    }


def _hashed(root: Path, states: Mapping[str, State], known: _Hashes) -> dict[str, str]:
    """The sha256 of every file; those that are known in the same state are not read."""
    hashes = {
        path: known[path][1] for path, state in states.items() if path in known and known[path][0] == state
    }
    changed = [path for path in states if path not in hashes]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "pbkd-hash") as threads:
        # Reading and hashing release the interpreter's lock.
        found = threads.map(_sha256, [root / path for path in changed])
        return hashes | dict(zip(changed, found, strict=True))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unfit(path, error) from None


def _place(root: Path, splits: Mapping[PartName, str], cache: Path) -> Path:
    name = hashlib.sha256(json.dumps([os.fspath(root), dict(splits)]).encode()).hexdigest()
    return cache / f"files-{name[:16]}.json"


def _read(place: Path, kind: TypeAdapter[Any]) -> Any:
    """What was written there; None if nothing is, or it is damaged: it is only remembered."""
    try:
        content = place.read_bytes()
        try:
            return kind.validate_json(content)  # in half the time, but not names that are no UTF-8
        except ValueError:
            return kind.validate_python(json.loads(content))
    except (OSError, ValueError):
        return None


def _write(place: Path, content: Any) -> None:
    with suppress(OSError):  # where it cannot be kept, it is found out again
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=place.parent, prefix=place.name)
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(content, file)
            Path(temporary).replace(place)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
