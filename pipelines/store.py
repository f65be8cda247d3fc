"""The store: manifests, artifacts, latencies, unfinished work. The one source of truth of all runs."""

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from pbkd.errors import StageError, UserError
from pipelines.durable import create, hex_name, replace, sync_files, sync_folder
from pipelines.lease import Fenced, Lease

SHORTEST_PREFIX = 6

Hex = Annotated[str, AfterValidator(hex_name)]
"""A stage key or digest: as the name of a file it stays in its folder."""

Number = float | int | None
Timed = dict[str, float]
"""`median_ms`, `iqr_ms` and the number of `repeats` of a latency."""


class Input(BaseModel):
    """A stage that this one starts from (`from`), learns from (`teacher`) or joins (`block`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    key: Hex


class Manifest(BaseModel):
    """The record of a finished stage: what went in, what came out. Published once, never changed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    key: Hex
    kind: str
    settings: dict[str, Any]
    inputs: list[Input]
    data_digest: Hex | None
    seed: int
    compute: dict[str, Any]
    artifact: Hex
    digest: Hex
    metrics: dict[str, Number]
    history: list[dict[str, Number | str]]
    seconds: float
    versions: dict[str, str]
    machine: dict[str, Any]
    git: str | None
    created: float


class Store:
    """A folder that any number of pipelines, on any number of nodes that see it, may use at the same time."""

    FOLDERS = ("manifests", "artifacts", "leases", "work", "latency", "pipelines", "mlflow", "scratch")

    def __init__(self, root: Path) -> None:
        """Open the store `root`, made if need be. Raises UserError, leaving nothing behind, if it fails."""
        self.root = Path(root).expanduser().absolute()
        made: list[Path] = []
        try:
            for folder in (
                *reversed([self.root, *self.root.parents]),
                *(self.root / name for name in self.FOLDERS),
            ):
                if not folder.is_dir():
                    folder.mkdir(exist_ok=True)
                    made.append(folder)
            self._probe()
        except OSError as error:
            for folder in reversed(made):
                _remove_if_empty(folder)
            raise UserError(
                f"store {self.root}: cannot be used: {error.strerror or error}\n"
                "choose a folder you may write to, on a file system that has hard links: --store DIR"
            ) from error

    @classmethod
    def existing(cls, root: Path) -> Self:
        """Open a store that is there already; raises UserError, and makes none, if it is not."""
        if not (root / "manifests").is_dir():
            raise UserError(f"store {root}: there is none; run a recipe first, or name it by --store DIR")
        return cls(root)

    # Manifests

    def manifest_path(self, key: str) -> Path:
        """Return where the manifest of stage `key` is, or would be."""
        return self.root / "manifests" / f"{hex_name(key)}.json"

    def manifest(self, key: str) -> Manifest | None:
        """Return the manifest of stage `key`, or None if the stage is not finished."""
        path = self.manifest_path(key)
        try:
            manifest = Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            first = error.errors()[0]
            place = "".join(f"{part}: " for part in first["loc"])
            raise _damaged(
                path, f"not a manifest this version of pbkd can read: {place}{first['msg']}"
            ) from error
        if manifest.key != key:
            raise _damaged(path, f"the manifest of another stage, {manifest.key[:12]}")
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
        if create(self.manifest_path(manifest.key), manifest.model_dump_json(indent=1).encode()):
            return
        present = self.manifest(manifest.key)
        if present is None or present.artifact != manifest.artifact:
            raise StageError(
                f"stage {manifest.key[:12]} is finished with another artifact already: it does not repeat"
            )

    def manifests(self) -> Iterator[Manifest]:
        """Yield every finished stage's manifest, in the order of their keys."""
        for path in sorted((self.root / "manifests").glob("[0-9a-f]*.json")):
            manifest = self.manifest(path.stem)
            if manifest is not None:
                yield manifest

    def find(self, reference: str) -> Manifest:
        """Return the stage of a key (or unique prefix), an artifact (digest or folder) or digest of weights.

        Of several stages that made one artifact it is the first to have finished. Raises UserError if none
        fits.
        """
        path, artifacts = Path(reference).resolve(), (self.root / "artifacts").resolve()
        is_inside = path != artifacts and path.is_relative_to(artifacts)
        name = path.relative_to(artifacts).parts[0] if is_inside else reference
        if len(name) >= SHORTEST_PREFIX and all(letter in "0123456789abcdef" for letter in name):
            keys = [path.stem for path in (self.root / "manifests").glob(f"{name}*.json")]
            if len(keys) > 1 and name not in keys:
                found = ", ".join(key[: len(name) + 4] for key in sorted(keys)[:4])
                raise UserError(f"{reference!r} fits {len(keys)} stages: {found} …: give more digits")
            if keys and (manifest := self.manifest(name if name in keys else keys[0])) is not None:
                return manifest
            made = [manifest for manifest in self.manifests() if name in (manifest.artifact, manifest.digest)]
            if made:
                return min(made, key=lambda manifest: manifest.created)
        raise UserError(
            f"{reference!r} is not in the store {self.root}\n"
            f"looked for: a stage key or {SHORTEST_PREFIX}+ digits of one, an artifact (digest or folder), "
            "a digest of weights\nlist them with pbkd run RECIPE --json; name another store with --store DIR"
        )

    # Artifacts and work

    def artifact(self, digest: str) -> Path:
        """Return the folder of an artifact, whether it is there or not."""
        return self.root / "artifacts" / hex_name(digest)

    def add_artifact(self, folder: Path, digest: str) -> Path:
        """Move the finished `folder`, made by `scratch`, to its place; if that is taken, drop the folder."""
        place = self.artifact(digest)
        if not place.exists():
            sync_files(folder)
            try:
                folder.rename(place)
            except OSError:
                if not place.exists():
                    raise
            sync_folder(place.parent)
        else:
            os.utime(place)  # it is young again, and `pbkd store gc` leaves it to this stage
        shutil.rmtree(folder, ignore_errors=True)  # equal content was first
        return place

    def scratch(self) -> Path:
        """Return a new empty folder on the store's file system; its user moves or removes it."""
        folder = self.root / "scratch" / uuid.uuid4().hex
        folder.mkdir()
        return folder

    def work(self, key: str) -> Path:
        """Return the folder of an unfinished stage's checkpoints and progress, made if it is not there."""
        folder = self.root / "work" / hex_name(key)
        folder.mkdir(exist_ok=True)
        return folder

    def remove_work(self, key: str) -> None:
        """Remove what an unfinished stage left; nothing to remove is fine."""
        folder = self.root / "work" / hex_name(key)
        doomed = self.root / "scratch" / uuid.uuid4().hex
        try:
            folder.rename(doomed)  # at once, so that nobody resumes from a half-removed checkpoint
        except FileNotFoundError:
            return
        shutil.rmtree(doomed)

    # Latency

    def latencies(self, network: str, machine: str) -> dict[str, Timed | None]:
        """Return what was timed of the architecture of digest `network` on `machine`; None: it cannot be."""
        path = self._latency_path(network, machine)
        found: dict[str, Timed | None] = json.loads(path.read_bytes())["latencies"] if path.exists() else {}
        return found

    def add_latencies(self, network: str, machine: str, found: Mapping[str, Timed | None]) -> None:
        """Keep what was timed, beside what is there; a later measurement takes an earlier one's place."""
        record = {
            "network": network,
            "machine": machine,
            "latencies": self.latencies(network, machine) | dict(found),
            "created": time.time(),
        }
        replace(self._latency_path(network, machine), json.dumps(record).encode())

    # Pipelines

    def pipeline(self, pipeline_id: str) -> Path:
        """Return the folder of a pipeline, made if it is not there."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", pipeline_id):
            raise UserError(
                f"{pipeline_id!r} is not a pipeline's id: expected letters, digits and - _ . only"
            )
        folder = self.root / "pipelines" / pipeline_id
        folder.mkdir(exist_ok=True)
        return folder

    def pipelines(self) -> list[str]:
        """Return the ids of all pipelines that have a journal, the one written to last first."""
        journals = list((self.root / "pipelines").glob("*/journal.jsonl"))
        return [
            path.parent.name for path in sorted(journals, key=lambda path: path.stat().st_mtime, reverse=True)
        ]

    def _probe(self) -> None:
        # Permissions may allow what the file system refuses: writing, and hard links.
        folder = self.scratch()
        try:
            create(folder / "probe", b"probe")
        finally:
            shutil.rmtree(folder)

    def _latency_path(self, network: str, machine: str) -> Path:
        return self.root / "latency" / f"{hex_name(network)}-{sha256(machine.encode()).hexdigest()[:16]}.json"


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}\nif it was damaged, delete it: the stage will run again")


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return  # somebody else uses it by now
