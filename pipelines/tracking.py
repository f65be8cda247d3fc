"""Fills MLflow from journals, in the background: what fails can be repeated from them."""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pbkd.errors import StageError, UserError, first_line
from pbkd.storage import Folder, Storage
from pipelines.journal import Journal, latest_report, report_files
from pipelines.lease import held
from pipelines.projection import REPORTED, Projection
from pipelines.recipe import without_secrets
from pipelines.search_projection import SearchProjection
from pipelines.stage_runs import StageRun
from pipelines.store import Store

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
IDS = "tracking.json"
LONGEST_PAUSE_SECONDS = 60.0
REST_SECONDS = 30.0
# A dead server is to cost seconds, not the minutes of MLflow's own settings; what the user set stands.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def default_uri(store: Store) -> str:
    """Return where MLflow is unless recipe or command say it: `MLFLOW_TRACKING_URI`, else in the store."""
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        try:
            return without_secrets(given)
        except UserError as error:
            raise UserError(f"MLFLOW_TRACKING_URI: {error}") from None
    return database_uri(store)


def database_uri(store: Store) -> str:
    """Return the address of the database in the store."""
    return f"sqlite:///{store.root / 'mlflow' / 'mlflow.db'}"


@contextmanager
def tracking_lock(store: Store) -> Iterator[None]:
    """Let nobody else write to MLflow: two would race to make the database, or the run of one stage."""
    with FileLock(store.root / "mlflow" / "tracking.lock"):
        if isinstance(store.storage, Folder):
            yield  # whoever sees the folder sees the lock
            return
        with held(store.storage.below("mlflow"), "tracking"):
            yield


def connect(uri: str) -> "MlflowClient":
    """Return a client. A sqlite database is made by this, so it is called with `tracking_lock` held."""
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it announces every new database
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def read_ids(store: Store, pipeline_id: str) -> dict[str, Any]:
    """Return `{"uri", "experiment_id", "pipeline_run", "stages": {KEY: {"run_id", "model_id"}}}` or {}."""
    return _read_ids(_places(store, pipeline_id))


def _places(store: Store, pipeline_id: str) -> list[Storage]:
    """Where a pipeline's ids are kept: on this machine, and in the store."""
    return [Folder(store.pipeline(pipeline_id)), store.records(pipeline_id)]


def _read_ids(places: list[Storage]) -> dict[str, Any]:
    for place in places:
        try:
            ids = json.loads(place.read(IDS))
        except FileNotFoundError:
            continue
        except ValueError:
            ids = None
        if isinstance(ids, dict):
            return ids
        log.warning("%s: is damaged: the next run of the pipeline makes it anew", place.location(IDS))
    return {}


def _write_ids(places: list[Storage], ids: dict[str, Any]) -> None:
    """Keep the ids on this machine and, if others can reach that MLflow too, in the store."""
    reached = places[:1] if ids["uri"].startswith("sqlite:") else places
    for place in {place.location(): place for place in reached}.values():  # of a folder both are one
        place.replace(IDS, json.dumps(ids, indent=1).encode())


@dataclass
class _Followed:
    """A journal that is projected, as far as that has got.

    Attributes:
        places: this machine's folder, and where the journal is.
    """

    places: list[Storage]
    is_search: bool = False
    projection: Projection | SearchProjection | None = None
    offset: int = 0

    def has_news(self) -> bool:
        """Whether there is anything to write, as far as it is known."""
        return self.projection is None or bool(Journal(self.places[-1]).read(self.offset)[0])


