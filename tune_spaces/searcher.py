"""Between Ray Tune and the record of a search: which trial is next, how each did, which are stopped early."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from omegaconf import OmegaConf
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipelines.recipe import as_written
from pipelines.store import RECIPE, Store
from tune_spaces.record import SearchRecord, Trial, pipeline_of, reached
from tune_spaces.sampling import Trials
from tune_spaces.subject import Plan

METRIC, TIME = "val_accuracy", "progress"
HALVING = 2
"""ASHA keeps one of so many trials at each rung; the rungs are 1, 2, 4, ... epochs of progress."""


class RecordingSearcher(Searcher):
    """Hands Ray Tune the trials of a search, and records what comes of them before anything else happens.

    Ray keeps a search of its own in pickled snapshots now and then; ours is in the store's journal at any
    moment, so a driver that is killed forgets nothing, and Ray's are not used.
    """

    def __init__(
        self,
        record: SearchRecord,
        trials: Trials,
        store: Store,
        config: Mapping[str, Any],
        begun: Callable[[Trial, Plan], None],
        ended: Callable[[Trial], None],
    ) -> None:
        """`config` is what every trial is told; `begun` and `ended` hear of each."""
        super().__init__(metric=METRIC, mode="max")
        self._record, self._trials, self._store, self._config = record, trials, store, config
        self._begun, self._ended = begun, ended
        self.numbers: dict[str, int] = {}
        """Of the trials that run, by Ray's ids."""

    def suggest(self, trial_id: str) -> Any:
        """The next trial, with its recipe laid ready in the store."""
        found = self._trials.next()
        if found is None:
            return Searcher.FINISHED
        trial, plan = found
        records = self._store.records(pipeline_of(self._record.name, trial.number))
        content = OmegaConf.to_yaml(OmegaConf.create(as_written(plan.recipe)))
        records.replace(RECIPE, content.encode())
        self.numbers[trial_id] = trial.number
        self._begun(trial, plan)
        return {**self._config, "number": trial.number, "params": trial.params}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Record it, so that early stopping knows it after a restart too."""
        if METRIC in result and "result" not in result:
            self._record.add_report(self.numbers[trial_id], result[TIME], result[METRIC])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Record the end of a trial: its own word, or that it was stopped, or that Ray gave it up."""
        number = self.numbers.pop(trial_id)
        if result and "result" in result:
            trial = self._record.add_result(number, **json.loads(result["result"]))
        elif error:
            message = "its process died, and again whenever Ray started it anew"
            trial = self._record.add_result(number, "failed", message=message, **self._reached(number))
        else:
            values = {METRIC: (result or {}).get(METRIC)}
            trial = self._record.add_result(number, "stopped", values=values, **self._reached(number))
        self.end_pipeline(trial)
        self._trials.tell(trial)
        self._ended(trial)

    def _reached(self, number: int) -> dict[str, Any]:
        """The stages that a trial without a last word had finished."""
        stages, ran = reached(self._store, self._record.name, number)
        return {"stages": stages, "ran": ran}

    def end_pipeline(self, trial: Trial) -> None:
        """Close the journal of a trial's pipeline, from which MLflow has it."""
        status = {"finished": "finished", "failed": "failed"}.get(trial.outcome, "stopped")
        values = {**trial.values, "stages_run": len(trial.ran), "seconds": trial.seconds}
        content: dict[str, Any] = {"values": values}
        if trial.outcome != "running":  # else this driver was stopped, and the next goes on with it
            content["outcome"] = trial.outcome
        if self._record.has_run(trial.number):  # else it was ended before it began
            journal = self._store.journal(pipeline_of(self._record.name, trial.number))
            journal.append({"type": "ended", "status": status, **content})

    def __getstate__(self) -> dict[str, Any]:
        """Nothing either: what Ray keeps of this is never read."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the record has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a search is not restored by Ray."""


def scheduler_of(record: SearchRecord, epochs: int, early_stop: bool) -> TrialScheduler:
    """ASHA over a progress of so many `epochs`, knowing what earlier drivers saw; or none."""
    if not early_stop:
        return FIFOScheduler()
    asha = ASHAScheduler(
        time_attr=TIME,
        metric=METRIC,
        mode="max",
        max_t=epochs,
        reduction_factor=HALVING,
        stop_last_trials=False,  # else a report between two rungs is held against what lower ones have seen
    )
    for trial in record.trials.values():
        if trial.outcome in ("finished", "stopped", "over") and trial.reports:
            stand_in: Any = SimpleNamespace(trial_id=f"recorded-{trial.number}")
            no_controller: Any = None  # ASHA asks it nothing
            asha.on_trial_add(no_controller, stand_in)
            for progress, accuracy in trial.reports:
                asha.on_trial_result(no_controller, stand_in, {TIME: progress, METRIC: accuracy})
    return asha
