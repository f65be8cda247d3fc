"""A search's journal, written to MLflow: the parent of its trials' runs, and a view of them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pbkd.storage import Storage
from pipelines.journal import Record
from pipelines.mlflow_values import flatten, log_run
from pipelines.projection import REPORTED, RUN_STATUS, experiment, log_report, search_run
from pipelines.views import search_view

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


class SearchProjection:
    """Writes the records of one search; writing them again changes nothing."""

    def __init__(self, client: "MlflowClient", records: Storage, artifact_location: str | None) -> None:
        """`artifact_location` is for a new experiment; None lets the server choose."""
        self._client = client
        self._records = records
        self._artifact_location = artifact_location
        self._run: Run | None = None
        self._outcomes: dict[int, str] = {}
        self._reported: str | None = None

    def apply(self, records: Iterable[Record]) -> None:
        """Write `records`."""
        for record in records:
            match record.get("type"):
                case "search":
                    self._begin(record)
                case "result":
                    self._outcomes[record["number"]] = record["outcome"]
                case "ended" if self._run is not None:
                    self._end(record)
                case "page" if self._run is not None and self._reported != record["digest"]:
                    if log_report(self._client, self._run.info.run_id, self._records, record):
                        self._reported = record["digest"]

    def ids(self) -> dict[str, Any]:
        """Return what `tracking.json` keeps."""
        if self._run is None:
            return {}
        return {"search_run": self._run.info.run_id, "experiment_id": self._run.info.experiment_id}

    def _begin(self, record: Record) -> None:
        told = record["description"]
        experiment_id = experiment(self._client, told["recipe"]["name"], self._artifact_location)
        moment = int(float(record["time"]) * 1000)
        self._run = search_run(self._client, experiment_id, record["name"], moment)
        self._reported = self._run.data.tags.get(REPORTED)
        self._client.update_run(self._run.info.run_id, status="RUNNING")
        facts = {name: told[name] for name in ("space", "sampler", "seed", "objective")}
        facts |= {f"space.{key}": values for key, values in told["parameters"].items()}
        known = self._run.data.params
        params = {name: value for name, value in flatten(facts).items() if name not in known}
        log_run(self._client, self._run.info.run_id, params=params)
        tag, view = search_view(record["name"], list(told["parameters"]))
        self._client.set_experiment_tag(experiment_id, tag, view)

    def _end(self, record: Record) -> None:
        from mlflow.entities import Metric

        assert self._run is not None, "it was begun"
        moment, found = int(float(record["time"]) * 1000), list(self._outcomes.values())
        counts = {f"trials_{outcome}": found.count(outcome) for outcome in set(found)}
        metrics = [Metric(name, float(count), moment, 0) for name, count in counts.items()]
        log_run(self._client, self._run.info.run_id, metrics)
        self._client.set_terminated(self._run.info.run_id, RUN_STATUS[record["status"]], moment)
