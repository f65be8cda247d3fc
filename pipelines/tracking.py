"""Fills MLflow from a pipeline's journal, in the background: what fails can be repeated from the journal."""

import json
import logging
import os
import threading
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pbkd.errors import StageError
from pbkd.storage import Folder, Storage
from pipelines.projection import Projection
from pipelines.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
IDS = "tracking.json"
LONGEST_PAUSE_SECONDS = 60.0
# A dead server is to cost seconds, not the minutes of MLflow's own settings; what the user set stands.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def default_uri(store: Store) -> str:
    """Return the database in the store, which is used unless the recipe names a server."""
    return f"sqlite:///{store.root / 'mlflow' / 'mlflow.db'}"


def tracking_lock(store: Store) -> FileLock:
    """Return the lock for writing to MLflow: two would race to make the database, or the run of one stage."""
    return FileLock(store.root / "mlflow" / "tracking.lock")


def connect(uri: str) -> "MlflowClient":
    """Return a client. A sqlite database is made by this, so it is called with `tracking_lock` held."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it announces every new database
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def read_ids(store: Store, pipeline_id: str) -> dict[str, Any]:
    """Return `{"uri", "experiment_id", "pipeline_run", "stages": {KEY: {"run_id", "model_id"}}}` or {}."""
    for place in (_here(store, pipeline_id), store.records(pipeline_id)):
        try:
            ids: dict[str, Any] = json.loads(place.read(IDS))
        except FileNotFoundError:
            continue
        return ids
    return {}


def _here(store: Store, pipeline_id: str) -> Storage:
    return Folder(store.pipeline(pipeline_id))


def _write_ids(store: Store, pipeline_id: str, ids: dict[str, Any]) -> None:
    """Keep the ids on this machine and, if others can reach that MLflow too, in the store."""
    places = [_here(store, pipeline_id)]
    if not ids["uri"].startswith("sqlite:"):
        places.append(store.records(pipeline_id))
    for place in {place.location(): place for place in places}.values():  # of a folder both are one
        place.replace(IDS, json.dumps(ids, indent=1).encode())


class Tracker:
    """Projects one pipeline's journal to the MLflow at `uri`.

    Training never waits for it nor fails by it: a failure is logged once, with the cure, and tried again.
    """

    def __init__(self, uri: str, store: Store, pipeline_id: str) -> None:
        """Prepare; nothing is imported, connected to or made before `start` or `project`."""
        self.uri = uri
        self._store = store
        self._id = pipeline_id
        self._journal = store.journal(pipeline_id)
        self._projection: Projection | None = None
        self._offset = 0
        self._has_failed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pbkd-tracker", daemon=True)

    def project(self) -> dict[str, Any]:
        """Write what is new in the journal now, in this thread; return the ids. Raises what MLflow raises."""
        with tracking_lock(self._store):
            try:
                if self._projection is None:
                    location = None
                    if self.uri.startswith("sqlite:"):
                        location = (self._store.root / "mlflow" / "artifacts").as_uri()
                    self._projection, self._offset = Projection(connect(self.uri), self._store, location), 0
                records, offset = self._journal.read(self._offset)
                if records:
                    self._projection.apply(records)
                    self._offset = offset
                    ids = {"uri": self.uri} | self._projection.ids()
                    _write_ids(self._store, self._id, ids)
            except BaseException:
                self._projection = None  # what it had written is unknown: the next one looks everything up
                raise
        return read_ids(self._store, self._id)

    def start(self) -> None:
        """Begin to project in the background, as the journal grows."""
        self._thread.start()

    def close(self, timeout: float = 30.0) -> bool:
        """Write the rest of the journal and end the thread; False if `timeout` seconds were not enough."""
        self._closing.set()
        self._thread.join(timeout)
        is_complete = not self._thread.is_alive() and not self._has_failed
        if not is_complete:
            log.warning(
                "MLflow at %s does not have all of this run yet: `pbkd ui` or the next run completes it",
                self.uri,
            )
        return is_complete

    def _run(self) -> None:
        pause = POLL_SECONDS
        while True:
            is_last = self._closing.is_set()  # asked before reading, so that the last reading sees all
            try:
                self.project()
                self._has_failed, pause = False, POLL_SECONDS
            except Exception as error:  # whatever it is, training goes on
                if not self._has_failed:
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    log.warning(
                        "MLflow at %s cannot be written: %s\ntraining goes on; check tracking.uri "
                        "and the server: what is missing is written when it answers, or by the next run",
                        self.uri,
                        reason,
                    )
                    log.debug("the failure", exc_info=True)
                self._has_failed, pause = True, min(2 * pause, LONGEST_PAUSE_SECONDS)
            if is_last:
                return
            self._closing.wait(pause)


def replay(uri: str, store: Store) -> list[str]:
    """Write every pipeline of the store that MLflow, which may be new or wiped, does not have in full.

    Returns the ids of those written. Raises StageError if MLflow cannot be written.
    """
    try:
        with tracking_lock(store):
            client = connect(uri)
            experiments = client.search_experiments(filter_string="tags.`pbkd.experiment` = 'true'")
            ids = [experiment.experiment_id for experiment in experiments]
            runs = client.search_runs(ids, "tags.`pbkd.role` = 'pipeline'", max_results=1000) if ids else []
        complete = {run.data.tags["pbkd.pipeline"] for run in runs if run.info.status != "RUNNING"}
        missing = [name for name in reversed(store.pipelines()) if name not in complete]
        for pipeline_id in missing:
            Tracker(uri, store, pipeline_id).project()
    except Exception as error:  # MLflow, requests and sqlalchemy have no common base
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise StageError(
            f"MLflow at {uri} cannot be written: {reason}\ncheck the address and the server"
        ) from error
    return missing
