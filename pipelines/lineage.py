"""Where a network comes from: the chain of stages from a student back to the teacher and the data."""

from collections import deque
from contextlib import nullcontext
from typing import Any

from pbkd.errors import UserError
from pipelines.manifest import Input, Manifest
from pipelines.store import Store
from pipelines.tracking import connect, database_uri, read_ids, tracking_lock

ROLES = {"from": 0, "block": 1, "teacher": 2}


def chain(store: Store, reference: str, tracking: str | None = None) -> list[dict[str, Any]]:
    """Return a row for each stage that `reference` was made from, itself first and the teacher last.

    `reference` is what `Store.find` takes, or the id of an MLflow run, which is looked for in the store's own
    records and then, if `tracking` names one, in that MLflow. A row is `{"stage", "kind", "key", "run_id",
    "model_id", "data_digest", "inputs": [{"role", "key"}]}`; ids are None if no MLflow run is known. Raises
    UserError if nothing fits.
    """
    names, ids = _recorded(store)
    rows = []
    for manifest in _walk(store, _resolve(store, reference, ids, tracking)):
        known = ids.get(manifest.key, {})
        rows.append(
            {
                "stage": names.get(manifest.key, manifest.kind),
                "kind": manifest.kind,
                "key": manifest.key,
                "run_id": known.get("run_id"),
                "model_id": known.get("model_id"),
                "data_digest": manifest.data_digest,
                "inputs": [given.model_dump() for given in manifest.inputs],
            }
        )
    return rows


def pipeline_of(store: Store, key: str) -> str | None:
    """Return the id of the latest pipeline that stage `key` is in, if the store has a journal of one."""
    for pipeline_id in store.pipelines():
        records, _ = store.journal(pipeline_id).read()
        if any(record.get("key") == key for record in records):
            return pipeline_id
    return None


def _recorded(store: Store) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return what the pipelines recorded of each key, its name and its ids; the latest has the last word."""
    names: dict[str, str] = {}
    ids: dict[str, dict[str, str]] = {}
    for pipeline_id in reversed(store.pipelines()):
        for record in store.journal(pipeline_id).read()[0]:
            if record.get("type") in ("started", "finished"):
                names[record["key"]] = record["name"]
        ids |= read_ids(store, pipeline_id).get("stages", {})
    return names, ids


def _resolve(store: Store, reference: str, ids: dict[str, dict[str, str]], tracking: str | None) -> Manifest:
    for key, known in ids.items():
        if reference == known["run_id"]:
            return store.find(key)
    try:
        return store.find(reference)
    except UserError as not_in_store:
        made = _key_of_run(store, reference, tracking) if tracking else None
        manifest = store.manifest(made) if made else None
        if manifest is None:
            raise not_in_store
        return manifest


def _key_of_run(store: Store, run_id: str, tracking: str) -> str | None:
    from mlflow.exceptions import MlflowException

    if tracking == database_uri(store) and not (store.root / "mlflow" / "mlflow.db").is_file():
        return None  # nothing was written to it yet, and looking makes none
    # Of a database that nobody can make at this moment no lock is needed, and none can be had.
    with nullcontext() if store.is_write_protected else tracking_lock(store):
        client = connect(tracking)
    try:
        tags = client.get_run(run_id).data.tags
    except MlflowException:
        return None  # MLflow has no such run, or does not answer: the caller says what was looked for
    return tags.get("pbkd.stage_key")


def _walk(store: Store, start: Manifest) -> list[Manifest]:
    """Breadth first, `from` before other roles, each stage once; the teacher, without inputs, comes last."""
    found: dict[str, Manifest] = {start.key: start}
    queue = deque([start])
    while queue:
        manifest = queue.popleft()
        for given in sorted(manifest.inputs, key=_order):
            if given.key not in found:
                source = store.manifest(given.key)
                if source is None:
                    raise UserError(
                        f"stage {manifest.key[:12]}: its input {given.key[:12]} is not in {store.location}\n"
                        "name the store that has it with --store DIR"
                    )
                found[given.key] = source
                queue.append(source)
    return sorted(found.values(), key=lambda manifest: not manifest.inputs)


def _order(given: Input) -> int:
    return ROLES.get(given.role, len(ROLES))