class Tracker:
    """Projects one pipeline's journal, or a search's and its trials', to the MLflow at `uri`.

    Training never waits for it nor fails by it: a failure is logged once, with the cure, and tried again.
    """

    def __init__(
        self,
        uri: str,
        store: Store,
        pipeline_id: str | None = None,
        search: str | None = None,
        while_writing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Prepare; nothing is imported, connected to or made before `start` or `project`.

        `while_writing` is entered for as long as something is written.
        """
        self.uri, self._while_writing = uri, while_writing
        self._store = store
        self._followed: list[_Followed] = []
        self._known: dict[str, StageRun] = {}
        if search is not None:
            places = [Folder(store.search(search)), store.search_records(search)]
            self._followed.append(_Followed(places, is_search=True))
        if pipeline_id is not None:
            self.follow(pipeline_id)
        self._has_failed = False
        self._closing = threading.Event()
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="pbkd-tracker", daemon=True)

    def follow(self, pipeline_id: str) -> None:
        """Project this pipeline's journal too."""
        self._followed.append(_Followed(_places(self._store, pipeline_id)))

    def project(self) -> dict[str, Any]:
        """Write what is new in the journals now, in this thread. Raises what MLflow raises.

        Returns the ids of the first.
        """
        if news := [followed for followed in self._followed if followed.has_news()]:
            with tracking_lock(self._store), self._while_writing():
                for followed in news:
                    try:
                        self._project(followed)
                    except BaseException:
                        followed.projection = None  # what it has written is unknown: the next looks it up
                        self._known.clear()
                        raise
        return _read_ids(self._followed[0].places)

    def _project(self, followed: _Followed) -> None:
        if followed.projection is None:
            location = None
            if self.uri.startswith("sqlite:"):
                location = (self._store.root / "mlflow" / "artifacts").as_uri()
            client, followed.offset = connect(self.uri), 0
            followed.projection = (
                SearchProjection(client, followed.places[-1], location)
                if followed.is_search
                else Projection(client, self._store, location, self._known)
            )
        records, offset = Journal(followed.places[-1]).read(followed.offset)
        if records:
            followed.projection.apply(records)
            followed.offset = offset
            ids = {"uri": self.uri} | followed.projection.ids()
            _write_ids(followed.places, ids)

    def start(self) -> None:
        """Begin to project in the background, as the journal grows."""
        self._thread.start()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Write nothing meanwhile: it would cost whatever is timed in this process.

        Waits for what is being written, but not for an MLflow that does not answer.
        """
        is_resting = self._writing.acquire(timeout=REST_SECONDS)
        try:
            yield
        finally:
            if is_resting:
                self._writing.release()

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
                with self._writing:
                    self.project()
                self._has_failed, pause = False, POLL_SECONDS
            except Exception as error:  # whatever it is, training goes on
                if not self._has_failed:
                    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                    log.warning(
                        "MLflow at %s cannot be written: %s\ntraining goes on; check tracking.uri, "
                        "MLFLOW_TRACKING_URI and the server: what is missing is written when it answers, "
                        "or by the next run",
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
            runs = [
                run
                for role in ("pipeline", "trial", "search")
                for run in (
                    client.search_runs(ids, f"tags.`pbkd.role` = '{role}'", max_results=1000) if ids else []
                )
            ]
        ended = [run.data.tags for run in runs if run.info.status != "RUNNING"]
        reported = {tags.get("pbkd.pipeline"): tags.get(REPORTED) for tags in ended}
        searched = {
            tags.get("pbkd.search"): tags.get(REPORTED) for tags in ended if "pbkd.pipeline" not in tags
        }
        for name in store.searches():
            records = store.search_records(name)
            if name not in searched or _report_digest(records, "page") not in (None, searched[name]):
                Tracker(uri, store, search=name).project()
        missing = [
            name
            for name in reversed(store.pipelines())
            if name not in reported
            or _report_digest(store.records(name), "report") not in (None, reported[name])
        ]
        for pipeline_id in missing:
            Tracker(uri, store, pipeline_id).project()
    except Exception as error:  # MLflow, requests and sqlalchemy have no common base
        raise StageError(
            f"MLflow at {uri} cannot be written: {first_line(error)}\ncheck the address and the server"
        ) from error
    return missing


def _report_digest(there: Storage, kind: str) -> str | None:
    """Of the latest report that was made of a pipeline, or a search, if it is still in the store."""
    latest = latest_report(Journal(there), kind)
    try:
        is_there = latest is not None and report_files(latest)[0] in there.names()
    except UserError:
        return None
    return str(latest["digest"]) if latest is not None and is_there else None
