"""One pipeline's journal, written to MLflow: its run, its stages' runs, the registry.

Everything is looked up before it is made: writing a journal again, from its beginning, changes nothing.
"""

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbkd.errors import UserError
from pbkd.storage import Storage
from pipelines.journal import Record, report_files
from pipelines.manifest import Manifest
from pipelines.mlflow_values import final_metrics, flatten, log_run
from pipelines.registry import register
from pipelines.stage_runs import StageRun, StageRuns
from pipelines.store import Store
from pipelines.views import EXPERIMENT_TAGS, HEADLINE, headline_params

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

REPORTED = "pbkd.report"  # tag: the digest of the report that a pipeline's run has
RUN_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class Projection:
    """Writes the records of one pipeline in their order. After a failure it is dropped for a new one."""

    def __init__(
        self,
        client: "MlflowClient",
        store: Store,
        artifact_location: str | None,
        known: dict[str, StageRun],
    ) -> None:
        """`artifact_location` is for a new experiment, or the server chooses; `known`: see `StageRuns`."""
        self._client = client
        self._store = store
        self._artifact_location = artifact_location
        self._known = known
        self._pipeline: Record = {}
        self._trial: Record | None = None
        self._stages: StageRuns
        self._run: Run
        self._own: StageRun
        self._reported: str | None = None

    def apply(self, records: Sequence[Record]) -> None:
        """Write `records`; progress is gathered, calls to MLflow being slow."""
        for record in records:
            kind = record.get("type")
            if kind == "pipeline":
                self._begin(record)
            elif not self._pipeline:
                log.warning("the journal does not begin with its pipeline: skipped %s", kind)
            elif kind == "started":
                self._started(record)
            elif kind == "progress":
                self._stages.add_row(record["key"], record["row"])
            elif kind == "finished":
                self._finished(record)
            elif kind == "latency":
                self._latency(record)
            elif kind == "ended":
                self._ended(record)
        reports = [record for record in records if record.get("type") == "report"]
        if self._pipeline:
            self._stages.write_rows()
            if reports:
                self._report(reports[-1])  # the files of those before it are overwritten

    def ids(self) -> dict[str, Any]:
        """Return what `tracking.json` keeps, for those who look a run up without MLflow."""
        if not self._pipeline:
            return {"stages": {}}
        info = self._run.info
        return {
            "pipeline_run": info.run_id,
            "experiment_id": info.experiment_id,
            "stages": self._stages.ids(),
        }

    def _begin(self, record: Record) -> None:
        experiment_id = experiment(self._client, record["name"], self._artifact_location)
        self._trial = record.get("trial")
        found = self._client.search_runs(
            [experiment_id], f"tags.`pbkd.pipeline` = '{record['id']}'", max_results=1
        )
        if found:
            self._run = found[0]
        else:
            tags = {
                "pbkd.pipeline": record["id"],
                "pbkd.role": "pipeline",
                "pbkd.store": self._store.location,
                "mlflow.source.name": f"pbkd run {record['name']}",
            }
            name = f"{record['name']} {record['id'][:8]}"
            if self._trial is not None:
                search = self._trial["search"]
                parent = search_run(self._client, experiment_id, search, _milliseconds(record))
                tags |= {"pbkd.role": "trial", "pbkd.search": search}
                tags |= {"mlflow.parentRunId": parent.info.run_id}
                name = f"trial {self._trial['number']}"
            self._run = self._client.create_run(experiment_id, _milliseconds(record), tags, name)
        self._own, self._reported = StageRun.of(self._run), self._run.data.tags.get(REPORTED)
        facts = {name: record.get(name) for name in ("teacher", "student", "baselines")}
        if self._trial is not None:  # the searched keys alone: they are what its runs are compared by
            facts = {key: value for key, value in self._trial["params"].items() if value is not None}
        log_run(self._client, self._run.info.run_id, params={"recipe": record["name"]} | flatten(facts))
        data = (record.get("recipe") or {}).get("data") or {}
        self._stages = StageRuns(
            self._client,
            self._store,
            self._run,
            record["name"],
            str(data.get("name", "data")),
            self._known,
            is_trial=self._trial is not None,
        )
        self._pipeline = record

    def _started(self, record: Record) -> None:
        self._name(record)
        settings = flatten(record.get("params") or {})
        self._stages.start(record["key"], record["kind"], _milliseconds(record), settings)

    def _finished(self, record: Record) -> None:
        role = self._name(record)
        manifest = self._store.manifest(record["key"])
        if manifest is None:
            log.warning("stage %s is finished but its manifest is gone: left out of MLflow", record["name"])
            return
        stage, run_id = self._stages.complete(manifest), self._run.info.run_id
        metrics, params = {}, {}
        if self._trial is not None:  # its measures come with its end; test accuracy is for winners
            pass
        elif role == "student":
            metrics = {name: manifest.metrics.get(name) for name in HEADLINE}
            metrics["accuracy"] = manifest.metrics.get("test_accuracy")
            params = headline_params(manifest, record["name"])
        elif role == "teacher":
            metrics = {"teacher_accuracy": manifest.metrics.get("test_accuracy")}
        tags = {f"pbkd.stage.{record['name']}": stage.run_id}
        log_run(self._client, run_id, final_metrics(metrics, manifest), params, tags)
        self._link(role, manifest, stage)
        if role in ("student", "baseline") and self._trial is None:
            assert stage.model_id is not None, "a complete stage has a model"
            register(
                self._client,
                self._store,
                self._pipeline["name"],
                record["name"],
                role,
                manifest,
                stage.run_id,
                stage.model_id,
            )

    def _link(self, role: str, manifest: Manifest, stage: StageRun) -> None:
        """Show on the pipeline's own page what it began with and what came of it: the data, the student."""
        from mlflow.entities import LoggedModelOutput

        if role == "teacher" and not self._own.has_inputs and (datasets := self._stages.datasets(manifest)):
            self._client.log_inputs(self._own.run_id, datasets)
            self._own.has_inputs = True
        if role == "student" and self._own.model_id is None:
            self._client.log_outputs(self._own.run_id, [LoggedModelOutput(str(stage.model_id), 0)])
            self._own.model_id = stage.model_id

    def _latency(self, record: Record) -> None:
        self._stages.write_latencies(record["key"], record.get("latencies") or {}, _milliseconds(record))

    def _ended(self, record: Record) -> None:
        from mlflow.entities import Metric

        status = RUN_STATUS[record["status"]]
        self._stages.write_rows()
        if self._trial is not None:
            values = {
                name: value for name, value in (record.get("values") or {}).items() if value is not None
            }
            moment = _milliseconds(record)
            metrics = [Metric(name, float(value), moment, 0) for name, value in values.items()]
            tags = {"pbkd.outcome": record["outcome"]} if "outcome" in record else {}
            log_run(self._client, self._run.info.run_id, metrics, tags=tags)
        self._stages.end_unfinished("FAILED" if status == "FAILED" else "KILLED", _milliseconds(record))
        self._client.set_terminated(self._run.info.run_id, status, _milliseconds(record))

    def _report(self, record: Record) -> None:
        """Give the pipeline's run its report, unless it has it."""
        records = self._store.records(self._pipeline["id"])
        if self._reported != record["digest"] and log_report(
            self._client, self._run.info.run_id, records, record
        ):
            self._reported = record["digest"]

    def _name(self, record: Record) -> str:
        """Tell the stages what the recipe calls a key; return the part it plays there."""
        name, key = record["name"], record["key"]
        if name == self._pipeline.get("student"):
            role = "student"
        elif name == self._pipeline.get("teacher"):
            role = "teacher"
        else:
            role = "baseline" if name in (self._pipeline.get("baselines") or []) else "stage"
        self._stages.names[key], self._stages.roles[key] = name, role
        return role


