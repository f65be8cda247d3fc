"""What a search found: table, figures, the recipes of its winners, written into its folder in the store."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pipelines.latency import Latencies
from pipelines.manifest import Manifest
from pipelines.recipe import as_written
from pipelines.store import Store
from tune_spaces.figures import importance_figure, pareto_figure
from tune_spaces.objective import Objective
from tune_spaces.record import SearchRecord, Trial
from tune_spaces.sampling import frozen
from tune_spaces.search import Search
from tune_spaces.space import Space

FEWEST = 8
"""Finished trials from which the importance of a key is told: of fewer, a forest finds what is not there."""
MEASURED = ("val_accuracy", "macs", "params", "latency_ms")


@dataclass(frozen=True)
class Winner:
    """A winning trial.

    Attributes:
        trial: which.
        manifest: of its student: here, and only here, test accuracy is looked at.
        latency_ms: median of one image; None if it was not measured on this machine.
        file: its recipe.
    """

    trial: Trial
    manifest: Manifest
    latency_ms: float | None
    file: Path


@dataclass(frozen=True)
class Results:
    """All that is reported of a search."""

    record: SearchRecord
    space: Space
    winners: list[Winner]
    teacher: Manifest | None
    importance: dict[str, dict[str, float]]
    files: dict[str, str]

    @property
    def stages_requested(self) -> int:
        """Stages of all trials that ran, as if nothing were shared."""
        return sum(len(trial.stages) for trial in self.record.trials.values())

    @property
    def stages_distinct(self) -> int:
        """Of these, the different ones."""
        return len({key for trial in self.record.trials.values() for key in trial.stages.values()})

    @property
    def report(self) -> dict[str, Any]:
        """It for machines."""
        numbers = {winner.trial.number for winner in self.winners}
        trials = list(self.record.trials.values())
        return {
            "search": self.record.name,
            "folder": str(self.record.folder),
            "trials": [_row(trial, numbers) | {"params": trial.params} for trial in trials],
            "winners": [
                {
                    "number": winner.trial.number,
                    "recipe": str(winner.file),
                    "digest": winner.manifest.digest,
                    "val_accuracy": winner.manifest.metrics.get("val_accuracy"),
                    "test_accuracy": winner.manifest.metrics.get("test_accuracy"),
                    "macs": winner.manifest.metrics.get("macs"),
                    "macs_ratio": winner.manifest.metrics.get("macs_ratio"),
                    "latency_ms": winner.latency_ms,
                }
                for winner in self.winners
            ],
            "stages_requested": self.stages_requested,
            "stages_distinct": self.stages_distinct,
            "stages_run": sum(len(trial.ran) for trial in trials),
            "importance": self.importance,
            "files": self.files,
        }


def write(search: Search, store: Store) -> Results:
    """Write `trials.csv`, `pareto.png`, `importance.png`, `winners/NUMBER.yaml`; again, the same again."""
    record, objective, subject = search.record, search.objective, search.subject
    latencies = Latencies(store, subject.recipe.compute)
    folder = record.folder / "winners"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.yaml"):
        old.unlink()
    winners = []
    for trial in objective.winners(record.trials.values()):
        manifest = store.manifest(trial.stages[subject.graph.student])
        if manifest is not None:
            file = folder / f"{trial.number:04d}.yaml"
            file.write_text(_recipe(search, trial, manifest))
            winners.append(Winner(trial, manifest, latencies.of(manifest).get("latency_ms"), file))
    key = subject.graph.nodes[subject.graph.teacher].key
    teacher = store.manifest(key) if key is not None else None
    importance = importances(list(record.trials.values()), search.space, objective)
    files = {"trials": record.folder / "trials.csv", "pareto": record.folder / "pareto.png"}
    files["trials"].write_text(_csv(record, search.space, winners))
    files["pareto"].write_bytes(pareto_figure(record, objective, teacher))
    if importance:
        files["importance"] = record.folder / "importance.png"
        files["importance"].write_bytes(importance_figure(importance))
    return Results(
        record, search.space, winners, teacher, importance, {name: str(path) for name, path in files.items()}
    )


def importances(trials: Sequence[Trial], space: Space, objective: Objective) -> dict[str, dict[str, float]]:
    """Share of each key in the variance of each measure (fANOVA); of what does not vary, nothing."""
    trials = [trial for trial in trials if trial.outcome == "finished"]
    keys = [
        parameter.key
        for parameter in space.parameters
        if len({str(trial.params[parameter.key]) for trial in trials}) > 1
    ]
    if len(trials) < FEWEST or len(keys) < 2:
        return {}
    import optuna  # scikit-learn comes with it, which takes seconds
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=[measure.direction for measure in objective.measures])
    study.add_trials([frozen(trial, space, objective) for trial in trials])
    found = {}
    for place, measure in enumerate(objective.measures):
        if len({objective.values(trial.values)[place] for trial in trials}) > 1:
            shares = get_param_importances(
                study,
                evaluator=FanovaImportanceEvaluator(seed=0),
                params=keys,
                target=lambda trial, place=place: trial.values[place],  # type: ignore[misc]
            )
            found[measure.name] = {key: float(share) for key, share in shares.items()}
    return found


def _recipe(search: Search, trial: Trial, manifest: Manifest) -> str:
    """The recipe of a winner, with what it is and how it is run above it."""
    recipe = search.subject.plan(trial.params).recipe
    metrics = manifest.metrics
    test = "" if metrics.get("test_accuracy") is None else f", test accuracy {metrics['test_accuracy']:.2f} %"
    lines = [
        f"# Trial {trial.number} of search {search.record.name} (space {search.space.name}).",
        f"# Validation accuracy {metrics['val_accuracy']:.2f} %{test}.",
        f"# {metrics['macs']:.0f} multiply-accumulates.",
        f"# Weights {manifest.digest}",
        *(f"#   {override}" for override in trial.overrides),
        OmegaConf.to_yaml(OmegaConf.create(as_written(recipe))),
    ]
    return "\n".join(lines)


def _row(trial: Trial, winners: set[int]) -> dict[str, Any]:
    return {
        "number": trial.number,
        "outcome": trial.outcome,
        **{name: trial.values.get(name) for name in MEASURED},
        "stages_run": len(trial.ran),
        "seconds": round(trial.seconds, 3),
        "own_seconds": round(trial.own_seconds, 3),
        "digest": trial.digest,
        "message": trial.message,
        "winner": trial.number in winners,
    }


def _csv(record: SearchRecord, space: Space, winners: Sequence[Winner]) -> str:
    """Trials in a table; the last column, for winners alone, is the test accuracy in percent."""
    text = io.StringIO()
    tested = {winner.trial.number: winner.manifest.metrics.get("test_accuracy") for winner in winners}
    keys = [parameter.key for parameter in space.parameters]
    rows = [_row(trial, set(tested)) for trial in record.trials.values()]
    names: Sequence[str] = [name for name in (rows[0] if rows else {}) if name != "message"]
    writer = csv.writer(text)
    writer.writerow([names[0] if names else "number", *keys, *names[1:], "test_accuracy"])
    for trial, row in zip(record.trials.values(), rows, strict=True):
        values = [trial.params[key] for key in keys] + [row[name] for name in names[1:]]
        writer.writerow([row[names[0]], *values, tested.get(trial.number)])
    return text.getvalue()
