"""A recipe: one YAML file and `key=value` overrides, typed; every mistake in it is named with its cure."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from pydantic_core import ErrorDetails
from yaml import YAMLError

from pbkd.data import DataSettings
from pbkd.engine.settings import OptimizerSettings, Precision, Settings
from pbkd.errors import UserError
from pbkd.networks import NetworkSettings
from pbkd.stages import KINDS, AnyStage, Block, Distill, Load, Progressive, Prune, Stabilize, Train

SMOKE_SAMPLES = {"folder": 64}
SMOKE_BATCH = 32
StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Compute(Precision):
    """Where and how stages run.

    Attributes:
        executor: `ray`: every stage is a fault-tolerant Ray Train job; `local`: on this machine, without Ray.
        workers: processes that train a stage together; changes the numbers.
        threads: CPU threads of each worker; `auto`: the cores of this machine shared among `workers`.
        device: `auto` takes CUDA where it is.
        precision, channels_last: see `pbkd.engine.Precision`.
        fuse: give a chain of stages to one job; `auto`: those shorter than the start of a job.
        concurrency: jobs at the same time; `auto`: as many as the cores hold.
        max_failures: how often a job may lose a worker and go on.
        checkpoint_seconds: time between checkpoints.
    """

    executor: Literal["ray", "local"] = "ray"
    workers: PositiveInt = 1
    threads: PositiveInt | Literal["auto"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    fuse: bool | Literal["auto"] = "auto"
    concurrency: PositiveInt | Literal["auto"] = "auto"
    max_failures: NonNegativeInt = 3
    checkpoint_seconds: PositiveFloat = 60.0

    @property
    def worker_threads(self) -> int:
        """`threads`, resolved."""
        return max(1, (os.cpu_count() or 1) // self.workers) if self.threads == "auto" else self.threads


class Tracking(Settings):
    """Where MLflow is: `uri` of a server; null: a database in the store."""

    uri: str | None = None


class Recipe(Settings):
    """What a YAML file says.

    Attributes:
        name: of the MLflow experiment.
        seed: of everything random.
        smoke: shrink everything to a test of a few steps.
        teacher, student: stages by name; the teacher is also whom students are compared with.
        baselines: stages the student is to be compared with.
        stages: by name, in the order they follow one another unless `from` says otherwise.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: NonNegativeInt = 0
    smoke: bool = False
    data: DataSettings
    compute: Compute = Compute()
    tracking: Tracking = Tracking()
    teacher: str
    student: str
    baselines: tuple[str, ...] = ()
    stages: dict[StageName, AnyStage] = Field(min_length=1)

    def shrunk(self) -> Recipe:
        """The recipe as it runs: itself, or with `smoke` its smallest form."""
        if not self.smoke:
            return self
        limit = min(self.data.limit or 10**9, SMOKE_SAMPLES.get(self.data.name, 256))
        data = self.data.model_copy(
            update={"limit": limit, "batch_size": min(self.data.batch_size, SMOKE_BATCH)}
        )
        return self.model_copy(
            update={"data": data, "stages": {name: stage.smoke() for name, stage in self.stages.items()}}
        )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `stages.blocks.epochs=2`.

    Raises:
        UserError: names the file, the key, what was found, what was expected.
    """
    try:
        given = OmegaConf.load(path)
    except OSError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path}: cannot be read ({error.strerror}){hint}") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a YAML file: {reason}") from error
    if not isinstance(given, DictConfig):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, found {type(given).__name__}")
    for override in overrides:
        given = _override(given, override)
    try:
        content = OmegaConf.to_container(given, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:200]}") from error
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(_explain(path, error)) from error


def _override(given: DictConfig, override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override '{override}': expected key=value, such as stages.blocks.epochs=2")
    try:
        merged = OmegaConf.merge(given, OmegaConf.from_dotlist([override]))
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"override '{override}': cannot be applied: {reason}") from error
    if not isinstance(merged, DictConfig):
        raise UserError(f"override '{override}': cannot be applied to a recipe")
    return merged


def _explain(path: Path, error: ValidationError) -> str:
    problems = error.errors(include_url=False)
    text = f"{path}: {_sentence(problems[0])}"
    if len(problems) > 1:
        text += f"\n(and {len(problems) - 1} more)"
    return text


def _sentence(problem: ErrorDetails) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(part for part in location if part not in _TAGS)
    found = problem.get("input")
    match problem["type"]:
        case "extra_forbidden":
            known = list(_fields(location[:-1]))
            return f"unknown key '{key}'{suggest(location[-1], known)}"
        case "missing":
            return f"key '{key}' is missing"
        case "union_tag_invalid":
            kind = found.get("kind") if isinstance(found, dict) else found
            return f"'{key}.kind' is '{kind}', which is no kind of stage{suggest(str(kind), KINDS)}"
        case "union_tag_not_found":
            return f"'{key}.kind' is missing; it is one of {', '.join(KINDS)}"
        case "value_error":
            return f"'{key}': {problem['msg'].removeprefix('Value error, ')}"
        case _:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            return f"'{key}': {message}, found {_short(found)}"


def suggest(word: str, known: Sequence[str]) -> str:
    """The nearest known word, or all of them, as the end of a sentence."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}"


_STAGES: dict[str, type[BaseModel]] = {
    "load": Load,
    "train": Train,
    "block": Block,
    "progressive": Progressive,
    "stabilize": Stabilize,
    "distill": Distill,
    "prune": Prune,
}
_SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataSettings,
    "compute": Compute,
    "tracking": Tracking,
    "optimizer": OptimizerSettings,
    "network": NetworkSettings,
}
# Parts of an error's location that pydantic adds for the branches of a union.
_TAGS = {*_STAGES, "float", "int", "bool", "constrained-float", "tuple[constrained-float, ...]"}
_TAGS |= {"literal['auto']", "constrained-int"}


def _fields(location: Sequence[str]) -> Sequence[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        model = _SECTIONS.get(part) or _STAGES.get(part) or model
    return [field.alias or name for name, field in model.model_fields.items()]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