def log_report(client: "MlflowClient", run_id: str, records: Storage, record: Record) -> bool:
    """Give a run its report, whose files lie in `records`, and its description; False if it cannot be."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in report_files(record):
                copy = Path(folder, name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(records.read(name))
            client.log_artifacts(run_id, folder)
        except UserError as error:
            log.warning("the report is left out of MLflow: %s", error)
            return False
        except FileNotFoundError as error:
            log.warning("the report is left out of MLflow: %s is gone", error.filename)
            return False
        except PermissionError as error:  # a server whose artifacts lie where only it can write
            log.warning("the report is left out of MLflow: its artifacts cannot be written: %s", error)
            return False
    log_run(client, run_id, tags={"mlflow.note.content": record["summary"], REPORTED: record["digest"]})
    return True


def experiment(client: "MlflowClient", name: str, artifact_location: str | None) -> str:
    """Return the id of a recipe's experiment, made with its saved views if need be."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name, artifact_location, EXPERIMENT_TAGS)
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another node was faster
            if found is None:
                raise error
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    for tag, value in EXPERIMENT_TAGS.items():
        if tag not in found.tags:
            client.set_experiment_tag(found.experiment_id, tag, value)
    return str(found.experiment_id)


def search_run(client: "MlflowClient", experiment_id: str, search: str, moment: int) -> "Run":
    """Return the run of a search, the parent of its trials' runs; made if need be."""
    mine = f"tags.`pbkd.search` = '{search}' AND tags.`pbkd.role` = 'search'"
    found = client.search_runs([experiment_id], mine, max_results=1)
    if found:
        return found[0]
    tags = {"pbkd.search": search, "pbkd.role": "search", "mlflow.source.name": f"pbkd tune {search}"}
    return client.create_run(experiment_id, moment, tags, f"search {search}")


def _milliseconds(record: Record) -> int:
    return int(float(record["time"]) * 1000)
