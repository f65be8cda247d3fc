"""Image files of a data set, in class folders or listed in CSV files: listing, checks and decoding."""

import csv
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import Image

from pbkd.errors import AbsentDataError, UserError
from pbkd.preprocessing import decode, formats
from pbkd.storage import kind_of

PartName = Literal["train", "val", "test"]
State = tuple[int, int, int, int]
"""Of a file: inode, bytes, time of the last change of its content and of its metadata (ns)."""

_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp", ".dib", ".ppm", ".pgm", ".pbm"),
    *(".pnm", ".tif", ".tiff", ".webp", ".jp2", ".j2k", ".jpx", ".avif"),
)
_Entry = os.DirEntry[str]
_LAYOUT = "expected ROOT/train/CLASS/*.JPEG and ROOT/val/CLASS/*.JPEG, or data.splits with their names"


class BrokenImageError(UserError):
    """An image file that cannot be read; names it."""


@dataclass(frozen=True)
class Part:
    """The files of one part, in its fixed order: `paths` relative to the root, their labels and states."""

    paths: list[str]
    labels: list[int]
    states: list[State]


@dataclass(frozen=True)
class Listing:
    """All files of a data set.

    Attributes:
        classes: their names, in the order of the labels.
        parts: `train`, `test`, and `val` where that is a part of its own.
        left_out: files that are no images, relative to the root.
    """

    classes: tuple[str, ...]
    parts: dict[PartName, Part]
    left_out: tuple[str, ...] = ()

    def told(self) -> str | None:
        """One line about what is left out; None if nothing is."""
        if not self.left_out:
            return None
        names = ", ".join(self.left_out[:3]) + (", …" if len(self.left_out) > 3 else "")
        return f"{len(self.left_out)} files are no images and are left out: {names}"


def _list_classes(folder: Path) -> tuple[list[str], list[_Entry]]:
    """Names of the class folders of a part, sorted, and what lies beside. UserError if there are none."""
    entries = [entry for entry in _entries(folder) if entry.name[0] != "."]
    names = [entry.name for entry in entries if _is_folder(entry)]
    if not names:
        raise UserError(
            f"data.root: no class folders in {folder}\n{_LAYOUT}\ncure: move each image to its class's folder"
        )
    return sorted(names), [entry for entry in entries if not _is_folder(entry)]


def list_names(root: Path, place: str) -> tuple[str, ...]:
    """Names of the classes of a part, in the order of their labels; see `list_files`."""
    if place.lower().endswith(".csv"):
        return _names(root / place, _read_rows(root / place))
    return tuple(_list_classes(root / place)[0])


def list_files(root: Path, splits: Mapping[PartName, str]) -> Listing:
    """The image files of every part that `splits` name below `root`: a folder of class folders or a CSV file.

    Class folders are walked with all that is below them, and a class's files are in the order of their paths.
    A file is an image by its suffix or, with any other, if it begins like one. A CSV file has the columns
    `path` (from `root`) and `label`: numbers from 0, or names, which are numbered in their order.

    Raises UserError when a part is missing, two have other classes, a class has no image, or a file is a
    dangling link, a pipe or a device.
    """
    are_lists = {name: place.lower().endswith(".csv") for name, place in splits.items()}
    if all(are_lists.values()):
        return _list_rows(root, splits)
    if any(are_lists.values()):
        raise UserError(
            f"data.splits: names folders and CSV files: {', '.join(splits.values())}\n"
            "expected one kind for all parts"
        )
    listed = {name: _list_classes(root / place) for name, place in splits.items()}
    classes = {name: names for name, (names, _) in listed.items()}
    for part, other in ((part, other) for part in splits for other in splits if part != other):
        if missing := sorted(set(classes[part]) - set(classes[other])):
            raise UserError(
                f"data.root: {root / splits[other]} lacks {len(missing)} classes of {root / splits[part]}: "
                f"{missing[0]}, …\n{_LAYOUT}\ncure: the same class folders in both"
            )
    left_out: list[str] = []
    for name, place in splits.items():
        for entry in listed[name][1]:
            state_of(entry)  # raises for what is not a file
            left_out.append(f"{place}/{entry.name}")
    parts = {name: _list_part(root, place, classes["train"], left_out) for name, place in splits.items()}
    return Listing(tuple(classes["train"]), parts, tuple(sorted(left_out)))


def _list_part(root: Path, place: str, classes: list[str], left_out: list[str]) -> Part:
    part = Part([], [], [])
    for label, name in enumerate(classes):
        found = list[tuple[str, State]]()
        for entry, state in _walk(root / place / name, ()):
            relative = entry.path[len(f"{root}/") :]
            if _is_image(entry):
                found.append((relative, state))
            else:
                left_out.append(relative)
        if not found:
            raise UserError(
                f"data.root: class folder {root / place / name} holds no image\n"
                f"expected files named *{', *'.join(_SUFFIXES)}\n"
                "cure: add images, or remove the folder from all parts"
            )
        found.sort()
        part.paths.extend(path for path, _ in found)
        part.states.extend(state for _, state in found)
        part.labels.extend([label] * len(found))
    return part


