"""A search from beginning to end: Ray Tune runs its trials on one store, which runs each stage once."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout

from pbkd.errors import StageError, UserError
from pbkd.storage import Folder
from pipelines.latency import Latencies
from pipelines.lease import held, leases_of, read_newest
from pipelines.quantities import human
from pipelines.recipe import Compute, as_written
from pipelines.reporting.write import leave_search_report
from pipelines.store import Store
from pipelines.tracking import Tracker, default_uri
from tune_spaces.objective import Objective
from tune_spaces.quiet import Quiet
from tune_spaces.record import SearchRecord, Trial, pipeline_of
from tune_spaces.sampling import SamplerName, Trials, open_trials
from tune_spaces.space import Space
from tune_spaces.subject import Plan, Subject
from tune_spaces.trial import STOP, run_trial

if TYPE_CHECKING:
    from tune_spaces.searcher import RecordingSearcher

log = logging.getLogger(__name__)

STOP_SECONDS = 20.0
MLFLOW_SECONDS = 120.0
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the record and MLflow have it
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are the command's
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial's last report is its result
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60",  # a stopped trial keeps its state before its process is reused
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # its snapshots are not used
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths in recipes are relative to where the command was typed
    "RAY_AIR_NEW_OUTPUT": "0",
}


@dataclass(frozen=True)
class Options:
    """How a search is carried out.

    Attributes:
        name: of the search in the store.
        trials: how many are wanted; a small space may have fewer.
        sampler: who draws them.
        seed: of the drawing.
        max_concurrent: trials at the same time; None: as many as the cluster holds.
        early_stop: let ASHA stop trials that do worse than others did when they had come as far.
    """

    name: str
    trials: int
    sampler: SamplerName
    seed: int
    max_concurrent: int | None
    early_stop: bool


class Watch:
    """Who watches a search; does nothing."""

    def begun(self, trial: Trial, plan: Plan) -> None:
        """A trial has begun."""

    def ended(self, trial: Trial) -> None:
        """A trial has ended."""


def description_of(subject: Subject, space: Space, objective: Objective, options: Options) -> dict[str, Any]:
    """All that makes a search what it is: a resumed one has to be asked for with the same."""
    recipe = as_written(subject.recipe)
    recipe.pop("tracking", None)
    recipe["compute"] = {
        name: value
        for name, value in subject.recipe.compute.model_dump(mode="json").items()
        if name in ("precision", "channels_last", "workers", "threads")
    }
    return {
        "space": space.name,
        "parameters": space.described(),
        "objective": objective.model_dump(mode="json"),
        "sampler": options.sampler,
        "seed": options.seed,
        "trials": options.trials,
        "early_stop": options.early_stop,
        "recipe": recipe,
        "data_digest": subject.graph.data_digest,
    }


class Search:
    """One driver of a search: of a new one, or of one that an earlier driver left."""

    def __init__(
        self,
        subject: Subject,
        space: Space,
        objective: Objective,
        options: Options,
        store: Store,
        watch: Watch,
    ) -> None:
        """Open the record."""
        self.subject, self.space, self.objective, self.options = subject, space, objective, options
        self._store, self._watch = store, watch
        self.record = SearchRecord(store, options.name)
        self._quiet = Quiet()
        self._tracker = Tracker(
            subject.recipe.tracking.uri or default_uri(store),
            store,
            search=options.name,
            while_writing=self._quiet.briefly,
        )
        self._is_in_mlflow = True  # as far as is known
        self._plans: dict[int, Plan] = {}
        """Of the trials that run."""

    def run(self) -> None:
        """Run the trials that are not finished yet, and measure the latency of the winners.

        Raises:
            UserError: somebody else runs it, it was begun differently, its concurrency is more than the
                cluster holds, or no trial keeps the limits.
            StageError: every trial failed.
        """
        with self.driving():
            self.record = SearchRecord(self._store, self.record.name)  # what others wrote before this moment
            self.record.begin(description_of(self.subject, self.space, self.objective, self.options))
            for trial in self.record.trials.values():
                if trial.is_counted:
                    self._tracker.follow(pipeline_of(self.record.name, trial.number))
            self._tracker.start()
            try:
                self._run()
            finally:
                self._is_in_mlflow = self._tracker.close(MLFLOW_SECONDS)

    @contextmanager
    def driving(self) -> Iterator[None]:
        """Be its only driver. Raises UserError if there is one already, here or on another machine."""
        taken = f"search {self.record.name} is run by another process; wait for it, or take another --name"
        lock = FileLock(self.record.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(taken) from None
        with lock:
            if isinstance(self._store.storage, Folder):
                yield  # whoever sees the folder sees the lock
                return
            with held(self._store.search_records(self.record.name), "driver", taken):
                yield

    def record_report(self) -> Path:
        """Leave the search's page in the store, and with its table and figures in MLflow; return the page."""
        page = leave_search_report(self._store, self.record.name).page
        if self._is_in_mlflow:
            try:
                self._tracker.project()
            except Exception as error:  # noqa: BLE001 - of MLflow, requests or sqlalchemy; the work is done
                log.warning("MLflow does not have the report yet, `pbkd ui` brings it: %s", error)
        return page

    def require_record(self) -> None:
        """Raise UserError if there is nothing to report on, or if it was begun differently."""
        if not self.record.description:
            raise UserError(
                f"search {self.record.name}: not in {self._store.location} yet; leave out --report to run it"
            )
        self.record.require_same(description_of(self.subject, self.space, self.objective, self.options))

    def _run(self) -> None:
        status: Literal["finished", "failed", "stopped"] = "failed"
        try:
            trials = open_trials(self.record, self.subject, self.space, self.objective)
            if trials.has_more():
                self._on_ray(trials)
            self._require_a_winner()
            self._measure()
            status = "finished"
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            if not self.record.is_ended:
                self.record.end(status)

    def _on_ray(self, trials: Trials) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        from pipelines.ray_executor import connect

        connect(self._store, self.subject.recipe.compute)
        import ray

        try:
            resources, hands = _hands(self.subject.recipe.compute, self.options.max_concurrent)
            trials.deal(hands)
            self._tune(trials, resources, hands)
        finally:
            ray.shutdown()

    def searcher(self, trials: Trials) -> RecordingSearcher:
        """What hands the trials to Ray Tune."""
        from tune_spaces.searcher import RecordingSearcher

        identity = self.subject.graph.identity
        assert identity is not None, "its keys were required"
        config = {
            "store": self._store.location,
            "search": self.record.name,
            "touched": self.space.touches(self.subject),
            "identity": asdict(identity),
            "objective": self.objective.model_dump(mode="json"),
        }
        return RecordingSearcher(self.record, trials, self._store, config, self._begun, self._ended)

    def trainable(self) -> Callable[[dict[str, Any]], None]:
        """What Ray Tune runs for a trial."""
        return run_trial

    def _tune(self, trials: Trials, resources: dict[str, float], hands: int) -> None:
        from ray import tune

        from tune_spaces.searcher import scheduler_of

        searcher, touched = self.searcher(trials), self.space.touches(self.subject)
        folder = self._store.root / "ray"
        tuner = tune.Tuner(
            tune.with_resources(self.trainable(), resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler_of(self.record, sum(touched.values()), self.options.early_stop),
                num_samples=-1,  # the searcher says when it is enough
                max_concurrent_trials=hands,
                reuse_actors=True,
                trial_dirname_creator=str,
            ),
            run_config=tune.RunConfig(
                name=self.record.name,
                storage_path=str(folder),
                failure_config=tune.FailureConfig(max_failures=self.subject.recipe.compute.max_failures),
                verbose=0,
            ),
        )
        self._store.search_records(self.record.name).remove(STOP)
        shutil.rmtree(folder / self.record.name, ignore_errors=True)
        try:
            tuner.fit()
        except KeyboardInterrupt:
            self._stop_trials()
            for number in searcher.numbers.values():
                searcher.end_pipeline(self.record.trials[number])
            raise
        shutil.rmtree(folder / self.record.name, ignore_errors=True)

    def _begun(self, trial: Trial, plan: Plan) -> None:
        self._plans[trial.number] = plan
        self._tracker.follow(pipeline_of(self.record.name, trial.number))
        self._watch.begun(trial, plan)

    def _ended(self, trial: Trial) -> None:
        self._plans.pop(trial.number, None)
        self._watch.ended(trial)

    def _stop_trials(self) -> None:
        """Have the trials that run keep their state and end; no longer than `STOP_SECONDS`."""
        self._store.search_records(self.record.name).create(STOP, b"")
        keys = {key for plan in self._plans.values() for key in plan.keys if key}
        leases = [leases_of(self._store.storage, key) for key in keys]
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and not all(read_newest(lease).released for lease in leases):
            time.sleep(0.1)

    def _require_a_winner(self) -> None:
        """Raise UserError or StageError, saying which trial came nearest, if none is finished."""
        trials = list(self.record.trials.values())
        if any(trial.outcome == "finished" for trial in trials):
            return
        over = [trial for trial in trials if trial.outcome == "over"]
        if over:
            nearest = min(over, key=lambda trial: max(self.objective.excess(trial.values).values()))
            shares = self.objective.excess(nearest.values)
            found = " and ".join(
                f"{name} {human(nearest.values[name])}, {share:.3g} times the limit"
                for name, share in shares.items()
            )
            raise UserError(
                f"no trial of space {self.space.name} keeps the limits; the nearest of {len(over)} is trial "
                f"{nearest.number} with {found}:\n{' '.join(nearest.overrides)}\n"
                "raise the limit, or search smaller networks"
            )
        reason = next((trial.message for trial in trials if trial.message), "all were stopped early")
        is_refused = all(trial.outcome == "refused" for trial in trials)
        text = f"search {self.record.name}: none of {len(trials)} trials finished; the first says: {reason}"
        raise UserError(text) if is_refused else StageError(text)

    def _measure(self) -> None:
        """Measure the latency of teacher and winners, now that no trial runs."""
        latencies = Latencies(self._store, self.subject.recipe.compute)
        winners = self.objective.winners(self.record.trials.values())
        keys = [trial.stages[self.subject.graph.student] for trial in winners]
        keys.append(winners[0].stages[self.subject.graph.teacher])
        self._quiet.measure(latencies, [found for found in map(self._store.manifest, keys) if found])


def _hands(compute: Compute, wanted: int | None) -> tuple[dict[str, float], int]:
    """What a trial asks of the cluster, and how many run at the same time.

    Raises:
        UserError: the cluster has no room for one trial, or not for as many as are wanted.
    """
    import ray

    from pipelines.ray_executor import places, worker_resources

    worker = worker_resources(compute)
    wish = {name: amount * compute.workers for name, amount in worker.items()}
    room = places(wish)
    if room < (wanted or 1):
        needs = " and ".join(f"{amount:g} {name}" for name, amount in wish.items())
        there = ray.cluster_resources()
        has = " and ".join(f"{there.get(name, 0.0):g} {name}" for name in wish)
        raise UserError(
            f"--max-concurrent {wanted or 1}: each trial needs {needs} on one node, and the Ray cluster has "
            f"{has}: room for {room}\n"
            "lower --max-concurrent, compute.threads or compute.workers, or add nodes"
        )
    return {name.lower(): amount for name, amount in wish.items()}, wanted or room
