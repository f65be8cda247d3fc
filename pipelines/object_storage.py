"""A storage in a bucket of an object store that has conditional puts: `s3://BUCKET/PREFIX`, `gs://`, `az://`."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from pbkd.errors import UserError, first_line
from pbkd.storage import Stat, Unreachable, user_cache

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutResult, UpdateVersion
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

MARKER = ".store"
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
KNOCK_SECONDS = 10
PATIENT_SECONDS = 180


class ObjectStorage:
    """Objects below a prefix. What the client retries for minutes and still fails raises `Unreachable`.

    Every object is put whole. `create` is a put on the condition that there is none; `append`, one that the
    object is what it was when it was read. Endpoint and credentials come from the environment.
    """

    poll_seconds = 1.0
    cure = "choose a bucket you may write to, of a server that has conditional puts: docs/stores.md"

    def __init__(self, url: str, prefix: str = "") -> None:
        """Connect to the store at `url`; `prefix`, which ends with a slash, is the part meant of it.

        Raises:
            UserError: nothing answers at the address, or not to us.
        """
        self._url, self._prefix = url.rstrip("/"), prefix
        self._client = _connect(self._url)
        self._appended: dict[str, tuple[UpdateVersion | None, bytes]] = {}  # what there was at the last one

    def __reduce__(self) -> tuple[type[ObjectStorage], tuple[str, str]]:
        """Connect again in another process."""
        return ObjectStorage, (self._url, self._prefix)

    @property
    def here(self) -> Path:
        """A folder among the caches of this machine's user."""
        return _cache(self._url) / self._prefix

    def location(self, name: str = "") -> str:
        return f"{self._url}/{self._prefix}{name}".rstrip("/")

    def prepare(self, name: str) -> None:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        marker = f"{name}/{MARKER}"
        self.create(marker, uuid.uuid4().bytes)
        if self.create(marker, uuid.uuid4().bytes):
            raise OSError("it overwrites what is there, though told not to (If-None-Match: *)")
        with self._told(marker):
            stale, _ = self._get(marker)
            obstore.put(self._client, self._path(marker), uuid.uuid4().bytes)
            try:
                obstore.put(self._client, self._path(marker), uuid.uuid4().bytes, mode=stale)
            except (AlreadyExistsError, PreconditionError):
                return
        raise OSError("it overwrites what has changed since, though told not to (If-Match)")

    def below(self, name: str) -> ObjectStorage:
        return ObjectStorage(self._url, f"{self._prefix}{name}/")

    def read(self, name: str, start: int = 0) -> bytes:
        import obstore

        with self._told(name):
            # A range that begins at the end is an error, and every server tells it in its own way.
            if start and obstore.head(self._client, self._path(name))["size"] <= start:
                return b""
            return self._get(name)[1][start:]

    def create(self, name: str, content: bytes) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        with self._told(name):
            try:
                obstore.put(self._client, self._path(name), content, mode="create")
            except AlreadyExistsError:
                # The reply to a put can be lost, and the retry finds what it has made itself.
                return self._get(name)[1] == content
        return True

    def replace(self, name: str, content: bytes, sync: bool = True) -> None:
        import obstore

        with self._told(name):
            obstore.put(self._client, self._path(name), content)

    def append(self, name: str, line: bytes, sync: bool = True) -> None:
        """Put the whole of it anew, unless another process has done so since it was read: then once more."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._told(name):
            version, content = self._appended.get(name) or self._get_if_there(name)
            while True:
                try:
                    put = obstore.put(
                        self._client, self._path(name), content + line, mode=version or "create"
                    )
                    self._appended[name] = (_version(put), content + line)
                    return
                except (AlreadyExistsError, PreconditionError, FileNotFoundError):
                    before, (version, content) = content, self._get_if_there(name)
                    if content.startswith(before + line):  # it was done, and only the reply was lost
                        self._appended[name] = (version, content)
                        return

    def add(self, folder: Path, name: str) -> None:
        import obstore

        with self._told(name):
            for path in sorted(folder.iterdir()):
                obstore.put(self._client, self._path(f"{name}/{path.name}"), path)
        self._keep(folder, name)

    def local(self, name: str, fresh: bool = False) -> Path:
        """A copy of it, made when it is first asked for."""
        place = self.here / name
        if place.is_dir() and not fresh:
            return place
        with self.original(name) as folder:
            if place.is_dir():
                # File by file: whoever reads the old copy finds each file at any moment. What the bucket has
                # no more stays, for it may be the last there is.
                for file in folder.iterdir():
                    file.replace(place / file.name)
            elif any(folder.iterdir()):
                self._keep(folder, name)
        return place

    @contextmanager
    def original(self, name: str) -> Iterator[Path]:
        import obstore

        folder = _cache(self._url) / "scratch" / uuid.uuid4().hex
        folder.mkdir(parents=True)
        try:
            with self._told(name):
                for path in self._below(name):
                    with (folder / path.rpartition("/")[2]).open("wb") as file:
                        for chunk in obstore.get(self._client, path):
                            file.write(chunk)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def names(self, name: str = "") -> list[str]:
        import obstore

        prefix = self._path(f"{name}/" if name else "")
        with self._told(name):
            found = obstore.list_with_delimiter(self._client, prefix or None)
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        names = {path.rstrip("/").rpartition("/")[2] for path in paths}
        return sorted(each for each in names if not each.startswith("."))

    def stat(self, name: str) -> Stat:
        import obstore

        with self._told(name):
            try:
                found: Sequence[ObjectMeta] = [obstore.head(self._client, self._path(name))]
            except FileNotFoundError:
                found = obstore.list(self._client, f"{self._path(name)}/").collect()
                if not found:
                    raise
        return Stat(
            sum(entry["size"] for entry in found),
            max(entry["last_modified"].timestamp() for entry in found),
        )

    def remove(self, name: str) -> None:
        import obstore

        self._appended.pop(name, None)
        with self._told(name):
            for path in [self._path(name), *self._below(name)]:
                try:
                    obstore.delete(self._client, path)
                except FileNotFoundError:
                    continue  # some servers mind, S3 does not
        shutil.rmtree(self.here / name, ignore_errors=True)

    def leftovers(self) -> list[str]:
        return []  # what is put is there as a whole; of uploads broken off, buckets have rules of their own

    def _path(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def _below(self, name: str) -> list[str]:
        import obstore

        found = obstore.list(self._client, f"{self._path(name)}/").collect()
        return [entry["path"] for entry in found]

    def _get(self, name: str) -> tuple[UpdateVersion, bytes]:
        import obstore

        found = obstore.get(self._client, self._path(name))
        return _version(found.meta), bytes(found.bytes())

    def _get_if_there(self, name: str) -> tuple[UpdateVersion | None, bytes]:
        try:
            return self._get(name)
        except FileNotFoundError:
            return None, b""

    def _keep(self, folder: Path, name: str) -> None:
        """Make a finished folder the copy on this machine, unless there is one."""
        place = self.here / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(place)
        except OSError:
            if not place.is_dir():
                raise
            shutil.rmtree(folder)

    @contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Raise what the client raises as what the file system would."""
        from obstore.exceptions import BaseError

        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.location(name)) from error
        except BaseError as error:
            raise Unreachable(
                f"{self.location(name)}: {first_line(error)}\n"
                "what was written before is intact; type the same command again when it answers"
            ) from error


