"""Which trials a search has: drawn one by one by Optuna, or all at once, in the order that shares most."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from pbkd.errors import UserError
from tune_spaces.objective import Objective
from tune_spaces.record import SearchRecord, Trial
from tune_spaces.space import Space, combinations
from tune_spaces.subject import Params, Plan, Subject

SamplerName = Literal["tpe", "nsga2", "fixed"]
DRAWS = 50
"""For each trial wanted: then what is left of the space is taken to break the limits, or to be known."""
LARGEST_COUNTED = 4096
"""Trials of a space that is gone through when the sampler finds nothing new in it."""
STATES = {
    "finished": TrialState.COMPLETE,
    "failed": TrialState.FAIL,
    "running": TrialState.WAITING,
}


class Trials(Protocol):
    """The trials of a search, one after the other."""

    def has_more(self) -> bool:
        """Whether there is another one; drawing it may need many that break the limits."""

    def deal(self, hands: int) -> None:
        """Hear how many run at the same time."""

    def next(self) -> tuple[Trial, Plan] | None:
        """The next to run, recorded; None when there are no more."""

    def tell(self, trial: Trial) -> None:
        """Hear how one ended."""


def open_trials(record: SearchRecord, subject: Subject, space: Space, objective: Objective) -> Trials:
    """The trials that a search still has to run."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    drawn = Drawn(record, subject, space, objective)
    if record.description["sampler"] == "fixed":
        return Listed(drawn, record)
    return Adaptive(drawn, record, space, objective)


class Drawn:
    """Trials as they are drawn: planned, refused if that tells enough, and recorded."""

    def __init__(self, record: SearchRecord, subject: Subject, space: Space, objective: Objective) -> None:
        self.record, self.subject, self.space, self.objective = record, subject, space, objective
        self._keys: dict[str, int] = {}
        self.wanted = int(min(record.description["trials"], space.size))
        for trial in record.trials.values():
            self.is_new(subject.plan(trial.params), trial.number)

    @property
    def missing(self) -> int:
        """How many trials are still to be drawn."""
        return self.wanted - sum(trial.is_counted for trial in self.record.trials.values())

    def is_new(self, plan: Plan, number: int) -> bool:
        """Whether no trial before `number` is the same pipeline."""
        identity = json.dumps(plan.keys) if plan.graph is not None else json.dumps(list(plan.overrides))
        return self._keys.setdefault(identity, number) == number

    def add(self, params: Params) -> tuple[Trial, Plan] | None:
        """Record a trial; None if it is known already."""
        number = len(self.record.trials)
        if any(trial.params == params for trial in self.record.trials.values()):
            return None
        plan = self.subject.plan(params)
        if not self.is_new(plan, number):
            return None
        trial = self.record.add_trial(number, params, list(plan.overrides))
        if plan.refusal is not None:
            self.record.add_result(number, "refused", message=plan.refusal)
        elif self.objective.excess({"macs": plan.macs}):
            self.record.add_result(number, "over", values={"macs": plan.macs})
        return trial, plan


