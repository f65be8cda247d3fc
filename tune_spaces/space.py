"""A search space: keys of a recipe and the values they may take; by name, or from a file of one's own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from pydantic import ValidationError, model_validator

from pbkd.engine.settings import Settings
from pbkd.errors import UserError
from pipelines.recipe import suggest
from pipelines.recipe_file import revise
from tune_spaces.subject import EITHER, Params, Subject

NAMED = ("student_widths", "pruning_ratios", "stabilization_lengths", "joint")
BESIDE_STAGES = ("seed", "data.batch_size", "data.augment")
"""What else may be searched: other keys change what trials are compared on, or nothing."""


class Parameter(Settings):
    """A searched key: its `choices`, or a range from `low` to `high`, of whole numbers if both are."""

    key: str
    choices: tuple[Any, ...] | None = None
    low: int | float | None = None
    high: int | float | None = None
    log: bool = False

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("expected a list of values, or {low: ..., high: ...}")
        if self.choices is not None:
            if not self.choices:
                raise ValueError("is empty: expected at least one value")
            if len(set(map(json.dumps, self.choices))) < len(self.choices):
                raise ValueError(f"holds a value twice: {list(self.choices)}")
        elif self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(f"low={self.low:g} is not below high={self.high:g}")
            if self.log and self.low <= 0:
                raise ValueError(f"log: true wants low above 0, found {self.low:g}")
        return self

    @property
    def values(self) -> tuple[Any, ...]:
        """The choices, or the ends of the range."""
        return self.choices if self.choices is not None else (self.low, self.high)

    @property
    def size(self) -> float:
        """How many values it has."""
        if self.choices is not None:
            return len(self.choices)
        is_whole = isinstance(self.low, int) and isinstance(self.high, int)
        return self.high - self.low + 1 if is_whole else math.inf  # type: ignore[operator]

    def distribution(self) -> BaseDistribution:
        """It as Optuna draws it; a choice that is a list goes as JSON."""
        if self.choices is not None:
            plain = [
                json.dumps(value) if isinstance(value, list | tuple) else value for value in self.choices
            ]
            return CategoricalDistribution(plain)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return IntDistribution(self.low, self.high, log=self.log)
        assert self.low is not None and self.high is not None
        return FloatDistribution(self.low, self.high, log=self.log)

    def described(self) -> Any:
        """It as a file would have it, for the record."""
        if self.choices is not None:
            return list(self.choices)
        return {"low": self.low, "high": self.high} | ({"log": True} if self.log else {})


@dataclass(frozen=True)
class Space:
    """Searched keys under a name."""

    name: str
    parameters: tuple[Parameter, ...]

    @property
    def size(self) -> float:
        """How many trials it has; infinite with a range of real numbers."""
        return math.prod(parameter.size for parameter in self.parameters)

    def distributions(self) -> dict[str, BaseDistribution]:
        """It as Optuna draws it."""
        return {parameter.key: parameter.distribution() for parameter in self.parameters}

    def described(self) -> dict[str, Any]:
        """It as a file would have it."""
        return {parameter.key: parameter.described() for parameter in self.parameters}

    def touches(self, subject: Subject) -> dict[str, int]:
        """The stages of the graph that differ between trials: with a searched key, or behind one that has.

        With the epochs that the recipe gives each, at least one: by them, whatever a trial makes of them, its
        progress is counted.
        """
        groups = {key.split(".")[1] for key in self.described() if key.startswith("stages.")}
        is_all = any(not key.startswith("stages.") for key in self.described())
        touched: dict[str, int] = {}
        for name, node in subject.graph.nodes.items():
            is_own = is_all or name in groups or name.rpartition(".")[0] in groups
            if is_own or any(given in touched for _, given in node.inputs):
                touched[name] = getattr(node.stage, "epochs", None) or 1
        return touched

    def check(self, subject: Subject) -> None:
        """Raise UserError if it does not fit the recipe, or contradicts itself."""
        if not self.parameters:
            raise UserError(f"space {self.name}: is empty; give at least one key of {subject.path}")
        self._check_contradictions()
        for parameter in self.parameters:
            self._check_key(parameter.key, subject)
            for value in parameter.values:
                try:
                    revise(subject.recipe, subject.overrides({parameter.key: value}), subject.path)
                except UserError as error:
                    raise UserError(f"space {self.name}: {parameter.key}={value}: {error}") from error

    def _check_contradictions(self) -> None:
        keys = [parameter.key for parameter in self.parameters]
        for key in keys:
            above = [other for other in keys if key.startswith(f"{other}.")]
            if above:
                raise UserError(
                    f"space {self.name}: has {above[0]} and {key}, which is a part of it; keep one"
                )
            stage, _, last = key.rpartition(".")
            for group in EITHER:
                others = [f"{stage}.{other}" for other in group if last in group and other != last]
                both = [other for other in others if other in keys]
                if both:
                    raise UserError(f"space {self.name}: has {key} and {both[0]}, of which a stage has one")

    def _check_key(self, key: str, subject: Subject) -> None:
        section, *rest = key.split(".")
        if section != "stages":
            if key in BESIDE_STAGES:
                return
            raise UserError(
                f"space {self.name}: '{key}' cannot be searched; keys below stages can, and "
                f"{', '.join(BESIDE_STAGES)}"
            )
        known = list(subject.recipe.stages)
        if not rest or rest[0] not in known:
            name = rest[0] if rest else ""
            raise UserError(
                f"space {self.name}: '{key}': the student of {subject.path} needs no stage '{name}'"
                f"{suggest(name, known)}"
            )
        match rest:
            case [name, "width", number]:
                if name not in subject.stages("progressive"):
                    raise UserError(
                        f"space {self.name}: '{key}': only a progressive stage has a width for each block"
                    )
                blocks = [str(block) for block in subject.blocks(name)]
                if number not in blocks:
                    raise UserError(
                        f"space {self.name}: '{key}': stage {name} has blocks {', '.join(blocks)}"
                    )


def open_space(name: str, subject: Subject) -> Space:
    """The space or the file of that name, for a recipe. Raises UserError if it does not fit."""
    if name in NAMED:
        found = tuple(import_module(f"tune_spaces.{name}").parameters(subject))
        space = Space(name, found)
    else:
        space = _read(name)
    space.check(subject)
    return space


def _read(name: str) -> Space:
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"space '{name}': there is none{suggest(name, NAMED)}\nor give a file of your own: SPACE.yaml"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"space {path}: cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"space {path}: expected keys of a recipe, each with a list of values or {{low: , high: }}"
        )
    return Space(path.stem, tuple(_parameters(path, content)))


def _parameters(path: Path, content: dict[Any, Any]) -> Iterator[Parameter]:
    for key, given in content.items():
        try:
            if isinstance(given, dict):
                yield Parameter.model_validate(given | {"key": str(key)})
            else:
                yield Parameter.model_validate({"key": str(key), "choices": given})
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise UserError(f"space {path}: '{key}': {reason}") from error


def combinations(space: Space, places: Sequence[int]) -> Iterator[Params]:
    """The trials of a space without real numbers, by their places in the list of all of them."""
    for place in places:
        params = {}
        for parameter in space.parameters:
            place, index = divmod(place, int(parameter.size))
            if parameter.choices is not None:
                params[parameter.key] = parameter.distribution().choices[index]  # type: ignore[attr-defined]
            else:
                params[parameter.key] = parameter.low + index  # type: ignore[operator]
        yield params
