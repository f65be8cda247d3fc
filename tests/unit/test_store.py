"""A stage is finished when its manifest is there; nothing half-written is seen; nothing escapes the store."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pbkd.errors import StageError, UserError
from pipelines.lease import Fenced, Lease, try_acquire
from pipelines.manifest import Input, Manifest
from pipelines.store import Store

KEY, OTHER = "ab" * 32, "cd" * 32
ARTIFACT, WEIGHTS = "11" * 32, "22" * 32


def manifest_of(key: str = KEY, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "key": key, "kind": "block", "settings": {"epochs": 3}, "inputs": [Input(role="from", key=OTHER)],
        "data_digest": "ef" * 32, "seed": 0, "compute": {"precision": "fp32", "world_size": 1, "threads": 1},
        "artifact": ARTIFACT, "digest": WEIGHTS,
        "metrics": {"test_accuracy": 97.1, "macs": 10, "agreement": None},
        "history": [{"time": 1.5, "step": 11, "epoch": 1, "train_loss": 0.5}],
        "seconds": 3.2, "versions": {"torch": "2"}, "machine": {"cores": 2}, "git": None, "created": 1.7e9,
    }  # fmt: skip
    return Manifest(**(fields | changes))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def add_artifact(store: Store, digest: str = ARTIFACT) -> Path:
    folder = store.scratch()
    (folder / "spec.json").write_text("{}")
    return store.add_artifact(folder, digest)


def lease_of(store: Store, key: str = KEY) -> Lease:
    lease = try_acquire(store.storage, key)
    assert lease is not None
    return lease


def publish(store: Store, manifest: Manifest) -> None:
    add_artifact(store, manifest.artifact)
    lease = lease_of(store, manifest.key)
    store.publish(manifest, lease)
    lease.release()


def test_a_published_manifest_is_read_back_equal(store: Store) -> None:
    assert store.manifest(KEY) is None
    publish(store, manifest_of())
    assert store.manifest(KEY) == manifest_of()
    assert [manifest.key for manifest in store.manifests()] == [KEY]


def test_a_second_publication_must_be_of_the_same_artifact(store: Store) -> None:
    publish(store, manifest_of())
    publish(store, manifest_of(seconds=9.0))
    present = store.manifest(KEY)
    assert present is not None and present.seconds == 3.2
    with pytest.raises(StageError, match="another artifact"):
        publish(store, manifest_of(artifact="33" * 32))
    assert not list((store.root / "manifests").glob(".*"))


def test_a_fenced_out_owner_cannot_publish(store: Store) -> None:
    add_artifact(store)
    old = lease_of(store)
    new = try_acquire(store.storage, KEY, dead=old.generation)
    assert new is not None
    with pytest.raises(Fenced):
        store.publish(manifest_of(), old)
    assert store.manifest(KEY) is None
    store.publish(manifest_of(), new)


def test_an_artifact_is_moved_whole_and_kept_if_it_exists(store: Store) -> None:
    first = add_artifact(store)
    assert first == store.artifact(ARTIFACT) and (first / "spec.json").exists()
    assert add_artifact(store) == first
    assert not list((store.root / "scratch").iterdir())


def test_work_is_removed_at_once(store: Store) -> None:
    store.work(KEY).replace("checkpoint", b"x")
    store.remove_work(KEY)
    store.remove_work(KEY)
    assert not list((store.root / "work").iterdir()) and not list((store.root / "scratch").iterdir())


def test_find_understands_every_reference(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store, manifest_of())
    publish(store, manifest_of(OTHER, artifact="44" * 32, digest="55" * 32))
    monkeypatch.chdir(store.root)
    for reference in (
        KEY,
        KEY[:6],
        ARTIFACT,
        ARTIFACT[:6],
        WEIGHTS,
        str(store.artifact(ARTIFACT)),
        f"artifacts/{ARTIFACT}/spec.json",
    ):
        assert store.find(reference).key == KEY


def test_find_says_what_it_looked_for(store: Store) -> None:
    twin = KEY[:10] + "f" * 54
    publish(store, manifest_of())
    publish(store, manifest_of(twin))
    with pytest.raises(UserError, match="2 stages"):
        store.find(KEY[:8])
    for reference in ("abab", "nonsense", "../manifests", "99" * 32, ""):
        with pytest.raises(UserError, match=r"looked for: 6.* digits of a stage key"):
            store.find(reference)


def test_an_artifact_of_several_stages_is_the_first_ones(store: Store) -> None:
    publish(store, manifest_of(KEY, created=2.0))
    publish(store, manifest_of(OTHER, created=1.0))
    assert store.find(ARTIFACT).key == OTHER


@pytest.mark.parametrize("name", ["../../etc", "AB" * 32, "ab/cd" * 4, "", "abab\n"])
def test_no_name_escapes_the_store(store: Store, name: str) -> None:
    for use in (
        store.manifest,
        store.artifact,
        store.work,
        store.remove_work,
        lambda key: try_acquire(store.storage, key),
    ):
        with pytest.raises(UserError):
            use(name)
    with pytest.raises(UserError):
        store.pipeline(f"../{name}")


def test_a_damaged_manifest_is_named_with_the_cure(store: Store) -> None:
    (store.root / "manifests" / f"{KEY}.json").write_text("{}")
    with pytest.raises(UserError, match=r"(?s)manifests/abab.*delete it"):
        store.manifest(KEY)


def test_latencies_are_kept_by_architecture_and_machine_beside_those_that_are_there(store: Store) -> None:
    machine = "Intel(R) Xeon(R) @ 2/4"
    first, later = ({"median_ms": value, "iqr_ms": 0.1, "repeats": 30} for value in (1.5, 2.5))
    assert store.latencies(ARTIFACT, machine) == {}
    store.add_latencies(ARTIFACT, machine, {"latency_ms": first, "latency_ms_compiled": None})
    store.add_latencies(ARTIFACT, machine, {"latency_ms": later})
    assert store.latencies(ARTIFACT, machine) == {"latency_ms": later, "latency_ms_compiled": None}
    assert store.latencies(ARTIFACT, "another") == {}


def test_an_impossible_root_is_a_users_mistake_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for root in (tmp_path / "file", tmp_path / "file" / "runs", Path("/proc/pbkd/runs")):
        with pytest.raises(UserError, match="--store"):
            Store(root)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "work").write_text("in the way of a folder")
    with pytest.raises(UserError, match="--store"):
        Store(tmp_path / "runs")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["work"]


def test_opening_a_store_is_repeatable(store: Store) -> None:
    publish(store, manifest_of())
    assert Store(store.root).manifest(KEY) == manifest_of()


def test_importing_the_store_does_not_import_the_heavy_packages() -> None:
    script = "import sys, pipelines.store; sys.exit(bool({'mlflow', 'torch', 'ray'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", script], check=True)
