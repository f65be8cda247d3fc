"""Run a pipeline: its unfinished stages, each once; store, journal and MLflow are complete at the end."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pbkd.errors import StageError, UserError
from pipelines.driver import Display, Driver, Outcome
from pipelines.executors import Executor, open_executor
from pipelines.graph import Graph, finished, pipeline_id, require_keys
from pipelines.journal import Journal, latest_report, report_files
from pipelines.latency import Latencies, Milliseconds
from pipelines.manifest import Manifest
from pipelines.store import RECIPE, Store
from pipelines.tracking import Tracker, default_uri, read_ids

log = logging.getLogger(__name__)

MLFLOW_SECONDS = 60.0
MLFLOW_SECONDS_WHEN_STOPPED = 10.0


@dataclass
class PipelineResult:
    """What a run leaves: manifests, outcomes and latencies by stage name; ids in MLflow; its report."""

    graph: Graph
    store: Store
    manifests: dict[str, Manifest]
    outcomes: dict[str, Outcome]
    latencies: dict[str, Milliseconds]
    seconds: float
    ids: dict[str, Any]
    report: Path | None


def run_pipeline(
    graph: Graph, store: Store, display: Display, *, with_report: bool = False
) -> PipelineResult:
    """Run what is not finished. Of a run that finds everything finished and recorded, nothing is recorded.

    `with_report`: leave a report in the store at the end, also of a run that fails.

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
        identity, latencies = pipeline_id(graph), Latencies(store, graph.recipe.compute)
        journal = store.journal(identity)
        driver = Driver(graph, store, journal, display)
        is_recorded = is_done and _ended_well(journal) and latencies.are_measured(driver.manifests.values())
        tracker = Tracker(graph.recipe.tracking.uri or default_uri(store), store, identity)
        tracker.start()  # with nothing new to record, too: MLflow may have been lost, or not answered
        patience, report = MLFLOW_SECONDS, None
        try:
            if not is_recorded:
                recipe = OmegaConf.create(graph.recipe.model_dump(mode="json"))
                store.records(identity).replace(RECIPE, OmegaConf.to_yaml(recipe).encode())
                _run(driver, executor, latencies, tracker)
            if with_report:
                made = _made_report(store, identity) if is_recorded else None
                report = made or _report(store, identity)
        except (UserError, StageError) as error:
            if with_report and (report := _report(store, identity)) is not None:
                raise type(error)(f"{error}\nwhat there is of it: {report}") from error
            raise
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
        latencies={name: latencies.of(manifest) for name, manifest in driver.manifests.items()},
        seconds=time.monotonic() - begun,
        ids={"pipeline_run": None, "stages": {}} | read_ids(store, identity),
        report=report,
    )


def _run(driver: Driver, executor: Executor | None, latencies: Latencies, tracker: Tracker) -> None:
    """Run and measure, with a beginning and an end in the journal."""
    driver.begin()
    end = {"status": "failed"}
    try:
        if executor is not None:
            driver.run(executor)
        with tracker.resting():
            latencies.measure(driver.manifests.values())
        for manifest in driver.manifests.values():
            driver.record("latency", key=manifest.key, latencies=latencies.of(manifest))
        end = {"status": "finished"}
    except KeyboardInterrupt:
        end = {"status": "stopped"}
        raise
    except (UserError, StageError) as error:
        end["reason"] = str(error)
        raise
    finally:
        driver.record("ended", **end)


def _report(store: Store, identity: str) -> Path | None:
    """Leave a report. What goes wrong with that is no reason to call a finished training a failure."""
    from pipelines.reporting.write import leave_report

    try:
        return leave_report(store, identity).page
    except Exception as error:  # noqa: BLE001 - the work is done, and `pbkd report` shows what went wrong
        log.warning("the report could not be made: %s\ntry it alone: pbkd report %s", error, identity)
        return None


def _made_report(store: Store, identity: str) -> Path | None:
    """The page of the latest report, if it is still there."""
    latest = latest_report(store.journal(identity))
    if latest is None:
        return None
    try:
        page = store.pipeline(identity) / report_files(latest)[0]
    except UserError:
        return None  # a new one is made, and recorded
    return page if page.is_file() else None


def _ended_well(journal: Journal) -> bool:
    """Whether the latest run ended, and well; reports and exports may have been made since."""
    records, _ = journal.read()
    since = ("report", "export")
    latest = next((record for record in reversed(records) if record.get("type") not in since), {})
    return latest.get("status") == "finished"
