"""The store: manifests, artifacts, latencies, unfinished work. The one source of truth of all runs."""

import json
import logging
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from pbkd.errors import StageError, UserError
from pbkd.storage import Folder, Storage
from pipelines.journal import Journal
from pipelines.lease import Fenced, Lease, hex_name
from pipelines.manifest import Manifest

log = logging.getLogger(__name__)

SHORTEST_PREFIX = 6
RECIPE = "recipe.yaml"

Timed = dict[str, float]
"""`median_ms`, `iqr_ms` and the number of `repeats` of a latency."""


def open_storage(location: str | Path) -> Storage:
    """Return the storage of a folder, or of the address of an object store such as `s3://BUCKET/PREFIX`."""
    if "://" in str(location):
        from pipelines.object_storage import ObjectStorage

        return ObjectStorage(str(location))
    return Folder(Path(location).expanduser().absolute())


class Store:
    """What any number of pipelines, on any number of nodes that see it, may use at the same time.

    Attributes:
        storage: what keeps it: a folder, or an object store.
        root: that folder; of an object store, a folder of this machine for copies, caches and logs.
    """

    FOLDERS = (
        "manifests", "artifacts", "leases", "work", "latency", "pipelines", "searches", "mlflow", "scratch",
    )  # fmt: skip

    def __init__(self, location: str | Path, *, writable: bool = True) -> None:
        """Open the store, made if need be; one that is only read, without `writable`, is taken as it is.

        Raises:
            UserError: it cannot be written; nothing is left behind.
        """
        self.storage = open_storage(location)
        self.root = self.storage.here
        if writable:
            self.require_writable()

    def require_writable(self) -> None:
        """Make what is missing of its folders. Raises UserError, leaving nothing behind, if it fails."""
        made: list[Path] = []
        try:
            for folder in (
                *reversed([self.root, *self.root.parents]),
                *(self.root / name for name in self.FOLDERS),
            ):
                if not folder.is_dir():
                    folder.mkdir(exist_ok=True)
                    made.append(folder)
            self.storage.prepare("manifests")
        except OSError as error:
            for folder in reversed(made):
                _remove_if_empty(folder)
            reason, cure = error.strerror or str(error).partition("\n")[0], self.storage.cure
            raise UserError(f"store {self.location}: cannot be used: {reason}\n{cure}") from error

    @classmethod
    def existing(cls, location: str | Path) -> Self:
        """Open a store that is there already, to read; raises UserError, and makes none, if it is not."""
        if not cls.exists(location):
            raise UserError(f"store {location}: there is none; run a recipe first, or name it by --store DIR")
        return cls(location, writable=False)

    @staticmethod
    def exists(location: str | Path) -> bool:
        """Whether there is a store. Raises UserError if it may not be looked at."""
        storage = open_storage(location)
        try:
            return "manifests" in storage.names()
        except PermissionError as error:
            raise UserError(f"store {location}: cannot be used: {error.strerror}\n{storage.cure}") from error

    @property
    def location(self) -> str:
        """What names it after `--store`."""
        return self.storage.location()

    @property
    def is_write_protected(self) -> bool:
        """Whether it is in a folder that may only be read."""
        return isinstance(self.storage, Folder) and not os.access(self.root, os.W_OK)

    # Manifests

    def manifest_location(self, key: str) -> str:
        """Return where the manifest of stage `key` is, or would be."""
        return self.storage.location(_manifest(key))

    def manifest(self, key: str) -> Manifest | None:
        """Return the manifest of stage `key`, or None if the stage is not finished."""
        place = self.manifest_location(key)
        try:
            manifest = Manifest.model_validate_json(self.storage.read(_manifest(key)))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            first = error.errors()[0]
            entry = "".join(f"{part}: " for part in first["loc"])
            raise _damaged(
                place, f"not a manifest this version of pbkd can read: {entry}{first['msg']}"
            ) from error
        if manifest.key != key:
            raise _damaged(place, f"the manifest of another stage, {manifest.key[:12]}")
        return manifest

    def publish(self, manifest: Manifest, lease: Lease) -> None:
        """Declare the stage finished. Raises Fenced if `lease` was taken over, StageError if results differ.

        Publishing an equal artifact a second time is accepted: the first publisher may have died before it
        knew.
        """
        assert lease.key == manifest.key, "a lease allows to publish its own key only"
        assert self.artifact(manifest.artifact).is_dir(), "an artifact is stored before it is named"
        if not lease.is_current():
            raise Fenced(
                f"stage {manifest.key[:12]}: another runner took over its lease; this result is dropped"
            )
        if self.storage.create(_manifest(manifest.key), manifest.model_dump_json(indent=1).encode()):
            return
        present = self.manifest(manifest.key)
        if present is None or present.artifact != manifest.artifact:
            raise StageError(
                f"stage {manifest.key[:12]} is finished with another artifact already: it does not repeat"
            )

    def manifests(self) -> Iterator[Manifest]:
        """Yield every finished stage's manifest, in the order of their keys."""
        for key in self.keys():
            manifest = self.manifest(key)
            if manifest is not None:
                yield manifest

    def keys(self) -> list[str]:
        """Return the keys of all finished stages, in order."""
        names = self.storage.names("manifests")
        return [name.removesuffix(".json") for name in names if re.fullmatch(r"[0-9a-f]{6,128}\.json", name)]

    def drop(self, keys: Iterable[str]) -> None:
        """Forget finished stages, so that they run again; of their artifacts those go that no other has."""
        doomed: dict[str, float | None] = {}
        for key in keys:
            if (digest := self._artifact_of(key)) is not None:
                doomed[digest] = self._touched(digest)
            self.storage.remove(_manifest(key))
        used: dict[str, str | None] = {}
        for digest, before in doomed.items():
            # Looked up anew for each: another run may make, and publish, the same once more meanwhile.
            used = {key: used[key] if key in used else self._artifact_of(key) for key in self.keys()}
            if digest not in used.values() and self._touched(digest) == before:
                self.storage.remove(_artifact(digest))

    def _artifact_of(self, key: str) -> str | None:
        """The digest that a stage's manifest names; None if it is damaged, or gone."""
        with suppress(UserError):
            if (manifest := self.manifest(key)) is not None:
                return manifest.artifact
        return None

    def _touched(self, digest: str) -> float | None:
        """When the artifact was made, or last made once more."""
        with suppress(FileNotFoundError):
            return self.storage.stat(_artifact(digest)).modified
        return None

    def cure(self, keys: Iterable[str]) -> str:
        """Return the command that drops stages."""
        return f"pbkd store drop {' '.join(keys)} --store {self.location}"

    def find(self, reference: str) -> Manifest:
        """Return the stage of a key or artifact (or unique prefix), an artifact's folder, or weights' digest.

        Of several stages that made one artifact it is the first to have finished. Raises UserError if none
        fits.
        """
        name = self._artifact_named(reference) or reference
        if len(name) >= SHORTEST_PREFIX and all(letter in "0123456789abcdef" for letter in name):
            key = self._key(name)
            if key is not None and (manifest := self.manifest(key)) is not None:
                return manifest
            made = [m for m in self.manifests() if m.artifact.startswith(name) or m.digest == name]
            if len(artifacts := {m.artifact for m in made if m.artifact.startswith(name)}) > 1:
                raise UserError(f"{reference!r} fits {len(artifacts)} artifacts: give more digits")
            if made:
                return min(made, key=lambda manifest: manifest.created)
        raise UserError(
            f"{reference!r} is not in the store {self.location}\n"
            f"looked for: {SHORTEST_PREFIX}+ digits of a stage key or an artifact, an artifact's folder, "
            "a digest of weights\nlist them with pbkd run RECIPE --json; name another store with --store DIR"
        )

    def key(self, prefix: str) -> str:
        """Return the key of the finished stage that begins with `prefix`. Raises UserError if none does."""
        found = self._key(hex_name(prefix))
        if found is None:
            raise UserError(f"{prefix}: no finished stage of the store {self.location} has such a key")
        return found

    def _key(self, prefix: str) -> str | None:
        keys = [key for key in self.keys() if key.startswith(prefix)]
        if len(keys) > 1 and prefix not in keys:
            found = ", ".join(key[: len(prefix) + 4] for key in keys[:4])
            raise UserError(f"{prefix!r} fits {len(keys)} stages: {found} …: give more digits")
        return prefix if prefix in keys else keys[0] if keys else None

    def _artifact_named(self, reference: str) -> str | None:
        """The digest in the address of something in `artifacts`, or None."""
        if reference.startswith(place := f"{self.storage.location('artifacts')}/"):
            return reference.removeprefix(place).partition("/")[0]
        path, artifacts = Path(reference).resolve(), (self.root / "artifacts").resolve()
        if path == artifacts or not path.is_relative_to(artifacts):
            return None
        return path.relative_to(artifacts).parts[0]

    # Artifacts and work

    def artifact(self, digest: str, fresh: bool = False) -> Path:
        """Return the folder of an artifact on this machine, whether it is there or not.

        Of an object store it is a copy; `fresh` trusts none that was made before.
        """
        return self.storage.local(_artifact(digest), fresh)

    def original_artifact(self, digest: str) -> AbstractContextManager[Path]:
        """Return the folder of an artifact as the store has it, for a `with` block; copies are left alone."""
        return self.storage.original(_artifact(digest))

    def artifact_location(self, digest: str) -> str:
        """Return where the artifact is, or would be."""
        return self.storage.location(_artifact(digest))

    def add_artifact(self, folder: Path, digest: str) -> Path:
        """Move the finished `folder`, made by `scratch`, to its place; if that is taken, drop the folder.

        An artifact that is there already is young again, and `pbkd store gc` leaves it to this stage.
        """
        self.storage.add(folder, _artifact(digest))
        return self.artifact(digest)

    def scratch(self) -> Path:
        """Return a new empty folder of this machine; its user adds or removes it."""
        folder = self.root / "scratch" / uuid.uuid4().hex
        folder.mkdir()
        return folder

    def work(self, key: str) -> Storage:
        """Return where an unfinished stage's checkpoints and progress are."""
        return self.storage.below(f"work/{hex_name(key)}")

    def remove_work(self, key: str) -> None:
        """Remove what an unfinished stage left; nothing to remove is fine."""
        self.storage.remove(f"work/{hex_name(key)}")

    # Latency

    def latencies(self, network: str, machine: str) -> dict[str, Timed | None]:
        """Return what was timed of the architecture of digest `network` on `machine`; None: it cannot be.

        A record that cannot be read is as good as none, and measured anew; a warning says so.
        """
        name = _latency(network, machine)
        try:
            return timings(self.storage.read(name))
        except FileNotFoundError:
            return {}
        except ValueError:
            place = self.storage.location(name)
            log.warning("%s: is damaged: the next run that needs it measures anew", place)
            return {}

    def add_latencies(self, network: str, machine: str, found: Mapping[str, Timed | None]) -> None:
        """Keep what was timed, beside what is there; a later measurement takes an earlier one's place."""
        record = {
            "network": network,
            "machine": machine,
            "latencies": self.latencies(network, machine) | dict(found),
            "created": time.time(),
        }
        self.storage.replace(_latency(network, machine), json.dumps(record).encode())

    # Pipelines

    def pipeline(self, pipeline_id: str) -> Path:
        """Return this machine's folder of a pipeline, made if it is not there."""
        return self._here("pipelines", pipeline_id)

    def search(self, name: str) -> Path:
        """Return this machine's folder of a search, made if it is not there."""
        return self._here("searches", name)

    def search_records(self, name: str) -> Storage:
        """Return where a search's journal is."""
        return self.storage.below(place("searches", name))

    def records(self, pipeline_id: str) -> Storage:
        """Return where a pipeline's journal and its recipe.yaml are."""
        return self.storage.below(place("pipelines", pipeline_id))

    def journal(self, pipeline_id: str) -> Journal:
        """Return the journal of a pipeline, whether it is begun or not."""
        return Journal(self.records(pipeline_id))

    def recipe(self, pipeline_id: str) -> Path:
        """Return the recipe a pipeline ran, as a file of this machine; whether it is there or not."""
        path = self.pipeline(pipeline_id) / RECIPE
        with suppress(FileNotFoundError):
            content = self.records(pipeline_id).read(RECIPE)
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
        return path

    def pipelines(self) -> list[str]:
        """Return the ids of all pipelines that have a journal, the one written to last first."""
        written = {}
        for pipeline_id in self.storage.names("pipelines"):
            with suppress(FileNotFoundError, NotADirectoryError):
                written[pipeline_id] = self.storage.stat(f"pipelines/{pipeline_id}/journal.jsonl").modified
        return sorted(written, key=lambda pipeline_id: written[pipeline_id], reverse=True)

    def searches(self) -> list[str]:
        """Return the names of all searches."""
        return self.storage.names("searches")

    def _here(self, kind: str, name: str) -> Path:
        folder = self.root / place(kind, name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def timings(content: bytes) -> dict[str, Timed | None]:
    """What a latency record holds, by name; None: it cannot be timed. Raises ValueError if it is none."""
    try:
        found: dict[str, Timed | None] = json.loads(content)["latencies"]
        if all(timed is None or isinstance(timed["median_ms"], float | int) for timed in found.values()):
            return found
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("not a record of latencies") from error
    raise ValueError("a latency is no number")


def _manifest(key: str) -> str:
    return f"manifests/{hex_name(key)}.json"


def _artifact(digest: str) -> str:
    return f"artifacts/{hex_name(digest)}"


def _latency(network: str, machine: str) -> str:
    return f"latency/{hex_name(network)}-{sha256(machine.encode()).hexdigest()[:16]}.json"


def place(kind: str, name: str) -> str:
    """Where in a store the search or pipeline `name` is. Raises UserError if that is no name of one."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UserError(f"{name!r} names none of the {kind}: expected letters, digits and - _ . only")
    return f"{kind}/{name}"


def _damaged(place: str, what: str) -> UserError:
    return UserError(f"{place}: {what}\nif it was damaged, delete it: the stage will run again")


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # somebody else uses it by now
