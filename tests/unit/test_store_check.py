"""What is damaged is found and explained; what nothing refers to goes, and nothing else ever."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pbkd import artifact
from pbkd.engine import Checkpoints, State
from pbkd.networks import fresh
from pipelines import store_check
from pipelines.cli import main
from pipelines.lease import Owner, try_acquire
from pipelines.manifest import Input
from pipelines.store import Store
from pipelines.store_check import check, remove, unused
from pipelines.tracking import read_ids
from tests.unit.small_networks import small_resnet
from tests.unit.test_store import KEY, OTHER, lease_of, manifest_of

UNFINISHED, UNKNOWN = "ee" * 32, "ff" * 32


def finish(store: Store, key: str, seed: int, inputs: list[Input]) -> Path:
    folder = store.scratch()
    saved = artifact.save(fresh(small_resnet(base_width=4), seed), folder)
    place = store.add_artifact(folder, saved.digest)
    lease = lease_of(store, key)
    store.publish(manifest_of(key, artifact=saved.digest, digest=saved.weights_digest, inputs=inputs), lease)
    lease.release()
    return place


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two finished stages, one from the other, and one that was stopped."""
    store = Store(tmp_path / "runs")
    finish(store, OTHER, 1, [])
    finish(store, KEY, 2, [Input(role="from", key=OTHER)])
    journal = store.journal("aabbcc")
    journal.append({"type": "pipeline", "id": "aabbcc", "name": "small"})
    for key in (OTHER, KEY, UNFINISHED):
        journal.append({"type": "started", "name": key[:2], "key": key})
    store.work(UNFINISHED).replace("step-000000003-00", b"")
    lease_of(store, UNFINISHED).release()
    return store


def age(path: Path) -> None:
    moment = time.time() - 2 * store_check.YOUNG_SECONDS
    os.utime(path, (moment, moment))


def artifact_of(store: Store, key: str) -> Path:
    manifest = store.manifest(key)
    assert manifest is not None
    return store.artifact(manifest.artifact)


def damage(store: Store, full: bool = False) -> dict[str, str]:
    """What is wrong, by path in the store."""
    return {
        str(Path(finding.path).relative_to(store.root)): finding.what
        for finding in check(store, full)
        if finding.severity == "damage"
    }


def test_a_sound_store_is_sound(store: Store) -> None:
    assert damage(store, full=True) == {}


def test_a_flipped_byte_is_found_by_full_and_the_cure_lets_the_stage_run_again(store: Store) -> None:
    file = artifact_of(store, KEY) / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert damage(store) == {}
    (finding,) = (found for found in check(store, full=True) if found.severity == "damage")
    assert finding.path == str(file.parent) and "do not match their digest" in finding.what
    command = finding.cure.removesuffix(" (the stage runs again)")
    assert command == f"pbkd store drop {KEY} --store {store.root}"
    assert main(command.split()[1:]) == 0
    assert not file.exists()
    assert damage(store, full=True) == {}
    assert store.manifest(KEY) is None and store.manifest(OTHER) is not None


def test_every_kind_of_damage_is_named(store: Store) -> None:
    made = artifact_of(store, OTHER)
    shutil.rmtree(made)
    (artifact_of(store, KEY) / "spec.json").write_text("{}")
    (store.root / "manifests" / f"{UNKNOWN}.json").write_text("")
    journal = store.root / "pipelines" / "aabbcc" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"type": "prog\n')
    found = damage(store)
    assert "is missing, but stage cdcd" in found[f"artifacts/{made.name}"]
    assert "not a pbkd architecture spec" in found[f"artifacts/{artifact_of(store, KEY).name}"]
    assert "not a manifest" in found[f"manifests/{UNKNOWN}.json"]
    assert "1 of 5 lines are torn, the first is line 5" in found["pipelines/aabbcc/journal.jsonl"]
    assert set(found) == {
        f"artifacts/{made.name}",
        f"artifacts/{artifact_of(store, KEY).name}",
        f"manifests/{UNKNOWN}.json",
        "pipelines/aabbcc/journal.jsonl",
    }
    Path(store.manifest_location(OTHER)).unlink()
    assert "is not in the store" in damage(store)[f"manifests/{KEY}.json"]


