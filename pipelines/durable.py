"""The file operations the store is built on: exclusive create and atomic replace, both safe against a crash.

Only these two, reading and listing are used: they are what an object store with conditional puts offers too.
"""

import os
import re
import uuid
from pathlib import Path

from pbkd.errors import UserError


def hex_name(name: str) -> str:
    """Return `name` if it is a stage key or digest, else raise UserError: no other path can be made of it."""
    if not re.fullmatch(r"[0-9a-f]{6,128}", name):
        raise UserError(f"{name!r} is not a stage key or digest: expected at least 6 hexadecimal digits")
    return name


def create(path: Path, data: bytes) -> bool:
    """Create `path` with `data`, whole or not at all; False if it exists already, whoever made it."""
    temporary = _write_temporary(path, data, sync=True)
    try:
        os.link(temporary, path)
    except FileExistsError:
        # On NFS the reply to a successful link can be lost, and the retry reports "exists": two names prove
        # it ours.
        if temporary.stat().st_nlink != 2:
            return False
    finally:
        temporary.unlink()
    sync_folder(path.parent)
    return True


def replace(path: Path, data: bytes, sync: bool = True) -> None:
    """Give `path` the content `data` at once. Without `sync`, a power cut may leave it empty."""
    temporary = _write_temporary(path, data, sync)
    try:
        temporary.replace(path)
    except OSError:
        temporary.unlink()
        raise
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Make every file below `folder`, and `folder` itself, survive a power cut."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def _write_temporary(path: Path, data: bytes, sync: bool) -> Path:
    # The name starts with a dot: no listing takes it for content. `open` makes the mode follow the user's
    # umask.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