def _version(known: ObjectMeta | PutResult) -> UpdateVersion:
    """What names this content in a condition: some stores take the tag, others the version."""
    version: UpdateVersion = {}
    if known["e_tag"] is not None:
        version["e_tag"] = known["e_tag"]
    if known["version"] is not None:
        version["version"] = known["version"]
    return version


@cache
def _connect(url: str) -> ObjectStore:
    """The client of this process. Raises UserError if nothing answers it."""
    try:
        import obstore
        from obstore.exceptions import BaseError
    except ImportError as error:
        raise UserError(f"store {url}: object stores need obstore: pip install 'pbkd[s3]'") from error
    try:
        obstore.list_with_delimiter(_client(url, patient=False))
        return _client(url, patient=True)
    except (BaseError, ValueError, FileNotFoundError) as error:
        raise UserError(
            f"store {url}: cannot be used: {first_line(error)}\n"
            "expected s3://BUCKET/PREFIX of a bucket that is there for you; the environment has the rest:\n"
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL; more: docs/stores.md"
        ) from error


def _client(url: str, *, patient: bool) -> ObjectStore:
    """`patient`: it tries for minutes, as a run that has begun had better do."""
    from obstore.store import from_url

    options: ClientConfig = {"connect_timeout": "5s"}
    # An endpoint without TLS is taken for meant: somebody has written it down.
    if any(os.environ.get(name, "").startswith("http://") for name in ENDPOINTS):
        options["allow_http"] = True
    # Of the two limits the time is meant: refused connections use up ten retries within seconds.
    retries, seconds = (10_000, PATIENT_SECONDS) if patient else (2, KNOCK_SECONDS)
    retry: RetryConfig = {"max_retries": retries, "retry_timeout": timedelta(seconds=seconds)}
    return from_url(url, client_options=options, retry_config=retry)


def _cache(url: str) -> Path:
    readable = re.sub(r"[^A-Za-z0-9]+", "-", url)
    return user_cache() / f"{readable}-{sha256(url.encode()).hexdigest()[:8]}"
