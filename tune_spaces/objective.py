"""What a search looks for: goals on the validation split, and limits; whose trials win."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from pydantic import PositiveFloat

from pbkd.engine.settings import Settings
from pbkd.errors import UserError
from tune_spaces.record import Trial
from tune_spaces.subject import Subject

Values = Mapping[str, float | None]
Goal = Literal["accuracy", "macs", "latency"]


class Measure(NamedTuple):
    """What a goal is measured by."""

    name: str
    direction: Literal["maximize", "minimize"]


MEASURES: dict[Goal, Measure] = {
    "accuracy": Measure("val_accuracy", "maximize"),
    "macs": Measure("macs", "minimize"),
    "latency": Measure("latency_ms", "minimize"),
}


class Objective(Settings):
    """Goals, of which several make a Pareto front, and limits.

    Attributes:
        goals: what is to be good.
        max_macs: most multiply-accumulates a winner may have.
        max_latency_ms: longest median latency of one image, in milliseconds.
    """

    goals: tuple[Goal, ...]
    max_macs: PositiveFloat | None = None
    max_latency_ms: PositiveFloat | None = None

    @property
    def measures(self) -> list[Measure]:
        """Of the goals."""
        return [MEASURES[goal] for goal in self.goals]

    @property
    def wants_latency(self) -> bool:
        """Whether every trial's latency has to be measured."""
        return "latency" in self.goals or self.max_latency_ms is not None

    def values(self, values: Values) -> list[float]:
        """The goals' values, in their order."""
        found = [values[measure.name] for measure in self.measures]
        assert all(value is not None for value in found), "a finished trial has all of them"
        return [float(value) for value in found if value is not None]

    def excess(self, values: Values) -> dict[str, float]:
        """How many times over its limits a trial is; only what exceeds one."""
        limits = {"macs": self.max_macs, "latency_ms": self.max_latency_ms}
        shares = {
            name: float(value) / limit
            for name, limit in limits.items()
            if limit is not None and (value := values.get(name)) is not None
        }
        return {name: share for name, share in shares.items() if share > 1.0}

    def winners(self, trials: Iterable[Trial]) -> list[Trial]:
        """The best trial, or the Pareto front, the most accurate first; of equals the one that came first."""
        scored: list[tuple[tuple[float, ...], Trial]] = []
        for trial in trials:
            if trial.outcome == "finished":
                signs = [1.0 if measure.direction == "maximize" else -1.0 for measure in self.measures]
                pairs = zip(signs, self.values(trial.values), strict=True)
                scored.append((tuple(sign * value for sign, value in pairs), trial))
        if len(self.goals) == 1:
            # Of equally good ones, the smallest.
            scored.sort(key=lambda item: (-item[0][0], item[1].values.get("macs") or 0.0, item[1].number))
            return [trial for _, trial in scored[:1]]
        front: dict[tuple[float, ...], Trial] = {}
        for score, trial in sorted(scored, key=lambda item: item[1].number):
            if not any(_dominates(other, score) for other, _ in scored):
                front.setdefault(score, trial)
        return sorted(front.values(), key=lambda trial: -(trial.values["val_accuracy"] or 0.0))


def objective_of(
    subject: Subject, goals: str | None, max_macs: float | None, max_latency_ms: float | None
) -> Objective:
    """What was typed, checked against the recipe; a share of the teacher's MACs becomes their number.

    Raises:
        UserError: an unknown goal, a limit beside its own goal, or no validation split to judge by.
    """
    is_limited = max_macs is not None or max_latency_ms is not None
    names = (goals or ("accuracy" if is_limited else "accuracy,macs")).split(",")
    for name in names:
        if name not in MEASURES or names.count(name) > 1:
            raise UserError(
                f"--objective {goals}: expected some of {', '.join(MEASURES)}, joined by commas, once each"
            )
    if "accuracy" not in names:
        raise UserError(f"--objective {goals}: without accuracy the smallest network wins untrained; add it")
    for option, value in (("--max-macs", max_macs), ("--max-latency", max_latency_ms)):
        if value is not None and value <= 0:
            raise UserError(f"{option} {value:g}: expected a number above 0")
    if not subject.graph.info.has_val:
        raise UserError(
            f"{subject.path}: data.val_fraction is 0: a search chooses by a validation split, never by the "
            "test set\nkeep some training images for it, for example: data.val_fraction=0.1"
        )
    if max_macs is not None and max_macs <= 1.0:
        teacher = subject.graph.nodes[subject.graph.teacher].cost
        if teacher is None:
            raise UserError(
                f"--max-macs {max_macs:g}: the teacher's MACs are not known before it ran; give a number"
            )
        max_macs *= teacher.macs
    return Objective.model_validate({"goals": names, "max_macs": max_macs, "max_latency_ms": max_latency_ms})


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(mine >= theirs for mine, theirs in zip(one, other, strict=True))
