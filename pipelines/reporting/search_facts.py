"""What the store knows of one search: its trials, as its journal tells them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.journal import Journal
from pipelines.manifest import Manifest
from pipelines.store import Store

GOALS = {"accuracy": ("val_accuracy", 1.0), "macs": ("macs", -1.0), "latency": ("latency_ms", -1.0)}
"""What a goal is measured by, and whether more of it is better."""


@dataclass(frozen=True)
class TrialFacts:
    """A trial, as far as it is recorded.

    Attributes:
        outcome: running, finished, stopped (early), over (a limit), refused or failed.
        values: val_accuracy (percent), macs, params, latency_ms.
        stages: keys of its stages; `ran`: how many of them it ran itself.
    """

    number: int
    params: Mapping[str, Any]
    outcome: str = "running"
    values: Mapping[str, float | None] = field(default_factory=dict)
    stages: tuple[str, ...] = ()
    ran: int = 0
    seconds: float | None = None
    message: str = ""


@dataclass(frozen=True)
class SearchFacts:
    """A search as its journal tells it.

    Attributes:
        described: what was asked for: space, parameters, objective, sampler, seed, recipe.
        status: of its latest driver; None if that has not ended, or was killed.
        teacher: manifest of the teacher, if a trial got as far.
    """

    name: str
    store: str
    described: Mapping[str, Any]
    status: str | None
    trials: tuple[TrialFacts, ...]
    teacher: Manifest | None

    @property
    def goals(self) -> list[str]:
        """What is optimized; several give a front."""
        return list(self.described["objective"]["goals"])

    @property
    def winners(self) -> list[TrialFacts]:
        """The best trial or, of several goals, those that no other one beats; the most accurate first."""
        scored = [(self._merits(trial), trial) for trial in self.trials if trial.outcome == "finished"]
        scored.sort(key=lambda pair: pair[0], reverse=True)
        if len(self.goals) == 1:
            return [trial for _, trial in scored[:1]]
        return [trial for mine, trial in scored if not any(_beats(other, mine) for other, _ in scored)]

    def _merits(self, trial: TrialFacts) -> tuple[float, ...]:
        """By goal, more is better. A finished trial has all of them."""
        pairs = [(trial.values[GOALS[goal][0]], GOALS[goal][1]) for goal in self.goals]
        return tuple(value * sign for value, sign in pairs if value is not None)


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(mine >= theirs for mine, theirs in zip(one, other, strict=True))


def gather_search(store: Store, name: str) -> SearchFacts:
    """Read the journal of a search. It is there: `store.searches()` has its name."""
    records, _ = Journal(store.search_records(name)).read()
    described: Mapping[str, Any] = {}
    trials: dict[int, dict[str, Any]] = {}
    status: str | None = None
    for record in records:
        match record.get("type"):
            case "search":
                described, status = record["description"], None
            case "trial":
                trials[record["number"]] = {"params": record["params"]}
            case "result":
                trials[record["number"]] |= record
            case "ended":
                status = record["status"]
    found = tuple(_trial(number, told) for number, told in sorted(trials.items()))
    keys = ((told.get("stages") or {}).get(described["recipe"]["teacher"]) for told in trials.values())
    key = next(filter(None, keys), None)
    return SearchFacts(name, store.location, described, status, found, store.manifest(key) if key else None)


def _trial(number: int, told: Mapping[str, Any]) -> TrialFacts:
    return TrialFacts(
        number,
        told["params"],
        told.get("outcome", "running"),
        told.get("values") or {},
        tuple((told.get("stages") or {}).values()),
        len(told.get("ran") or ()),
        told.get("seconds"),
        told.get("message") or "",
    )
