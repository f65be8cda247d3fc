"""The record of a search: its journal in the store; it is resumed, reported, and shown in MLflow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pbkd.errors import UserError
from pipelines.journal import Journal
from pipelines.mlflow_values import flatten
from pipelines.store import Store

Outcome = Literal["running", "finished", "stopped", "over", "refused", "failed"]
"""`stopped`: early, for want of promise; `over`: over a limit; `refused`: its plan is impossible."""
CHANGES_SHOWN = 3
JOURNAL = "journal.jsonl"


@dataclass
class Trial:
    """One trial, as far as it is recorded.

    Attributes:
        number: in the order in which trials were drawn, from 0.
        params: values by searched key.
        values: val_accuracy (percent), macs, params, latency_ms (if it was measured).
        stages: keys of its stages, by name.
        ran: the stages that this trial ran itself; the others were there, or run by another.
        seconds, own_seconds: its last attempt took; of them in its own stages.
        digest: of its student's weights.
        message: why it was refused or failed.
        reports: (progress, val_accuracy) while it ran.
    """

    number: int
    params: dict[str, Any]
    overrides: list[str] = field(default_factory=list)
    outcome: Outcome = "running"
    values: dict[str, float | None] = field(default_factory=dict)
    stages: dict[str, str] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    seconds: float = 0.0
    own_seconds: float = 0.0
    digest: str | None = None
    message: str | None = None
    reports: list[tuple[float, float]] = field(default_factory=list)

    @property
    def is_counted(self) -> bool:
        """Whether it is one of the trials asked for: what never began costs nothing and is drawn again."""
        return self.outcome != "refused" and not (self.outcome == "over" and not self.stages)


def pipeline_of(search: str, number: int) -> str:
    """The id, in store and MLflow, of a trial's pipeline."""
    return f"{search}.{number:04d}"


def reached(store: Store, search: str, number: int) -> tuple[dict[str, str], list[str]]:
    """The stages that a trial has finished, as keys by name, and which of them it ran itself.

    The latter in any of its attempts: to the next one, what was run is there already.
    """
    records, _ = store.journal(pipeline_of(search, number)).read()
    ended = [record for record in records if record.get("type") == "finished"]
    ran = dict.fromkeys(record["name"] for record in ended if record["state"] == "ran")
    return {record["name"]: record["key"] for record in ended}, list(ran)


class SearchRecord:
    """A search in the store.

    Attributes:
        name: of the search.
        description: what was asked for.
        trials: by number.
        is_ended: whether the last driver came to its end.
    """

    def __init__(self, store: Store, name: str) -> None:
        """Read what is there."""
        self.name = name
        self._store = store
        self.folder = store.search(name)
        self._records = store.search_records(name)
        self._journal = Journal(self._records)
        self.description: dict[str, Any] = {}
        self.trials: dict[int, Trial] = {}
        self.is_ended = False
        for record in self._journal.read()[0]:
            self._apply(record)

    def begin(self, description: Mapping[str, Any]) -> None:
        """Record what is searched, if that is new. Raises UserError if it was begun with something else.

        What was begun without a trial that ran, as with a limit that none could keep, is begun anew.
        """
        if any(self.has_run(trial.number) for trial in self.trials.values()):
            self.require_same(description)
        elif self.description:
            self._records.remove(JOURNAL)
            self.description, self.trials, self.is_ended = {}, {}, False
        if self.description != description or self.is_ended:
            self._add({"type": "search", "name": self.name, "description": dict(description)})

    def has_run(self, number: int) -> bool:
        """Whether a trial's pipeline was begun."""
        return JOURNAL in self._store.records(pipeline_of(self.name, number)).names()

    def require_same(self, description: Mapping[str, Any]) -> None:
        """Raise UserError, saying what changed, if the search was begun with something else."""
        changes = _changes(self.description, description) if self.description else []
        if changes:
            more = f" (and {len(changes) - CHANGES_SHOWN} more)" if len(changes) > CHANGES_SHOWN else ""
            raise UserError(
                f"search {self.name} was begun differently: {'; '.join(changes[:CHANGES_SHOWN])}{more}\n"
                "type what it was begun with to go on, or give this one a name of its own: --name NAME"
            )

    def add_trial(self, number: int, params: Mapping[str, Any], overrides: list[str]) -> Trial:
        """Record a trial that was drawn, before anything of it begins."""
        self._add({"type": "trial", "number": number, "params": dict(params), "overrides": overrides})
        return self.trials[number]

    def add_report(self, number: int, progress: float, val_accuracy: float) -> None:
        """Record how a trial does."""
        self._add({"type": "report", "number": number, "progress": progress, "val_accuracy": val_accuracy})

    def add_result(self, number: int, outcome: Outcome, **content: Any) -> Trial:
        """Record how a trial ended."""
        self._add({"type": "result", "number": number, "outcome": outcome, **content})
        return self.trials[number]

    def end(self, status: Literal["finished", "failed", "stopped"]) -> None:
        """Record that this driver ends."""
        self._add({"type": "ended", "status": status})

    def _add(self, record: dict[str, Any]) -> None:
        self._journal.append(record)
        self._apply(record)

    def _apply(self, record: dict[str, Any]) -> None:
        content = {name: value for name, value in record.items() if name not in ("type", "time", "number")}
        match record.get("type"):
            case "search":
                self.description, self.is_ended = record["description"], False
            case "trial":
                self.trials[record["number"]] = Trial(record["number"], **content)
            case "report":
                reports = self.trials[record["number"]].reports
                reports.append((record["progress"], record["val_accuracy"]))
            case "result":
                trial = self.trials[record["number"]]
                for name, value in content.items():
                    setattr(trial, name, value)
            case "ended":
                self.is_ended = True


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, but for the number of trials: a search may grow."""
    old, new = (flatten({"of": dict(told)}) for told in (before, now))
    names = [name for name in {**old, **new} if old.get(name) != new.get(name) and name != "of.trials"]
    return [
        f"{name.removeprefix('of.')} was {old.get(name, 'not there')}, is {new.get(name, 'not there')}"
        for name in names
    ]