def _walk(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[_Entry, State]]:
    """Every file below `folder` but hidden ones; links are followed, but not into a folder they are in."""
    status = folder.stat()
    if (own := (status.st_dev, status.st_ino)) in above:
        return
    for entry in _entries(folder):
        if entry.name[0] == ".":
            continue
        if _is_folder(entry):
            yield from _walk(Path(entry.path), (*above, own))
        else:
            yield entry, state_of(entry)


def _entries(folder: Path) -> list[_Entry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        found = f"data.root: cannot list {folder}: {error.strerror}\n"
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise AbsentDataError(f"{found}{_LAYOUT}\ncure: data.root=ROOT") from None
        raise UserError(f"{found}cure: make it readable, or remove it") from None


def _is_folder(entry: _Entry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a circle of links; `state_of` tells
        return False


def state_of(path: Path | _Entry) -> State:
    """The state of a file. Raises UserError for what is none: reading it could wait for ever."""
    try:
        status = path.stat()
    except OSError as error:
        raise unfit(Path(path), error) from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"data.root: {os.fspath(path)} is {kind_of(status.st_mode)}\nexpected a file\ncure: remove it"
        )
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def unfit(path: Path, error: OSError) -> UserError:
    """The error for a file that cannot be looked at or opened; of a link, that its content is missing."""
    if not path.is_symlink():
        return UserError(f"data.root: {path}: {error.strerror}\ncure: make it readable, or remove it")
    return UserError(
        f"data.root: {path} is a link to {path.readlink()}, which cannot be opened: {error.strerror}\n"
        "cure: fetch its content (git annex get, dvc pull, …), or remove the link"
    )


def _is_image(entry: _Entry) -> bool:
    if entry.name.lower().endswith(_SUFFIXES):
        return True
    try:
        with Image.open(entry.path, formats=formats()):
            return True
    except (OSError, ValueError, SyntaxError, EOFError, struct.error):  # what PIL says of other files
        return False


def _list_rows(root: Path, splits: Mapping[PartName, str]) -> Listing:
    rows = {name: _read_rows(root / place) for name, place in splits.items()}
    classes = _names(root / splits["train"], rows["train"])
    number = {name: index for index, name in enumerate(classes)}
    parts: dict[PartName, Part] = {}
    for name, place in splits.items():
        part = parts[name] = Part([], [], [])
        for path, label, line in rows[name]:
            if (known := number.get(str(int(label)) if label.isdecimal() else label)) is None:
                raise UserError(
                    f"{root / place}, line {line}: label {label!r} is not one of {root / splits['train']}\n"
                    "cure: the same classes in both"
                )
            part.paths.append(path)
            part.labels.append(known)
            part.states.append(state_of(root / path))
    return Listing(classes, parts)


def _names(path: Path, rows: list[tuple[str, str, int]]) -> tuple[str, ...]:
    """The classes that the rows of a CSV file name, in the order of their labels."""
    named = {label for _, label, _ in rows}
    if not all(label.isdecimal() for label in named):
        return tuple(sorted(named))
    numbers = sorted({int(label) for label in named})
    if missing := set(range(len(numbers))) - set(numbers):
        raise UserError(
            f"{path}: labels go up to {numbers[-1]}, and none is {min(missing)}\n"
            "expected an image of every class, numbered from 0"
        )
    return tuple(map(str, numbers))


def _read_rows(path: Path) -> list[tuple[str, str, int]]:
    """Path, label and line of every row."""
    state_of(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"path", "label"} <= set(reader.fieldnames or ()):
                raise UserError(
                    f"{path}: its first line names the columns {', '.join(reader.fieldnames or ())}\n"
                    "expected path and label, and perhaps others"
                )
            rows = []
            for row in reader:
                if not row["path"] or not row["label"]:
                    raise UserError(
                        f"{path}, line {reader.line_num}: lacks a path or a label\n"
                        "cure: add it, or remove the line"
                    )
                rows.append((row["path"], row["label"].strip(), reader.line_num))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}\nexpected CSV in UTF-8") from None
    if not rows:
        raise UserError(f"{path}: names no image\nexpected lines with a path and a label")
    return rows


def read_rgb(path: Path, content: bytes | None = None, *, upright: bool = False) -> Image.Image:
    """Decode an image file to mode RGB; transparency is dropped, 16-bit grey keeps its upper byte.

    `content` is the file's, where it has been read already; `upright` turns it as its EXIF tag says. Raises
    BrokenImageError naming the file when it cannot be read, or holds numbers without a fixed range (32-bit
    integers, floats).
    """
    try:
        return decode(path if content is None else BytesIO(content), upright=upright)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more on broken files
        # PIL names a stream by its address.
        reason = str(error).partition("\n")[0].partition(" <_io.")[0]
        raise BrokenImageError(
            f"cannot read image {path}: {type(error).__name__}: {reason}\n"
            "cure: replace the file, or remove it"
        ) from error