def test_damage_to_what_is_made_anew_is_named_and_stops_nothing(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    timed = {"median_ms": 1.5, "iqr_ms": 0.1, "repeats": 30}
    store.add_latencies(KEY, "machine", {"latency_ms": timed})
    (latency,) = (store.root / "latency").iterdir()
    searched = store.search("search") / "journal.jsonl"
    searched.write_text('{"type": "search"}\n')
    ids = store.pipeline("aabbcc") / "tracking.json"
    ids.write_text("{}")
    store.search("another")
    Checkpoints(store.work(UNFINISHED)).save(State(7, {}, {}, []))
    (checkpoint,) = (store.root / "work" / UNFINISHED).glob("step-000000007-*")
    assert damage(store, full=True) == {}

    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    searched.write_text('{"type": "search"}\n{"type"\n')
    for torn in ("", "[]", '{"latencies": 3}', '{"latencies": {"latency_ms": {}}}'):
        latency.write_text(torn)
        ids.write_text(torn[:2])
        expected = {str(path.relative_to(store.root)) for path in (latency, searched, ids)}
        assert set(damage(store)) == expected
        assert set(damage(store, full=True)) == {*expected, str(checkpoint.relative_to(store.root))}
        assert store.latencies(KEY, "machine") == {} and read_ids(store, "aabbcc") == {}
        assert f"{latency}: is damaged" in caplog.text and f"{ids}: is damaged" in caplog.text
        caplog.clear()
    store.add_latencies(KEY, "machine", {"latency_ms": timed})
    assert store.latencies(KEY, "machine") == {"latency_ms": timed}


def test_a_dropped_stage_leaves_its_artifact_to_others_that_have_it(
    store: Store, capfd: pytest.CaptureFixture[str]
) -> None:
    twin, place = "dd" * 32, artifact_of(store, KEY)
    manifest = store.manifest(KEY)
    assert manifest is not None
    store.publish(manifest.model_copy(update={"key": twin}), lease_of(store, twin))
    here = ["--store", str(store.root)]
    assert main(["store", "drop", "ffffff", *here]) == 2 and "no finished stage" in capfd.readouterr().err
    assert main(["store", "drop", KEY[:8], *here]) == 0
    assert store.keys() == [OTHER, twin] and place.is_dir()
    Path(store.manifest_location(OTHER)).write_text("torn")
    assert main(["store", "drop", twin, OTHER, *here]) == 0
    assert store.keys() == [] and not place.exists()


def litter(store: Store) -> set[str]:
    """What crashes and deleted pipelines leave."""
    orphan = store.root / "artifacts" / UNKNOWN
    shutil.copytree(artifact_of(store, KEY), orphan)
    scratch = store.scratch()
    temporary = store.root / "manifests" / f".{KEY}.json.0123"
    temporary.write_text("half")
    for path in (orphan, scratch, temporary):
        age(path)
    for key in (UNKNOWN, KEY):
        store.work(key).replace("progress.jsonl", b"")
    keys = {f"leases/{KEY}", f"leases/{OTHER}", f"work/{UNKNOWN}", f"work/{KEY}"}
    return keys | {str(path.relative_to(store.root)) for path in (orphan, scratch, temporary)}


def test_what_nothing_refers_to_goes_and_the_rest_stays(store: Store) -> None:
    before = {path for path in store.root.rglob("*") if path.is_file() and "leases" not in path.parts}
    expected = litter(store)
    assert set(unused(store)) == expected
    for name, lease in unused(store).items():
        assert remove(store, name, lease)
    assert unused(store) == {}
    assert not any((store.root / name).exists() for name in expected)
    assert {path for path in before if not path.exists()} == set()
    assert damage(store, full=True) == {} and not list((store.root / "scratch").iterdir())


def test_nothing_of_a_live_lease_is_touched(store: Store) -> None:
    litter(store)
    lease = try_acquire(store.storage, UNKNOWN)
    assert lease is not None
    assert set(unused(store)) == {f"work/{KEY}", f"leases/{KEY}", f"leases/{OTHER}"}


def test_an_owner_on_another_machine_is_watched_before_it_is_thought_dead(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = try_acquire(store.storage, UNKNOWN, replace(Owner.here(), host="another-node"))
    assert lease is not None

    def renew(seconds: float) -> None:
        assert lease.renew()

    monkeypatch.setattr(store_check.time, "sleep", renew)
    store.work(UNKNOWN).replace("progress.jsonl", b"")
    assert f"work/{UNKNOWN}" not in unused(store)
    assert "leases" not in str(damage(store))


def test_what_is_young_or_might_belong_to_an_unreadable_manifest_stays(store: Store) -> None:
    orphan = store.root / "artifacts" / UNKNOWN
    shutil.copytree(artifact_of(store, KEY), orphan)
    os.utime(orphan)
    assert f"artifacts/{UNKNOWN}" not in unused(store)
    age(orphan)
    assert f"artifacts/{UNKNOWN}" in unused(store)
    Path(store.manifest_location(KEY)).write_text("torn")
    assert not any(name.startswith("artifacts/") for name in unused(store))


def test_an_artifact_made_once_more_is_young_again(store: Store, tmp_path: Path) -> None:
    place = artifact_of(store, KEY)
    Path(store.manifest_location(KEY)).unlink()
    age(place)
    assert f"artifacts/{place.name}" in unused(store)
    folder = store.scratch()
    store.add_artifact(folder, place.name)
    assert f"artifacts/{place.name}" not in unused(store)


def test_what_has_come_into_use_since_it_was_listed_stays(store: Store) -> None:
    expected = litter(store)
    listed = unused(store)
    folder = store.scratch()
    store.add_artifact(folder, UNKNOWN)
    assert try_acquire(store.storage, UNKNOWN) is not None
    removed = {name for name, lease in listed.items() if remove(store, name, lease)}
    assert expected - removed == {f"artifacts/{UNKNOWN}", f"work/{UNKNOWN}"}
    assert (store.root / "artifacts" / UNKNOWN).is_dir() and store.work(UNKNOWN).names()


def test_what_another_run_publishes_again_while_it_is_dropped_keeps_its_artifact(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, manifest = artifact_of(store, KEY), store.manifest(KEY)
    assert manifest is not None
    age(place)
    again = try_acquire(store.storage, KEY)
    assert again is not None
    remove_manifest = store.storage.remove

    def remove_then_republish(name: str) -> None:
        remove_manifest(name)
        if name == f"manifests/{KEY}.json":
            store.add_artifact(store.scratch(), place.name)  # its manifest comes when all is looked through

    monkeypatch.setattr(store.storage, "remove", remove_then_republish)
    store.drop([KEY])
    assert place.is_dir()
    store.publish(manifest, again)
    assert damage(store, full=True) == {}


def test_a_dead_lease_is_explained(store: Store) -> None:
    assert try_acquire(store.storage, UNKNOWN, replace(Owner.here(), started="1")) is not None
    (finding,) = (found for found in check(store) if found.path == str(store.root / "leases" / UNKNOWN))
    assert "died with stage ffff" in finding.what and "the next run takes it over" in finding.cure


def test_the_commands(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str, code: int = 0) -> str:
        assert main(["store", *arguments, "--store", str(store.root)]) == code
        return capfd.readouterr().out

    assert "2 finished stages (weights too): 0 damaged" in said("check", "--full")
    store.work(UNKNOWN).replace("progress.jsonl", b"")
    work = store.root / "work" / UNKNOWN
    assert str(work) in said("gc") and work.exists()
    report = json.loads(said("gc", "--apply", "--json"))
    assert report["applied"] and str(work) in [row["path"] for row in report["unused"]] and not work.exists()
    (artifact_of(store, KEY) / "weights.safetensors").unlink()
    report = json.loads(said("check", "--json", code=1))
    assert report["damaged"] == 1 and report["findings"][-1].keys() == {"severity", "path", "what", "cure"}
    said("check", code=1)
    assert main(["store", "check", "--store", str(store.root / "none")]) == 2
