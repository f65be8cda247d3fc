"""What sharing stages saves a search: the same list of trials on one store, and each on a store of its own.

    python -m benchmarks.tune_sharing --trials 16

The list is drawn from benchmarks/tune_sharing.yaml over the smoke-size digits recipe. The teacher is there
beforehand in every store. `ratio` is wall-clock time with sharing by time without, each from the moment the
first trial runs in its process, so without the start of Ray and of its processes, which import torch and
scikit-learn, to the end of the last. `work_ratio` is the time of the different stages by that of all, as they
took without sharing; an overhead is what a trial took beyond its own stages. One trial at a time unless asked
otherwise: of two, one waits while the other runs the stages that all trials begin with, which is a matter of
how long a search is, not of what sharing costs. Appends a row to benchmarks/results/tune_sharing.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines import cli
from pipelines.jobs import processor
from pipelines.recipe_file import load_recipe
from pipelines.store import Store
from tune_spaces.objective import Objective
from tune_spaces.record import SearchRecord, Trial, pipeline_of
from tune_spaces.sampling import Trials
from tune_spaces.search import Options, Search, Watch
from tune_spaces.space import open_space
from tune_spaces.subject import Subject

if TYPE_CHECKING:
    from tune_spaces.searcher import RecordingSearcher

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "pipelines" / "recipes" / "digits.yaml"
SPACE = ROOT / "benchmarks" / "tune_sharing.yaml"
NAME = "sharing"
RESULTS = ROOT / "benchmarks" / "results" / "tune_sharing.csv"
COLUMNS = (
    "trials", "stages_requested", "stages_run", "seconds_shared", "seconds_alone", "ratio", "work_ratio",
    "overhead_per_trial", "equal_results", "at_once", "load_before", "processor", "torch", "ray", "date",
)  # fmt: skip


class Clock(Watch):
    """From the moment the first trial runs to the last one's end."""

    def __init__(self) -> None:
        self._first, self._last = math.inf, 0.0

    def ended(self, trial: Trial) -> None:
        """It may have been the first that ran, or the last."""
        self._last = time.monotonic()
        self._first = min(self._first, self._last - trial.seconds)

    @property
    def seconds(self) -> float:
        """In between."""
        return self._last - self._first


class Together(Search):
    """A search as it is, of which the trials alone are timed."""

    def trainable(self) -> Callable[[dict[str, Any]], None]:
        """Its own, where the libraries are imported that the first trial of a process would wait for."""
        run_trial = super().trainable()

        def run(config: dict[str, Any]) -> None:
            import torch._dynamo  # noqa: F401 - any optimizer imports it

            run_trial(config)

        return run


class Alone(Together):
    """A search whose trials share nothing: each runs on a store of its own, which has the teacher."""

    stores: Path
    """Where they are: `base`, a store with the teacher alone, and its copies."""

    def searcher(self, trials: Trials) -> RecordingSearcher:
        """Hands out trials, each with its store."""
        alone, found = self, super().searcher(trials)
        suggest = found.suggest

        def suggest_alone(trial_id: str) -> Any:
            config = suggest(trial_id)
            if isinstance(config, dict):
                identity = pipeline_of(alone.record.name, config["number"])
                store = Store(shutil.copytree(alone.stores / "base", alone.stores / identity))
                shutil.copy(Store(config["store"]).recipe(identity), store.pipeline(identity) / "recipe.yaml")
                config["store"] = store.location
            return config

        found.suggest = suggest_alone  # type: ignore[method-assign]
        return found


def searched(kind: type[Search], place: Path, trials: int, at_once: int) -> tuple[SearchRecord, float]:
    """The record of a search on a new store, and how long its trials took; in a process of its own.

    Ray reads its token once in a process, and each store has its own.
    """
    store = Store(shutil.copytree(place / "base", place / kind.__name__.lower()))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        seconds = pool.submit(_search, kind, place, store.location, trials, at_once).result()
    return SearchRecord(store, NAME), seconds


def _search(kind: type[Search], place: Path, location: str, trials: int, at_once: int) -> float:
    store = Store(location)
    subject = Subject.of(RECIPE, load_recipe(RECIPE, ["smoke=true"]), store, store.root / "cache")
    clock, options = Clock(), Options(NAME, trials, "fixed", 0, at_once, early_stop=False)
    search = kind(
        subject,
        open_space(str(SPACE), subject),
        Objective(goals=("accuracy", "macs")),
        options,
        store,
        clock,
    )
    if isinstance(search, Alone):
        search.stores = place
    with redirect_stdout(sys.stderr):
        search.run()
    return clock.seconds


def measure(trials: int, at_once: int) -> dict[str, Any]:
    """Both searches, compared."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="pbkd-sharing-") as folder:
        place = Path(folder)
        arguments = [str(RECIPE), "smoke=true", "compute.executor=local", "--until", "teacher"]
        if cli.main(["run", *arguments, "--store", str(place / "base")]):
            raise SystemExit("the teacher failed")
        alone, seconds_alone = searched(Alone, place, trials, at_once)
        shared, seconds_shared = searched(Together, place, trials, at_once)
        seconds: dict[str, list[float]] = {}
        for trial in alone.trials.values():
            store = Store(place / pipeline_of(NAME, trial.number))
            for name in trial.ran:
                manifest = store.manifest(trial.stages[name])
                assert manifest is not None, "it ran"
                seconds.setdefault(manifest.key, []).append(manifest.seconds)
    requested = sum(map(sum, seconds.values()))
    return {
        "trials": len(alone.trials),
        "stages_requested": sum(map(len, seconds.values())),
        "stages_run": sum(len(trial.ran) for trial in shared.trials.values()),
        "seconds_shared": round(seconds_shared, 2),
        "seconds_alone": round(seconds_alone, 2),
        "ratio": round(seconds_shared / seconds_alone, 3),
        "work_ratio": round(sum(map(statistics.mean, seconds.values())) / requested, 3),
        "overhead_per_trial": round(
            statistics.median(trial.seconds - trial.own_seconds for trial in alone.trials.values()), 3
        ),
        "equal_results": _results(alone) == _results(shared),
        "at_once": at_once,
        "load_before": round(load, 1),
        "processor": processor(),
        "torch": torch.__version__,
        "ray": version("ray"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _results(record: SearchRecord) -> dict[int, Any]:
    return {
        trial.number: (trial.params, trial.outcome, trial.digest, trial.values["val_accuracy"])
        for trial in record.trials.values()
    }


def main() -> None:
    """The command. Exit code 1 if the results of any trial differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument(
        "--at-once", type=int, default=1, help="trials at the same time; default: %(default)s"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    for name, value in cli.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with redirect_stdout(sys.stderr):
        found = measure(arguments.trials, arguments.at_once)
    names = ("ratio", "work_ratio", "stages_requested", "stages_run", "equal_results")
    report = {name: found[name] for name in names} if arguments.json else found
    sys.stdout.write(json.dumps(report) + "\n")
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerow(found)
    if not found["equal_results"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
