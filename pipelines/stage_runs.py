"""The runs of a pipeline's stages: found or made, filled from manifests, linked to data and models."""

import json
import logging
import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.manifest import Manifest
from pipelines.mlflow_values import final_metrics, flatten, log_run
from pipelines.store import Store
from pipelines.views import headline_params

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

log = logging.getLogger(__name__)

NOT_METRICS = {"time", "step", "epoch"}
TESTED = re.compile("accuracy|nll|ece|agreement|kl|test_.*|feature_error_.*")  # metrics of the test set
DIGEST_LENGTH = 36  # what MLflow keeps of a data set's digest; the whole of it is in the run's tags


@dataclass
class StageRun:
    """A stage's run in MLflow, as far as it is known to be written."""

    run_id: str
    experiment_id: str
    status: str
    model_id: str | None = None
    params: set[str] = field(default_factory=set)
    metrics: dict[str, float] = field(default_factory=dict)
    steps: dict[str, set[int]] = field(default_factory=dict)
    has_inputs: bool = False

    @classmethod
    def of(cls, run: "Run") -> "StageRun":
        """Describe a run that was found."""
        outputs = run.outputs.model_outputs if run.outputs else []
        return cls(
            run.info.run_id,
            run.info.experiment_id,
            run.info.status,
            outputs[0].model_id if outputs else None,
            set(run.data.params),
            dict(run.data.metrics),
            has_inputs=bool(run.inputs and (run.inputs.dataset_inputs or run.inputs.model_inputs)),
        )


