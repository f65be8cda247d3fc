"""A finished pipeline as a driver leaves it in the store: journal, manifests, artifacts; nothing trained."""

import functools
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from pbkd.data import DataSettings
from pipelines.journal import Journal
from pipelines.lease import try_acquire
from pipelines.manifest import Input, Interface, Manifest
from pipelines.store import Store
from pipelines.tracking import connect

PIPELINE = "0a1b2c3d4e5f"
START = 1_763_000_000.25

# name, kind, what it starts from, test accuracy, multiply-accumulates
STAGES = [
    ("teacher", "train", None, 98.2, 1000),
    ("block1", "block", "teacher", 97.9, 800),
    ("small", "prune", "block1", 97.3, 200),
    ("scratch", "train", "small", 95.2, 200),
]


def digest(*words: object) -> str:
    return sha256(repr(words).encode()).hexdigest()


def keys(seed: int = 0) -> dict[str, str]:
    return {name: digest("key", name, seed) for name, *_ in STAGES}


def manifest_of(name: str, seed: int = 0) -> Manifest:
    number = [stage[0] for stage in STAGES].index(name)
    _, kind, source, accuracy, macs = STAGES[number]
    key, begin = keys(seed), START + 100 * seed + 10 * number
    inputs = [Input(role="from", key=key[source])] if source else []
    inputs += [Input(role="teacher", key=key["teacher"])] if kind == "block" else []
    return Manifest(
        key=key[name],
        kind=kind,
        settings={"epochs": 2, "optimizer": {"lr": 0.1}, "milestones": [1, 2], "init": None},
        inputs=inputs,
        data_digest=digest("data"),
        seed=seed,
        compute={"precision": "fp32", "world_size": 1, "threads": 1},
        artifact=digest("artifact", name, seed),
        digest=digest("weights", name, seed),
        metrics={"test_accuracy": accuracy + seed, "val_accuracy": accuracy - 1 + seed, "agreement": None}
        | {"macs": macs, "params": macs // 10, "macs_ratio": 1000 / macs, "params_ratio": 1000 / macs},
        history=[
            {"time": begin + epoch, "step": 11 * epoch, "epoch": epoch, "train_loss": 1 / epoch}
            for epoch in (1, 2)
        ],
        seconds=5.0,
        versions={"torch": "2"},
        machine={"cores": 2},
        git="c0ffee",
        created=begin + 5,
        interface=Interface(
            preprocessing=DataSettings(name="digits").preprocessing(), classes=tuple("0123456789")
        ),
    )


def publish(store: Store, manifest: Manifest) -> None:
    store.add_artifact(store.scratch(), manifest.artifact)
    lease = try_acquire(store.storage, manifest.key)
    assert lease is not None
    store.publish(manifest, lease)
    lease.release()


def pipeline_record(pipeline_id: str = PIPELINE, **changes: Any) -> dict[str, Any]:
    record = {"type": "pipeline", "id": pipeline_id, "name": "digits", "recipe": {"data": {"name": "digits"}}}
    record |= {"teacher": "teacher", "student": "small", "baselines": ["scratch"], "time": START}
    return record | {"stages": [name for name, *_ in STAGES]} | changes


def journal_of(store: Store, pipeline_id: str = PIPELINE) -> Journal:
    return store.journal(pipeline_id)


def record_pipeline(
    store: Store, pipeline_id: str = PIPELINE, seed: int = 0, state: str = "ran", **changes: Any
) -> None:
    journal = journal_of(store, pipeline_id)
    journal.append(pipeline_record(pipeline_id, **changes))
    for name, kind, *_ in STAGES:
        manifest = manifest_of(name, seed)
        record: dict[str, Any] = {"name": name, "key": manifest.key}
        if state == "ran":
            publish(store, manifest)
            inputs = [given.model_dump() for given in manifest.inputs]
            begun = {"type": "started", "kind": kind, "params": manifest.settings, "inputs": inputs}
            journal.append(record | begun | {"time": manifest.created - 5})
            for row in manifest.history:
                journal.append({"type": "progress", "key": manifest.key, "row": row})
        journal.append(record | {"type": "finished", "state": state, "time": manifest.created})
    for name, *_, macs in STAGES:
        latencies = {"latency_ms": macs / 100, "latency_ms_batch32": macs / 10, "latency_ms_compiled": None}
        record = {"type": "latency", "key": keys(seed)[name], "latencies": latencies, "time": START + 90}
        journal.append(record)
    journal.append({"type": "ended", "status": "finished", "time": START + 91})


def empty_database(path: Path) -> str:
    """Put an empty MLflow database at `path`, faster than MLflow can, and return its address."""
    path.write_bytes(_empty_database())
    return f"sqlite:///{path}"


@functools.cache
def _empty_database() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        connect(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return (Path(folder) / "mlflow.db").read_bytes()
