"""What is wrong in a store, what is left over in it, and the removal of what nothing refers to."""

import json
import shutil
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pbkd.errors import UserError
from pipelines.durable import hex_name
from pipelines.journal import Journal
from pipelines.lease import LeaseWatcher, read_newest
from pipelines.store import Manifest, Store

YOUNG_SECONDS = 3600.0
"""What was touched a shorter time ago is left alone: a run that has just begun may be about to use it."""
WATCH_SECONDS = 0.5


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or left over.

    Attributes:
        severity: `damage`: something is lost or unusable; `leftover`: only space is lost.
        path: the file or folder.
        what: is wrong with it.
        cure: what to type or do.
    """

    severity: Literal["damage", "leftover"]
    path: Path
    what: str
    cure: str


GC = "pbkd store gc --apply"


def check(store: Store, full: bool = False) -> list[Finding]:
    """Look through the whole store; `full` also reads all weights and compares their digests.

    Owners of leases on other machines are given the benefit of the doubt.
    """
    manifests, findings = _manifests(store)
    is_readable = not findings
    for manifest in manifests.values():
        findings += _inputs(store, manifest, manifests)
    findings += _artifacts(store, manifests, full)
    findings += _journals(store)
    live = {key for key in _leased(store) if not LeaseWatcher(store.root, key).dead()}
    leftovers = _leftovers(store, manifests, live, is_readable=is_readable)
    findings += [Finding("leftover", path, what, GC) for path, what in leftovers]
    findings += _dead_leases(store, manifests, live)
    return findings


def unused(store: Store) -> list[Path]:
    """What nothing refers to.

    Nothing of a key with a live lease is in it, and while there is one at all, nothing that cannot be told
    to belong to another key. It takes seconds if another machine holds a lease: its counter is watched.
    """
    manifests, damage = _manifests(store)
    return [path for path, _ in _leftovers(store, manifests, _live(store), is_readable=not damage)]


def remove(store: Store, path: Path) -> None:
    """Take `path` out of the store at once, then delete it."""
    doomed = store.root / "scratch" / uuid.uuid4().hex
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return  # another one was faster
    if doomed.is_dir():
        shutil.rmtree(doomed)
    else:
        doomed.unlink()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _manifests(store: Store) -> tuple[dict[str, Manifest], list[Finding]]:
    manifests, findings = {}, []
    for path in sorted((store.root / "manifests").glob("[!.]*")):
        try:
            manifest = store.manifest(path.stem)
            if manifest is not None:
                manifests[path.stem] = manifest
        except UserError as error:
            what, _, _ = str(error).removeprefix(f"{path}: ").partition("\n")
            findings.append(Finding("damage", path, what, f"rm {path} (the stage runs again)"))
    return manifests, findings


def _inputs(store: Store, manifest: Manifest, manifests: Mapping[str, Manifest]) -> Iterator[Finding]:
    for given in manifest.inputs:
        if given.key not in manifests and not store.manifest_path(given.key).exists():
            what = f"the stage it was made from ({given.role}: {given.key[:12]}) is not in the store"
            path = store.manifest_path(manifest.key)
            yield Finding("damage", path, what, "its lineage ends here; run its recipe again to complete it")


def _artifacts(store: Store, manifests: Mapping[str, Manifest], full: bool) -> Iterator[Finding]:
    from pbkd import artifact

    made: dict[str, list[Manifest]] = defaultdict(list)
    for manifest in manifests.values():
        made[manifest.artifact].append(manifest)
    for digest, makers in made.items():
        folder = store.artifact(digest)
        paths = [str(store.manifest_path(manifest.key)) for manifest in makers]
        keys = ", ".join(manifest.key[:12] for manifest in makers)
        if not folder.is_dir():
            what = f"is missing, but stage {keys} is finished with it"
            yield Finding("damage", folder, what, f"rm {' '.join(paths)} (the stage runs again)")
            continue
        try:
            found = artifact.read(folder)
            if (found.digest, found.weights_digest) != (digest, makers[0].digest):
                raise UserError(f"{folder}: holds another network than the one it is named for")
            if not (folder / "weights.safetensors").is_file():
                raise UserError(f"{folder / 'weights.safetensors'}: is missing")
            if full:
                artifact.load(folder)
        except UserError as error:
            cure = f"rm -r {folder} {' '.join(paths)} (the stage runs again)"
            yield Finding("damage", folder, str(error).partition("\n")[0], cure)


def _journals(store: Store) -> Iterator[Finding]:
    for path in sorted((store.root / "pipelines").glob("*/journal.jsonl")):
        content = path.read_bytes()
        lines = content.splitlines()
        torn = [number for number, line in enumerate(lines, 1) if not _is_record(line)]
        if torn:
            what = f"{len(torn)} of {len(lines)} lines are torn, the first is line {torn[0]}"
            yield Finding(
                "damage", path, what, "none needed: they are skipped; the manifests have all results"
            )


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _dead_leases(store: Store, manifests: Mapping[str, Manifest], live: set[str]) -> Iterator[Finding]:
    for key in _leased(store):
        folder = store.root / "leases" / key
        newest = read_newest(folder)
        if key not in live and key not in manifests and not newest.released:
            owner = (
                f"{newest.owner.host}, process {newest.owner.pid}," if newest.owner else "an owner unknown"
            )
            what = f"{owner} died with stage {key[:12]} unfinished"
            yield Finding("leftover", folder, what, "none needed: the next run takes it over")


def _leased(store: Store) -> list[str]:
    """Keys that ever had a lease."""
    return [path.name for path in sorted((store.root / "leases").iterdir()) if _is_key(path)]


def _live(store: Store) -> set[str]:
    """Keys whose leases have an owner that lives; those on other machines are watched until it is certain."""
    watchers = {key: LeaseWatcher(store.root, key) for key in _leased(store)}
    live: set[str] = set()
    seen = {key: read_newest(store.root / "leases" / key) for key in watchers}
    while True:
        for key, watcher in list(watchers.items()):
            newest = read_newest(store.root / "leases" / key)
            is_here = newest.owner is not None and newest.owner.is_here()
            if watcher.dead():
                del watchers[key]
            elif is_here or newest != seen[key]:
                live.add(key)
                del watchers[key]
        if not watchers:
            return live
        time.sleep(WATCH_SECONDS)


def _leftovers(
    store: Store, manifests: Mapping[str, Manifest], live: set[str], *, is_readable: bool
) -> Iterator[tuple[Path, str]]:
    """What nothing refers to, and why; `is_readable` says that every manifest could be read."""
    known = _keys_in_journals(store)
    for path in sorted((store.root / "work").iterdir()):
        if path.name in live:
            continue
        if path.name in manifests:
            yield path, "work of a stage that is finished"
        elif path.name not in known:
            yield path, "work that no pipeline of this store speaks of"
    for key in _leased(store):
        if key in manifests and key not in live:
            yield store.root / "leases" / key, "leases of a stage that is finished"
    if live:
        return  # what follows may be a live owner's: it bears no key
    now = _file_system_time(store)
    used = {manifest.artifact for manifest in manifests.values()}
    for path in sorted((store.root / "artifacts").iterdir()):
        if is_readable and path.name not in used and now - path.stat().st_mtime > YOUNG_SECONDS:
            yield path, "an artifact that no stage made"
    scratch = [*(store.root / "scratch").iterdir(), *(store.root / "manifests").glob(".*")]
    if (store.root / "ray").is_dir():
        scratch += (store.root / "ray").iterdir()
    for path in sorted(scratch):
        if now - path.stat().st_mtime > YOUNG_SECONDS:
            yield path, "left by a process that died"


def _keys_in_journals(store: Store) -> set[str]:
    keys = set()
    for pipeline_id in store.pipelines():
        records, _ = Journal(store.root / "pipelines" / pipeline_id / "journal.jsonl").read()
        keys |= {record["key"] for record in records if record.get("type") == "started"}
    return keys


def _file_system_time(store: Store) -> float:
    """Now, by the clock that dates the store's files."""
    folder = store.scratch()
    try:
        return folder.stat().st_mtime
    finally:
        folder.rmdir()


def _is_key(path: Path) -> bool:
    try:
        return bool(hex_name(path.name))
    except UserError:
        return False