class Adaptive:
    """Trials that Optuna draws by how the others went; those of earlier drivers are told to it first."""

    def __init__(self, drawn: Drawn, record: SearchRecord, space: Space, objective: Objective) -> None:
        self._drawn, self._record, self._space, self._objective = drawn, record, space, objective
        seed = record.description["seed"] + len(record.trials)  # resumed, it is not to draw the same again
        self._study = optuna.create_study(
            directions=[measure.direction for measure in objective.measures],
            sampler=_sampler(record.description["sampler"], seed),
        )
        self._open: dict[int, optuna.Trial] = {}
        self._drawn_ahead: tuple[Trial, Plan] | None = None
        self._again = [trial for trial in record.trials.values() if trial.outcome in ("running", "failed")]
        for trial in record.trials.values():
            if trial not in self._again:
                self._study.add_trial(frozen(trial, space, objective))

    def has_more(self) -> bool:
        """Draw it, and keep it."""
        self._drawn_ahead = self._drawn_ahead or self._draw()
        return self._drawn_ahead is not None

    def deal(self, hands: int) -> None:
        """Nothing: each is drawn when there is a hand for it."""

    def next(self) -> tuple[Trial, Plan] | None:
        """What was drawn ahead, or another."""
        found, self._drawn_ahead = self._drawn_ahead or self._draw(), None
        return found

    def _draw(self) -> tuple[Trial, Plan] | None:
        """What an earlier driver had begun comes first."""
        if self._again:
            trial = self._again.pop(0)
            self._study.enqueue_trial(trial.params)
            self._open[trial.number] = self._study.ask(self._space.distributions())
            return trial, self._drawn.subject.plan(trial.params)
        for _ in range(DRAWS if self._drawn.missing > 0 else 0):
            asked = self._study.ask(self._space.distributions())
            added = self._drawn.add(asked.params)
            if added is None:  # known: the sampler is to look elsewhere
                self._study.tell(asked, state=TrialState.FAIL)
            elif added[0].outcome != "running":
                self._study.tell(asked, state=TrialState.PRUNED)
            else:
                self._open[added[0].number] = asked
                return added
        return self._rest()

    def _rest(self) -> tuple[Trial, Plan] | None:
        """A trial that the sampler has not come upon, of a space small enough to go through."""
        if self._drawn.missing <= 0 or self._space.size > LARGEST_COUNTED:
            return None
        for params in _draws(self._space, 0):
            added = self._drawn.add(params)
            if added is not None and added[0].outcome == "running":
                self._study.enqueue_trial(dict(params))
                self._open[added[0].number] = self._study.ask(self._space.distributions())
                return added
        return None

    def tell(self, trial: Trial) -> None:
        """Pass it on to Optuna."""
        asked = self._open.pop(trial.number)
        state = STATES.get(trial.outcome, TrialState.PRUNED)
        values = self._objective.values(trial.values) if state == TrialState.COMPLETE else None
        self._study.tell(asked, values, state=state)


class Listed:
    """Trials drawn before the first begins, the same whatever happens; run in the order that shares most."""

    def __init__(self, drawn: Drawn, record: SearchRecord) -> None:
        source = _draws(drawn.space, record.description["seed"])
        tries = DRAWS * drawn.wanted
        for params in (params for _, params in zip(range(tries), source, strict=False)):
            if drawn.missing <= 0:
                break
            drawn.add(params)
        self._waiting = [
            (trial, drawn.subject.plan(trial.params))
            for trial in record.trials.values()
            if trial.outcome in ("running", "failed")
        ]

    def has_more(self) -> bool:
        """Whether the list has another."""
        return bool(self._waiting)

    def deal(self, hands: int) -> None:
        """Put the list in the order that shares most."""
        self._waiting = dealt(self._waiting, hands)

    def next(self) -> tuple[Trial, Plan] | None:
        """The next of the list."""
        return self._waiting.pop(0) if self._waiting else None

    def tell(self, trial: Trial) -> None:
        """Nothing: the list is what it is."""


def dealt(plans: Sequence[tuple[Trial, Plan]], hands: int) -> list[tuple[Trial, Plan]]:
    """Trials as the leaves of the tree of their stages, dealt to `hands` so that each has a part of the tree.

    Sorted by their stages' keys, neighbours share the longest beginnings. Given out one by one, neighbours
    would run at the same time, and wait for each other; so each hand gets a stretch of the list.
    """
    ordered = sorted(plans, key=lambda item: (item[1].keys, item[0].number))
    length = -(-len(ordered) // hands)
    stretches = [ordered[begin : begin + length] for begin in range(0, len(ordered), max(1, length))]
    return [stretch[turn] for turn in range(length) for stretch in stretches if turn < len(stretch)]


def frozen(trial: Trial, space: Space, objective: Objective) -> FrozenTrial:
    """An ended trial as Optuna keeps it."""
    state = STATES.get(trial.outcome, TrialState.PRUNED)
    return create_trial(
        state=state,
        params=trial.params,
        distributions=space.distributions(),
        values=objective.values(trial.values) if state == TrialState.COMPLETE else None,
    )


def _sampler(name: str, seed: int) -> BaseSampler:
    match name:
        case "tpe":
            return TPESampler(seed=seed, multivariate=True)
        case "nsga2":
            return NSGAIISampler(seed=seed, population_size=16)
        case _:
            raise UserError(f"--sampler {name}: expected tpe, nsga2 or fixed")


def _draws(space: Space, seed: int) -> Iterator[Params]:
    """Trials drawn by chance: of a space that can be counted, none twice."""
    if space.size < 2**53:
        draw, size, seen = random.Random(seed), int(space.size), set[int]()
        while len(seen) < size:
            place = draw.randrange(size)
            if place not in seen:
                seen.add(place)
                yield from combinations(space, [place])
        return
    study = optuna.create_study(sampler=RandomSampler(seed))
    while True:
        yield study.ask(space.distributions()).params
