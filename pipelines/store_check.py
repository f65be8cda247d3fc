"""What is wrong in a store, what is left over in it, and the removal of what nothing refers to."""

import json
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Literal

from pbkd.errors import UserError
from pbkd.storage import Folder, Storage
from pipelines.lease import NEVER_LEASED, Generation, LeaseWatcher, hex_name, leases_of, read_newest
from pipelines.manifest import Manifest
from pipelines.store import Store, timings
from pipelines.tracking import IDS

YOUNG_SECONDS = 3600.0
"""What was touched a shorter time ago is left alone: a run that has just begun may be about to use it."""
WATCH_SECONDS = 0.5
HERE = ("scratch/", "ray/")
OF_KEYS = ("work", "leases")
SHARED = ("manifests", "artifacts", "work")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or left over.

    Attributes:
        severity: `damage`: something is lost or unusable; `leftover`: only space is lost.
        path: the file or folder, or the address of what an object store has.
        what: is wrong with it.
        cure: what to type or do.
    """

    severity: Literal["damage", "leftover"]
    path: str
    what: str
    cure: str


GC = "pbkd store gc --apply"


def check(store: Store, full: bool = False) -> list[Finding]:
    """Look through the whole store; `full` also reads all weights and checkpoints and compares their digests.

    Owners of leases on other machines are given the benefit of the doubt.
    """
    manifests, findings = _manifests(store)
    is_readable = not findings
    keys = set(store.keys())
    for manifest in manifests.values():
        findings += _inputs(store, manifest, keys)
    findings += _artifacts(store, manifests, full)
    findings += _journals(store)
    findings += _records(store)
    if full:
        findings += _checkpoints(store)
    live = {key for key in _leased(store) if not LeaseWatcher(store.storage, key).dead()}
    leftovers = _leftovers(store, manifests, live, is_readable=is_readable)
    findings += [Finding("leftover", location(store, name), what, GC) for name, what in leftovers]
    findings += _dead_leases(store, manifests, live)
    return findings


def unused(store: Store) -> dict[str, Generation | None]:
    """Names, in the store, of what nothing refers to; of a key's things, the lease it was judged by.

    Nothing of a key with a live lease is in it, and while there is one at all, nothing that cannot be told
    to belong to another key. It takes seconds if another machine holds a lease: its counter is watched.
    """
    newest = {key: read_newest(leases_of(store.storage, key)) for key in _leased(store)}
    manifests, damage = _manifests(store)
    names = [name for name, _ in _leftovers(store, manifests, _live(store), is_readable=not damage)]
    judged: dict[str, Generation | None] = {}
    for name in names:
        kind, _, key = name.partition("/")
        judged[name] = newest.get(key, NEVER_LEASED) if kind in OF_KEYS and _is_key(key) else None
    return judged


def remove(store: Store, name: str, lease: Generation | None) -> bool:
    """Take what `unused` named out of the store at once, then delete it; False if it is in use by now."""
    place = _place(store, name)
    if lease is not None:
        is_unused = read_newest(leases_of(store.storage, name.partition("/")[2])) == lease
    else:
        is_unused = bool(_old(place, [name]))
    if is_unused:
        place.remove(name)
    return is_unused


def size_of(store: Store, name: str) -> int:
    """Bytes of what `unused` named."""
    return _place(store, name).stat(name).size


def location(store: Store, name: str) -> str:
    """Where it is, for a person."""
    return _place(store, name).location(name)


def _place(store: Store, name: str) -> Storage:
    """What keeps `name`: half-made things and logs of Ray are on this machine, wherever the store is."""
    return Folder(store.root) if name.startswith(HERE) else store.storage


def _manifests(store: Store) -> tuple[dict[str, Manifest], list[Finding]]:
    manifests, findings = {}, []
    for name in store.storage.names("manifests"):
        path, key = store.storage.location(f"manifests/{name}"), name.removesuffix(".json")
        try:
            manifest = store.manifest(key)
            if manifest is not None:
                manifests[key] = manifest
        except UserError as error:
            what, _, _ = str(error).removeprefix(f"{path}: ").partition("\n")
            findings.append(Finding("damage", path, what, f"{store.cure([key])} (the stage runs again)"))
    return manifests, findings


def _inputs(store: Store, manifest: Manifest, keys: set[str]) -> Iterator[Finding]:
    for given in manifest.inputs:
        if given.key not in keys:
            what = f"the stage it was made from ({given.role}: {given.key[:12]}) is not in the store"
            path = store.manifest_location(manifest.key)
            yield Finding("damage", path, what, "its lineage ends here; run its recipe again to complete it")


def _artifacts(store: Store, manifests: Mapping[str, Manifest], full: bool) -> Iterator[Finding]:
    from pbkd import artifact

    made: dict[str, list[Manifest]] = defaultdict(list)
    for manifest in manifests.values():
        made[manifest.artifact].append(manifest)
    for digest, makers in made.items():
        place = store.artifact_location(digest)
        cure = f"{store.cure(manifest.key for manifest in makers)} (the stage runs again)"
        keys = ", ".join(manifest.key[:12] for manifest in makers)
        # Of an object store the bucket is asked, whatever copies this machine may have.
        present = store.storage.names(f"artifacts/{digest}")
        missing = [name for name in artifact.FILES if name not in present]
        if not present:
            what = f"is missing, but stage {keys} is finished with it"
            yield Finding("damage", place, what, cure)
            continue
        if missing:
            what = f"{' and '.join(missing)} missing, but stage {keys} is finished with it"
            yield Finding("damage", place, what, cure)
            continue
        with store.original_artifact(digest) if full else nullcontext(store.artifact(digest)) as folder:
            try:
                found = artifact.read(folder)
                if (found.digest, found.weights_digest) != (digest, makers[0].digest):
                    raise UserError(f"{folder}: holds another network than the one it is named for")
                if full:
                    artifact.load(folder)
            except UserError as error:
                what = str(error).partition("\n")[0].replace(str(folder), place)
                yield Finding("damage", place, what, cure)


def _journals(store: Store) -> Iterator[Finding]:
    places = [store.records(pipeline_id) for pipeline_id in sorted(store.pipelines())]
    for records in [*places, *map(store.search_records, store.searches())]:
        try:
            lines = records.read("journal.jsonl").splitlines()
        except FileNotFoundError:
            continue  # of a search that has not begun
        torn = [number for number, line in enumerate(lines, 1) if not _is_record(line)]
        if torn:
            what = f"{len(torn)} of {len(lines)} lines are torn, the first is line {torn[0]}"
            path, cure = records.location("journal.jsonl"), "none needed: they are skipped"
            yield Finding("damage", path, what, f"{cure}; the manifests have all results")


def _records(store: Store) -> Iterator[Finding]:
    """What is made anew: latencies, and where a pipeline is in MLflow."""
    for name in store.storage.names("latency"):
        try:
            timings(store.storage.read(f"latency/{name}"))
        except FileNotFoundError:
            continue  # removed a moment ago
        except ValueError as error:
            cure = "none needed: the next run that needs it measures anew"
            yield Finding("damage", store.storage.location(f"latency/{name}"), str(error), cure)
    for pipeline_id in sorted(store.pipelines()):
        records = store.records(pipeline_id)
        try:
            is_sound = _is_record(records.read(IDS))
        except FileNotFoundError:
            continue
        if not is_sound:
            cure = "none needed: the next run of the pipeline makes it anew"
            yield Finding("damage", records.location(IDS), "is not what a run has written", cure)


def _checkpoints(store: Store) -> Iterator[Finding]:
    from pbkd.engine import Checkpoints

    for key in filter(_is_key, store.storage.names("work")):
        work = store.work(key)
        for name, what in Checkpoints(work).damaged().items():
            cure = "none needed: the stage goes on from the checkpoint before it, or begins again"
            yield Finding("damage", work.location(name), what, cure)


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _dead_leases(store: Store, manifests: Mapping[str, Manifest], live: set[str]) -> Iterator[Finding]:
    for key in _leased(store):
        place = leases_of(store.storage, key)
        newest = read_newest(place)
        if key not in live and key not in manifests and not newest.released:
            owner = (
                f"{newest.owner.host}, process {newest.owner.pid}," if newest.owner else "an owner unknown"
            )
            what = f"{owner} died with stage {key[:12]} unfinished"
            yield Finding("leftover", place.location(), what, "none needed: the next run takes it over")


def _leased(store: Store) -> list[str]:
    """Keys that ever had a lease."""
    return [name for name in store.storage.names("leases") if _is_key(name)]


def _live(store: Store) -> set[str]:
    """Keys whose leases have an owner that lives; those on other machines are watched until it is certain."""
    watchers = {key: LeaseWatcher(store.storage, key) for key in _leased(store)}
    live: set[str] = set()
    seen = {key: read_newest(leases_of(store.storage, key)) for key in watchers}
    while True:
        for key, watcher in list(watchers.items()):
            newest = read_newest(leases_of(store.storage, key))
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
) -> Iterator[tuple[str, str]]:
    """What nothing refers to, by name, and why; `is_readable`: every manifest could be read."""
    storage, known = store.storage, _keys_in_journals(store)
    for key in storage.names("work"):
        if key in live:
            continue
        if key in manifests:
            yield f"work/{key}", "work of a stage that is finished"
        elif key not in known:
            yield f"work/{key}", "work that no pipeline of this store speaks of"
    for key in _leased(store):
        if key in manifests and key not in live:
            yield f"leases/{key}", "leases of a stage that is finished"
    if live:
        return  # what follows may be a live owner's: it bears no key
    used = {manifest.artifact for manifest in manifests.values()}
    if is_readable:
        unmade = [f"artifacts/{digest}" for digest in storage.names("artifacts") if digest not in used]
        for name in _old(storage, unmade):
            yield name, "an artifact that no stage made"
    half = [f"{folder}/{name}" for folder in SHARED for name in storage.below(folder).leftovers()]
    here = Folder(store.root)
    half_here = [f"{folder}{name}" for folder in HERE for name in here.names(folder)]
    for name in [*_old(storage, half), *_old(here, half_here)]:
        yield name, "left by a process that died"


def _keys_in_journals(store: Store) -> set[str]:
    keys = set()
    for pipeline_id in store.pipelines():
        records, _ = store.journal(pipeline_id).read()
        keys |= {record["key"] for record in records if record.get("type") == "started"}
    return keys


def _old(storage: Storage, names: list[str]) -> list[str]:
    """Those of `names` that were not touched lately, by the clock of what keeps them."""
    if not names:
        return []
    probe = f"scratch/{uuid.uuid4().hex}"
    storage.replace(probe, b"", sync=False)
    now = storage.stat(probe).modified
    storage.remove(probe)
    old = []
    for name in names:
        with suppress(FileNotFoundError):  # removed a moment ago
            if now - storage.stat(name).modified > YOUNG_SECONDS:
                old.append(name)
    return old


def _is_key(name: str) -> bool:
    try:
        return bool(hex_name(name))
    except UserError:
        return False
