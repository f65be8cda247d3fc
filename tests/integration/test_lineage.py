"""The way back: from the student through every stage to the teacher and the data."""

from pathlib import Path

import pytest

from pbkd.errors import UserError
from pipelines.lineage import chain
from pipelines.store import Store
from pipelines.tracking import Tracker, default_uri
from tests.integration.recorded_pipeline import (
    PIPELINE,
    digest,
    empty_database,
    keys,
    manifest_of,
    record_pipeline,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "runs")
    empty_database(store.root / "mlflow" / "mlflow.db")
    record_pipeline(store)
    return store


def test_the_chain_leads_to_the_teacher_whatever_it_begins_with(store: Store) -> None:
    ids = Tracker(default_uri(store), store, PIPELINE).project()["stages"]
    key, manifest = keys()["small"], manifest_of("small")
    folder = str(store.artifact(manifest.artifact))
    for reference in (key, key[:10], manifest.artifact, manifest.digest, folder, ids[key]["run_id"]):
        rows = chain(store, reference)
        assert [row["stage"] for row in rows] == ["small", "block1", "teacher"]
    assert rows[1] == {
        "stage": "block1",
        "kind": "block",
        "key": keys()["block1"],
        "run_id": ids[keys()["block1"]]["run_id"],
        "model_id": ids[keys()["block1"]]["model_id"],
        "data_digest": digest("data"),
        "inputs": [{"role": "from", "key": keys()["teacher"]}, {"role": "teacher", "key": keys()["teacher"]}],
    }


def test_the_chain_is_the_one_mlflow_records(store: Store) -> None:
    from pipelines.tracking import connect

    Tracker(default_uri(store), store, PIPELINE).project()
    client = connect(default_uri(store))
    rows = chain(store, keys()["scratch"])
    by_hand, run = [], client.get_run(rows[0]["run_id"])
    while True:
        by_hand.append(run.info.run_id)
        sources = [given.model_id for given in run.inputs.model_inputs]
        if not sources:
            break
        run = client.get_run(str(client.get_logged_model(sources[0]).source_run_id))
    assert by_hand == [row["run_id"] for row in rows]


def test_it_needs_no_mlflow(store: Store) -> None:
    rows = chain(store, keys()["small"])
    assert [row["run_id"] for row in rows] == [None, None, None]


def test_a_run_unknown_to_the_store_is_looked_up_in_mlflow(store: Store) -> None:
    run_id = Tracker(default_uri(store), store, PIPELINE).project()["stages"][keys()["small"]]["run_id"]
    (store.pipeline(PIPELINE) / "tracking.json").unlink()
    with pytest.raises(UserError):
        chain(store, run_id)
    assert chain(store, run_id, default_uri(store))[0]["stage"] == "small"


def test_an_unknown_reference_says_what_was_looked_for(store: Store) -> None:
    with pytest.raises(UserError, match="stage key"):
        chain(store, "99" * 16, default_uri(store))
