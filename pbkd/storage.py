"""Where what outlives a process is kept: byte strings under names, each there as a whole or not at all.

`Folder` keeps them in a folder. Only what an object store with conditional puts can do as well is asked for:
no renaming, no locking, no appending but by whole lines.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from contextlib import AbstractContextManager, nullcontext
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading. Raises OSError, for what is none as well: a pipe or a device may never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"is {kind_of(mode)}, not a file", str(path))
    return os.fdopen(descriptor, "rb")


def kind_of(mode: int) -> str:
    """What is no file, by its `st_mode`."""
    kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def user_cache() -> Path:
    """This user's folder for caches; machines may share it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "pbkd"


class Stat(NamedTuple):
    """Bytes, and the time of the last change in seconds since 1970 by the clock of what keeps them."""

    size: int
    modified: float


def stays_below(name: object) -> bool:
    """Whether it is a name of something below, as a storage's names are: relative, and with no `..` in it."""
    if not isinstance(name, str) or "\0" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


class Unreachable(OSError):  # noqa: N818 - what it is, not that it is wrong
    """What keeps it does not answer, or refuses. Says in two lines what and where, and what to do."""


class Storage(Protocol):
    """Names are relative, their parts joined by `/`. What is not there raises FileNotFoundError.

    Attributes:
        here: a folder on this machine, for what may be lost with it: copies, caches, logs.
        poll_seconds: how often to look for what others have changed.
        cure: what to tell a user whose place cannot be used.
    """

    poll_seconds: float
    cure: str

    @property
    def here(self) -> Path: ...

    def location(self, name: str = "") -> str:
        """What a person would type to name it."""

    def prepare(self, name: str) -> None:
        """See that `name` is among its names. Raises OSError if it cannot do what is asked of a storage."""

    def below(self, name: str) -> Storage:
        """What is kept below `name`, as a storage of its own. Picklable, as every storage is."""

    def read(self, name: str, start: int = 0) -> bytes:
        """The content from byte `start` on; empty if it is no longer than that."""

    def create(self, name: str, content: bytes) -> bool:
        """Keep `content` if there is nothing of that name; False if there is, whoever made it."""

    def replace(self, name: str, content: bytes, sync: bool = True) -> None:
        """Keep `content` in place of what is there. Without `sync`, a power cut may leave it empty."""

    def append(self, name: str, line: bytes, sync: bool = True) -> None:
        """Add a line, which ends with a newline; of several processes that do, none loses one."""

    def add(self, folder: Path, name: str) -> None:
        """Move the files of a folder below `here` to `name`, unless equal ones are there; it is gone then."""

    def local(self, name: str, fresh: bool = False) -> Path:
        """The folder `name` on this machine, whether it is there or not; `fresh` trusts no earlier copy."""

    def original(self, name: str) -> AbstractContextManager[Path]:
        """The folder `name` as it is kept, to read in a `with` block; copies made before are left alone."""

    def names(self, name: str = "") -> list[str]:
        """What lies directly below `name`, in order; nothing if there is none."""

    def stat(self, name: str) -> Stat:
        """Of one content, or of all below the name."""

    def remove(self, name: str) -> None:
        """Remove the content, or all below the name; nothing to remove is fine."""

    def leftovers(self) -> list[str]:
        """What a crash left directly here, half written or half removed; `names` does not have it."""


class Folder:
    """A storage in a folder of a file system that has hard links. What is missing is made when written to."""

    poll_seconds = 0.2
    cure = "choose a folder you may write to, on a file system that has hard links: --store DIR"

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def here(self) -> Path:
        """The folder itself."""
        return self.path

    def location(self, name: str = "") -> str:
        return str(self.path / name)

    def prepare(self, name: str) -> None:
        # Permissions may allow what the file system refuses: writing, and hard links.
        probe = f"{name}/.probe-{uuid.uuid4().hex}"
        self.create(probe, b"")
        (self.path / probe).unlink()

    def below(self, name: str) -> Folder:
        return Folder(self.path / name)

    def read(self, name: str, start: int = 0) -> bytes:
        with (self.path / name).open("rb") as file:
            file.seek(start)
            return file.read()

    def create(self, name: str, content: bytes) -> bool:
        path = self.path / name
        temporary = _write_temporary(path, content, sync=True)
        try:
            os.link(temporary, path)
        except FileExistsError:
            # On NFS the reply to a successful link can be lost, and the retry reports "exists": two names
            # prove it ours.
            if temporary.stat().st_nlink != 2:
                return False
        finally:
            temporary.unlink()
        _sync(path.parent)
        return True

    def replace(self, name: str, content: bytes, sync: bool = True) -> None:
        path = self.path / name
        temporary = _write_temporary(path, content, sync)
        try:
            temporary.replace(path)
        except OSError:
            temporary.unlink()
            raise
        if sync:
            _sync(path.parent)

    def append(self, name: str, line: bytes, sync: bool = True) -> None:
        """Add it by one write; a line that a crash has torn is ended first."""
        path = self.path / name
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, flags, 0o666)
        try:
            if _is_torn(descriptor):
                line = b"\n" + line  # else it would be lost in the torn one
            if os.write(descriptor, line) != len(line):
                raise OSError(f"{path}: the disk took only a part of a line; is it full?")
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def add(self, folder: Path, name: str) -> None:
        place = self.path / name
        if not place.exists():
            for path in folder.rglob("*"):
                _sync(path)
            _sync(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.rename(place)
            except OSError:
                if not place.exists():
                    raise
            _sync(place.parent)
        else:
            os.utime(place)  # it is young again
        shutil.rmtree(folder, ignore_errors=True)  # equal content was first

    def local(self, name: str, fresh: bool = False) -> Path:
        return self.path / name

    def original(self, name: str) -> AbstractContextManager[Path]:
        return nullcontext(self.path / name)

    def names(self, name: str = "") -> list[str]:
        try:
            found = [path.name for path in (self.path / name).iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(each for each in found if not each.startswith("."))

    def stat(self, name: str) -> Stat:
        path = self.path / name
        modified = path.stat().st_mtime
        files = path.rglob("*") if path.is_dir() else [path]
        return Stat(sum(file.stat().st_size for file in files if file.is_file()), modified)

    def remove(self, name: str) -> None:
        """Take it away at once, then delete it: nobody reads what is half removed."""
        path = self.path / name
        doomed = path.with_name(f".{path.name}.{uuid.uuid4().hex}") if not path.name.startswith(".") else path
        try:
            path.rename(doomed)
        except FileNotFoundError:
            return
        if doomed.is_dir():
            shutil.rmtree(doomed)
        else:
            doomed.unlink()

    def leftovers(self) -> list[str]:
        return sorted(path.name for path in self.path.glob(".*"))


def _write_temporary(path: Path, content: bytes, sync: bool) -> Path:
    # The name starts with a dot: no listing takes it for content. `open` lets the mode follow the umask.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        try:
            file = temporary.open("xb")
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = temporary.open("xb")
        with file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_torn(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
