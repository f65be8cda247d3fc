"""Run a pipeline: its unfinished stages, each once; store, journal and MLflow are complete at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from pbkd import artifact
from pbkd.measure import measure_latency
from pipelines.driver import Display, Driver, Outcome
from pipelines.durable import replace
from pipelines.executors import Executor, open_executor
from pipelines.graph import Graph, finished, pipeline_id, require_keys
from pipelines.jobs import processor, versions
from pipelines.journal import Journal
from pipelines.store import Manifest, Store
from pipelines.tracking import Tracker, default_uri, read_ids

MLFLOW_SECONDS = 60.0
MLFLOW_SECONDS_WHEN_STOPPED = 10.0


@dataclass
class PipelineResult:
    """What a run leaves: manifests, outcomes and latencies (milliseconds) by stage name; ids in MLflow."""

    graph: Graph
    store: Store
    manifests: dict[str, Manifest]
    outcomes: dict[str, Outcome]
    latencies: dict[str, float]
    seconds: float
    ids: dict[str, Any]


def run_pipeline(graph: Graph, store: Store, display: Display) -> PipelineResult:
    """Run what is not finished. Of a run that finds everything finished and recorded, nothing is recorded.

    Raises:
        UserError: data or weights are missing, a stage refused what it got, or no machine is large enough.
        StageError: a stage failed for good. What was finished before stays finished.
    """
    begun = time.monotonic()
    require_keys(graph)
    # The executor comes first: a refusal is to leave no trace of a run that never began.
    is_done = len(finished(graph, store)) == len(graph.nodes)
    executor = None if is_done else open_executor(graph.recipe.compute, store)
    try:
        identity, machine = pipeline_id(graph), _machine(graph)
        folder = store.pipeline(identity)
        journal = Journal(folder / "journal.jsonl")
        driver = Driver(graph, store, journal, display)
        is_recorded = is_done and _ended_well(journal) and _are_measured(driver.manifests, store, machine)
        tracker = Tracker(graph.recipe.tracking.uri or default_uri(store), store, identity)
        tracker.start()  # with nothing new to record, too: MLflow may have been lost, or not answered
        patience = MLFLOW_SECONDS
        try:
            if not is_recorded:
                recipe = OmegaConf.create(graph.recipe.model_dump(mode="json"))
                replace(folder / "recipe.yaml", OmegaConf.to_yaml(recipe).encode())
                _run(graph, store, driver, executor, machine)
        except KeyboardInterrupt:
            patience = MLFLOW_SECONDS_WHEN_STOPPED
            raise
        finally:
            tracker.close(patience)
    finally:
        if executor is not None:
            executor.close()
    return PipelineResult(
        graph,
        store,
        driver.manifests,
        driver.outcomes,
        latencies=_latencies(driver.manifests, store, machine),
        seconds=time.monotonic() - begun,
        ids={"pipeline_run": None, "stages": {}} | read_ids(store, identity),
    )


def _run(graph: Graph, store: Store, driver: Driver, executor: Executor | None, machine: str) -> None:
    """Run and measure, with a beginning and an end in the journal."""
    driver.begin()
    status = "failed"
    try:
        if executor is not None:
            driver.run(executor)
        threads = graph.recipe.compute.worker_threads
        for manifest in driver.manifests.values():
            milliseconds = _measured_latency(manifest, store, machine, threads)
            driver.record("latency", key=manifest.key, milliseconds=milliseconds)
        status = "finished"
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        driver.record("ended", status=status)


def _ended_well(journal: Journal) -> bool:
    records, _ = journal.read()
    return bool(records) and records[-1].get("status") == "finished"


def _machine(graph: Graph) -> str:
    """What a latency depends on besides the network."""
    return f"{processor()} / {graph.recipe.compute.worker_threads} threads / torch {versions()['torch']}"


def _latencies(manifests: Mapping[str, Manifest], store: Store, machine: str) -> dict[str, float]:
    found = {name: store.latency(manifest.artifact, machine) for name, manifest in manifests.items()}
    return {name: milliseconds for name, milliseconds in found.items() if milliseconds is not None}


def _are_measured(manifests: Mapping[str, Manifest], store: Store, machine: str) -> bool:
    return len(_latencies(manifests, store, machine)) == len(manifests)


def _measured_latency(manifest: Manifest, store: Store, machine: str, threads: int) -> float:
    """Milliseconds for one image; measured if need be, now that the stages are done and all is quiet."""
    known = store.latency(manifest.artifact, machine)
    if known is not None:
        return known
    network = artifact.load(store.artifact(manifest.artifact))
    shape = network.spec.input_shape
    found = measure_latency(network, shape, threads=threads, repeats=30, seconds=0.2).median_ms
    store.set_latency(manifest.artifact, machine, found)
    return found