class StageRuns:
    """The runs of the stages of one pipeline, by stage key.

    A key has one run in the whole of an MLflow: that of the pipeline that came first; the others link it.
    """

    def __init__(
        self,
        client: "MlflowClient",
        store: Store,
        parent: "Run",
        recipe: str,
        data_name: str,
        known: dict[str, StageRun],
        is_trial: bool = False,
    ) -> None:
        """`parent` is the pipeline's run; `data_name` is what to call the data set.

        `known` are the runs of all pipelines that this process projects, which may share stages. What a stage
        measured on the test set is not written for a trial, but by the first pipeline that is none.
        """
        self._client = client
        self._store = store
        self._parent = parent
        self._recipe = recipe
        self._data_name = data_name
        self._known = known
        self._is_trial = is_trial
        self._rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.runs: dict[str, StageRun] = {}
        self.names: dict[str, str] = {}
        self.roles: dict[str, str] = {}
        children = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        for run in client.search_runs([parent.info.experiment_id], children, max_results=1000):
            key = run.data.tags["pbkd.stage_key"]
            self.runs[key] = known.setdefault(key, StageRun.of(run))

    def ids(self) -> dict[str, dict[str, str | None]]:
        """Return the ids of run and model of every stage, by key."""
        return {key: {"run_id": stage.run_id, "model_id": stage.model_id} for key, stage in self.runs.items()}

    def add_row(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row of progress until `write_rows`: a call to MLflow is slow."""
        self._rows[key].append(row)

    def start(self, key: str, kind: str, moment: int, settings: dict[str, str]) -> None:
        """See that the stage has a run, and that it is running; it may have failed in an earlier pipeline."""
        stage = self.open(key, kind, moment, settings)
        if stage.status in ("FAILED", "KILLED"):
            self._client.update_run(stage.run_id, status="RUNNING")
            stage.status = "RUNNING"

    def write_latencies(self, key: str, latencies: dict[str, float | None], moment: int) -> None:
        """Write the milliseconds measured for a stage's network, unless they are what MLflow has."""
        from mlflow.entities import Metric

        stage = self.runs.get(key)
        if stage is None:
            return
        new = {
            name: value
            for name, value in latencies.items()
            if value is not None and stage.metrics.get(name) != value
        }
        if new:
            metrics = [Metric(name, value, moment, 0, model_id=stage.model_id) for name, value in new.items()]
            log_run(self._client, stage.run_id, metrics)
            stage.metrics |= new

    def end_unfinished(self, status: str, moment: int) -> None:
        """Give `status` to the runs of stages that were running when the pipeline ended."""
        for stage in self.runs.values():
            if stage.status == "RUNNING":
                stage.status = status
                self._client.set_terminated(stage.run_id, status, moment)

    def write_rows(self) -> None:
        """Write the rows of all stages."""
        for key in list(self._rows):
            self._write_progress(key)

    def open(self, key: str, kind: str, started: int, params: dict[str, str]) -> StageRun:
        """Return the stage's run: known, found in any experiment of ours, or made, a child of the parent."""
        if key in self.runs or key in self._known:
            stage = self.runs[key] = self.runs.get(key) or self._known[key]
        elif (found := self._find(key)) is not None:
            stage = self.runs[key] = self._known[key] = StageRun.of(found)
        else:
            name = self.names.get(key, kind)
            tags = {"mlflow.parentRunId": self._parent.info.run_id, "pbkd.stage_key": key, "pbkd.kind": kind}
            tags |= {
                "pbkd.role": self.roles.get(key, "stage"),
                "mlflow.source.name": f"pbkd run {self._recipe}",
            }
            run = self._client.create_run(self._parent.info.experiment_id, started, tags, run_name=name)
            stage = self.runs[key] = self._known[key] = StageRun.of(run)
        missing = {name: value for name, value in params.items() if name not in stage.params}
        if missing:
            log_run(self._client, stage.run_id, params=missing)
            stage.params |= set(missing)
        return stage

    def complete(self, manifest: Manifest) -> StageRun:
        """Write all that the manifest says, and end the run: FINISHED, set last, means that all is there."""
        from mlflow.entities import LoggedModelOutput

        created = int(manifest.created * 1000)
        params = flatten(manifest.settings) | {"seed": str(manifest.seed)}
        params |= {f"compute.{name}": value for name, value in flatten(manifest.compute).items()}
        params |= headline_params(manifest, self.names.get(manifest.key, manifest.kind))
        known = self.runs.get(manifest.key)
        if known is not None and known.status == "FINISHED":
            self._add_tested(known, manifest)
            return known
        stage = self.open(manifest.key, manifest.kind, created - int(manifest.seconds * 1000), params)
        if stage.status == "FINISHED":
            self._add_tested(stage, manifest)
            return stage
        self._rows[manifest.key] += manifest.history
        self._write_progress(manifest.key)
        inputs = self._write_inputs(stage, manifest)
        if stage.model_id is None:
            stage.model_id = self._model(stage, manifest)
            self._client.log_outputs(stage.run_id, [LoggedModelOutput(stage.model_id, 0)])
        metrics = _metrics(manifest, with_tested=not self._is_trial) | {"seconds": manifest.seconds}
        log_run(
            self._client,
            stage.run_id,
            final_metrics(metrics, manifest, stage.model_id),
            tags=inputs | _provenance(manifest, stage),
        )
        stage.metrics |= {name: float(value) for name, value in metrics.items() if value is not None}
        self._client.set_terminated(stage.run_id, "FINISHED", created)
        stage.status = "FINISHED"
        return stage

    def _add_tested(self, stage: StageRun, manifest: Manifest) -> None:
        """Write what a trial's projection has left out."""
        if not self._is_trial and "accuracy" not in stage.metrics:
            tested = {name: value for name, value in _metrics(manifest).items() if TESTED.fullmatch(name)}
            log_run(self._client, stage.run_id, final_metrics(tested, manifest, stage.model_id))
            stage.metrics |= {name: float(value) for name, value in tested.items() if value is not None}

    def _find(self, key: str) -> "Run | None":
        experiments = self._client.search_experiments(filter_string="tags.`pbkd.experiment` = 'true'")
        ids = [experiment.experiment_id for experiment in experiments]
        # The first one made: a run keeps its parent, and all pipelines link the same one.
        found = self._client.search_runs(
            ids, f"tags.`pbkd.stage_key` = '{key}'", max_results=1, order_by=["attributes.start_time ASC"]
        )
        return found[0] if found else None

    def _write_inputs(self, stage: StageRun, manifest: Manifest) -> dict[str, str]:
        """Link the data set and the models the stage was made from; return tags that say each one's role."""
        from mlflow.entities import LoggedModelInput

        tags: dict[str, list[str]] = defaultdict(list)
        models: list[LoggedModelInput] = []
        for given in manifest.inputs:
            source = self.runs.get(given.key)
            if source is None or source.model_id is None:
                before = self._store.manifest(given.key)
                if before is None:
                    log.warning("stage %s: the manifest of its input is gone: not linked", manifest.key[:12])
                    continue
                source = self.complete(before)
            if source.model_id not in [model.model_id for model in models]:
                models.append(LoggedModelInput(str(source.model_id)))
            tags[f"pbkd.input.{given.role}"].append(str(source.model_id))
            if given.role == "from":
                tags["pbkd.parent_run"].append(source.run_id)
        datasets = self.datasets(manifest)
        if not stage.has_inputs and (datasets or models):
            self._client.log_inputs(stage.run_id, datasets, models)
            stage.has_inputs = True
        return {name: ", ".join(values) for name, values in tags.items()}

    def datasets(self, manifest: Manifest) -> list["DatasetInput"]:
        """Return the data a stage was made with as an input of a run, if they are known."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        if not manifest.data_digest:
            return []
        source = json.dumps({"sha256": manifest.data_digest})
        dataset = Dataset(self._data_name, manifest.data_digest[:DIGEST_LENGTH], "pbkd", source)
        return [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]

    def _model(self, stage: StageRun, manifest: Manifest) -> str:
        name = self.names.get(manifest.key, manifest.kind)
        found = self._client.search_logged_models(
            [stage.experiment_id], f"tags.`pbkd.stage_key` = '{manifest.key}'", max_results=1
        )
        if found:
            return str(found[0].model_id)
        model = self._client.create_logged_model(
            stage.experiment_id,
            name=name.replace(".", "-"),  # MLflow allows no dot here
            source_run_id=stage.run_id,
            tags={
                "mlflow.model.isExternal": "true",
                "pbkd.artifact": self._store.artifact_location(manifest.artifact),
                "pbkd.stage_key": manifest.key,
                "pbkd.weights_digest": manifest.digest,
                "pbkd.kind": manifest.kind,
            },
            params=headline_params(manifest, name),
            model_type="network",
        )
        self._client.finalize_logged_model(model.model_id, "READY")
        return str(model.model_id)

    def _write_progress(self, key: str) -> None:
        """Write the rows gathered for a stage; of two of one step, as after a resumption, the first stays."""
        from mlflow.entities import Metric

        stage, metrics = self.runs.get(key), []
        for row in self._rows.pop(key, []):
            if stage is None or stage.status == "FINISHED":
                return
            step, moment = int(row["step"]), int(float(row["time"]) * 1000)
            # Accuracy first: the compare page begins with the first metric that all its runs have.
            for name, value in sorted(row.items(), key=lambda item: "accuracy" not in item[0]):
                if name in NOT_METRICS or not isinstance(value, int | float):
                    continue
                if name not in stage.steps:
                    found = name in stage.metrics
                    history = self._client.get_metric_history(stage.run_id, name) if found else []
                    stage.steps[name] = {metric.step for metric in history}
                if step not in stage.steps[name]:
                    stage.steps[name].add(step)
                    metrics.append(Metric(name, float(value), moment, step))
        if stage is not None and metrics:
            log_run(self._client, stage.run_id, metrics)


def _metrics(manifest: Manifest, with_tested: bool = True) -> dict[str, float | int | None]:
    """Metrics of a stage, accuracy first."""
    metrics = {"accuracy": manifest.metrics.get("test_accuracy")} | manifest.metrics
    return {name: value for name, value in metrics.items() if with_tested or not TESTED.fullmatch(name)}


def _provenance(manifest: Manifest, stage: StageRun) -> dict[str, str]:
    tags = {
        "pbkd.artifact": manifest.artifact,
        "pbkd.weights_digest": manifest.digest,
        "pbkd.data_digest": manifest.data_digest or "",
        "pbkd.model": str(stage.model_id),
        "pbkd.versions": json.dumps(manifest.versions),
        "pbkd.machine": json.dumps(manifest.machine),
    }
    return tags | ({"mlflow.source.git.commit": manifest.git} if manifest.git else {})
