"""A trial, as Ray Tune runs it: a pipeline in this process, which stays warm for the next trial."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pipelines.seldom_collected  # noqa: F401 - before torch, in Ray's processes too
from pbkd.data import Identity
from pbkd.errors import StageError, UserError
from pbkd.stages.base import TrainingStage
from pbkd.storage import user_cache
from pipelines.driver import Driver, Outcome
from pipelines.executors import Executor, InProcessExecutor, LocalExecutor
from pipelines.graph import Graph, Node, build_graph, pipeline_id
from pipelines.jobs import Job
from pipelines.latency import Latencies
from pipelines.manifest import Manifest
from pipelines.recipe_file import load_recipe
from pipelines.store import Store
from tune_spaces.objective import Objective
from tune_spaces.quiet import Quiet
from tune_spaces.record import pipeline_of, reached

STOP = "stop"
"""A file in the search's folder: its trials are to keep their state and end."""


class OverLimit(KeyboardInterrupt):
    """The student is known to break a limit: what is left of its trial is not worth running."""


def run_trial(config: dict[str, Any]) -> None:
    """Run trial `number` of `search` in `store`; reports how it does and, as `result`, how it ended.

    A mistake in it, or a failure of a stage, is its result: another attempt would not mend it.
    """
    from ray import tune

    begun = time.monotonic()
    store, search, number = Store(config["store"]), str(config["search"]), int(config["number"])
    identity = pipeline_of(search, number)
    recipe = load_recipe(store.recipe(identity))
    recipe = recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"fuse": True})})
    graph = build_graph(recipe, store, user_cache(), Identity(**config["identity"]))
    objective, quiet = Objective.model_validate(config["objective"]), Quiet()
    signs = store.search_records(search)
    watcher = Watcher(graph, config["touched"], objective, store)
    executor = _QuietExecutor(recipe_executor(graph), quiet)
    result: dict[str, Any] = {}
    try:
        driver = Driver(graph, store, store.journal(identity), watcher)
        driver.begin(
            id=identity,
            pipeline=pipeline_id(graph),
            trial={"search": search, "number": number, "params": config["params"]},
        )
        watcher.begin()
        driver.run(executor, lambda: STOP in signs.names())
        student = driver.manifests[graph.student]
        result = {"outcome": "finished", "values": _values(student), "digest": student.digest}
        if objective.wants_latency:
            latencies = Latencies(store, recipe.compute)
            quiet.measure(latencies, [student])
            result["values"]["latency_ms"] = latencies.of(student)["latency_ms"]
        if objective.excess(result["values"]):
            result["outcome"] = "over"
    except OverLimit:
        result = {"outcome": "over", "values": {"macs": watcher.macs}}
    except (UserError, StageError) as error:
        result = {"outcome": "failed", "message": str(error)}
    own = [watcher.manifests[name].seconds for name, how in watcher.outcomes.items() if how == "ran"]
    tune.report(
        {
            "progress": watcher.progress_made,
            "result": json.dumps(
                result
                | {
                    "stages": {name: node.key for name, node in graph.nodes.items()},
                    "ran": reached(store, search, number)[1],
                    "seconds": time.monotonic() - begun,
                    "own_seconds": sum(own),
                }
            ),
        }
    )


def recipe_executor(graph: Graph) -> Executor:
    """This process, where a stage has one worker; else processes of this machine."""
    compute = graph.recipe.compute
    return InProcessExecutor() if compute.workers == 1 else LocalExecutor(compute)


def _values(student: Manifest) -> dict[str, float | None]:
    """What a search may judge by: nothing of the test set."""
    names = ("val_accuracy", "macs", "params", "macs_ratio", "params_ratio")
    return {name: student.metrics.get(name) for name in names}


class _QuietExecutor:
    """Another executor, whose jobs let latencies be measured alone."""

    def __init__(self, executor: Executor, quiet: Quiet) -> None:
        self.concurrency = 1
        self._executor, self._quiet = executor, quiet

    def run(self, job: Job, name: str) -> None:
        with self._quiet.together():
            self._executor.run(job, name)

    def close(self) -> None:
        self._executor.close()


@dataclass
class Watcher:
    """Tells Ray Tune how a trial does, and ends it when the student is known to break a limit.

    Attributes:
        touched: stages that differ between trials, each with the progress that it is worth.
        untold: what is still to be reported.
    """

    graph: Graph
    touched: Mapping[str, float]
    objective: Objective
    store: Store
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    progress_made: float = 0.0
    macs: int | None = None
    is_begun: bool = False
    untold: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        cost = self.graph.nodes[self.graph.student].cost
        self.macs = None if cost is None else cost.macs

    def begin(self) -> None:
        """Tell of the stages that were here already: only now, with the beginning on record, may it end."""
        self.is_begun = True
        self._tell()
        self._check_limit()

    def started(self, node: Node) -> None:
        """Nothing is to be told."""

    def progress(self, node: Node, row: Mapping[str, Any]) -> None:
        """Report the validation accuracy after an epoch."""
        stage = node.stage
        if node.name in self.touched and isinstance(stage, TrainingStage) and "val_accuracy" in row:
            share = row["step"] / stage.steps if stage.steps else row["epoch"] / (stage.epochs or 1)
            if share < 1:  # else it comes with the stage
                self._report(self._done() + share * self.touched[node.name], row["val_accuracy"])

    def finished(self, node: Node, outcome: Outcome, manifest: Manifest) -> None:
        """Report the validation accuracy after a stage; of one that another ran, after its epochs too."""
        for row in manifest.history:
            self.progress(node, row)
        self.outcomes[node.name], self.manifests[node.name] = outcome, manifest
        if node.name in self.touched and node.name != self.graph.student:  # then there is nothing to stop
            self._report(self._done(), manifest.metrics.get("val_accuracy"))
        self._check_limit()

    def _check_limit(self) -> None:
        if self.is_begun and self.macs is None and self.objective.max_macs is not None:
            graph = build_graph(self.graph.recipe, self.store, user_cache(), self.graph.identity)
            cost = graph.nodes[graph.student].cost
            self.macs = None if cost is None else cost.macs
            if self.objective.excess({"macs": self.macs}) and graph.student not in self.manifests:
                raise OverLimit

    def _done(self) -> float:
        return float(sum(worth for name, worth in self.touched.items() if name in self.outcomes))

    def _report(self, progress: float, accuracy: float | None) -> None:
        # A stage that was here already has its place in the order too: ASHA wants progress to grow.
        if accuracy is not None and progress > self.progress_made:
            self.progress_made = progress
            self.untold.append({"progress": progress, "val_accuracy": accuracy})
        self._tell()

    def _tell(self) -> None:
        from ray import tune

        while self.is_begun and self.untold:
            tune.report(self.untold.pop(0))
