"""A recipe, typed; every mistake in it is named with its cure. `pipelines.recipe_file` reads one."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from pbkd.data import DataSettings
from pbkd.engine.settings import OptimizerSettings, Precision, Settings
from pbkd.errors import UserError
from pbkd.networks import ForeignSettings, NetworkSettings
from pbkd.networks.builders import is_foreign
from pbkd.stages import KINDS, AnyStage, Block, Distill, Load, Progressive, Prune, Stabilize, Train

SMOKE_SAMPLES = {"digits": 256}  # of a split; of larger images fewer, since evaluation is most of a smoke run
SMOKE_BATCH = 32
StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


def cores() -> int:
    """CPU cores that this process may use: Slurm's share of a node, or what the kernel allows."""
    return int(os.environ.get("SLURM_CPUS_ON_NODE", "0")) or len(os.sched_getaffinity(0))


class Compute(Precision):
    """Where and how stages run.

    Attributes:
        executor: `ray`: every stage is a fault-tolerant Ray Train job; `local`: on this machine, without Ray.
        workers: processes that train a stage together; changes the numbers.
        min_workers: go on with as few, rather than wait, where nodes come and go; null: never with fewer than
            `workers`. How many there were at which step is chance, so such a result cannot be repeated.
        gpus_per_worker: where stages run on GPUs; 0.5: two workers share one.
        placement: `pack`: workers on as few nodes as hold them; `spread`: on as many.
        threads: CPU threads of each worker; `auto`: the cores this process may use, shared among `workers`.
        device: `auto` takes CUDA where it is.
        precision, channels_last: see `pbkd.engine.Precision`.
        fuse: give a chain of stages to one job; `auto`: those shorter than the start of a job.
        concurrency: jobs at the same time; `auto`: as many as the cores hold.
        max_failures: how often a job may lose a worker and go on.
        checkpoint_seconds: time between checkpoints of a training.
        checkpoint_steps: killed, a training repeats no more steps than these. null: time alone decides.
        watchdog_seconds: a worker that makes no step, or does not run, for so long is ended and replaced;
            between steps, one that uses hardly any processor time for six times as long.
        measure_compiled: measure latency by torch.compile too, about half a minute for each architecture.
    """

    executor: Literal["ray", "local"] = "ray"
    workers: PositiveInt = 1
    min_workers: PositiveInt | None = None
    gpus_per_worker: float = Field(default=1.0, gt=0.0, le=1.0)
    placement: Literal["pack", "spread"] = "pack"
    threads: PositiveInt | Literal["auto"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    fuse: bool | Literal["auto"] = "auto"
    concurrency: PositiveInt | Literal["auto"] = "auto"
    max_failures: NonNegativeInt = 3
    checkpoint_seconds: PositiveFloat = 60.0
    checkpoint_steps: PositiveInt | None = None
    watchdog_seconds: PositiveFloat = 600.0
    measure_compiled: bool = False

    @property
    def worker_threads(self) -> int:
        """`threads`, resolved."""
        return max(1, cores() // self.workers) if self.threads == "auto" else self.threads

    @property
    def world_size(self) -> int | list[int]:
        """What of the number of workers is part of a stage's key: of elastic ones the range."""
        return self.workers if self.min_workers is None else [self.min_workers, self.workers]

    @property
    def fewest_workers(self) -> int:
        """Without so many, a stage waits."""
        return self.workers if self.min_workers is None else self.min_workers

    @model_validator(mode="after")
    def _elastic_needs_ray(self) -> Self:
        if self.min_workers is not None and self.executor != "ray":
            raise ValueError("min_workers needs executor=ray: processes of this machine do not come and go")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}")
        return self


def without_secrets(uri: str) -> str:
    """Return the address of MLflow, which is written to stores, logs, reports and MLflow itself.

    Raises:
        UserError: it holds a user or a password, or is none.
    """
    try:
        address = urlsplit(uri)
    except ValueError as error:
        raise UserError(f"is no address of MLflow: {error}") from error
    if address.password is not None or (address.scheme.startswith("http") and address.username is not None):
        raise UserError(
            "an address of MLflow is written to stores, logs and reports: leave user and password out of it\n"
            "and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment instead"
        )
    return uri


class Tracking(Settings):
    """Where MLflow is: `uri`, without secrets; null: `MLFLOW_TRACKING_URI`, or else in the store."""

    uri: Annotated[str, AfterValidator(without_secrets)] | None = None


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
        limit = min(self.data.limit or 10**9, SMOKE_SAMPLES.get(self.data.name, 64))
        data = self.data.model_copy(
            update={"limit": limit, "batch_size": min(self.data.batch_size, SMOKE_BATCH)}
        )
        return self.model_copy(
            update={"data": data, "stages": {name: stage.smoke() for name, stage in self.stages.items()}}
        )


def as_written(recipe: Recipe) -> dict[str, Any]:
    """What a YAML file has to say for this recipe, without the defaults."""
    return recipe.model_dump(mode="json", exclude_unset=True)


def recipe_of(content: Any, path: Path) -> Recipe:
    """The recipe that the file at `path` and its overrides say.

    Raises:
        UserError: names the file, the key, what was found, what was expected.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error, content)}") from error


def _explain(error: ValidationError, content: Any) -> str:
    """The first mistake, and how many more there are; a union's branches complain of the same place once."""
    places: dict[str, list[ErrorDetails]] = {}
    for problem in error.errors(include_url=False):
        places.setdefault(".".join(_place(problem, content)), []).append(problem)
    # Of a union, the branch that got furthest is the one that was meant.
    meant = [key for key in places if not any(other.startswith(f"{key}.") for other in places)]
    text = _sentence(meant[0], places[meant[0]], content)
    return text if len(meant) == 1 else f"{text}\n(and {len(meant) - 1} more)"


def _place(problem: ErrorDetails, content: Any) -> list[str]:
    """The key in the recipe; pydantic's location also names the branches of unions."""
    place = []
    for part in problem["loc"]:
        is_item = isinstance(content, list) and isinstance(part, int) and part < len(content)
        if is_item or (isinstance(content, dict) and part in content):
            content = content[part]
            place.append(str(part))
    return [*place, str(problem["loc"][-1])] if problem["type"] == "missing" else place


def _sentence(key: str, problems: Sequence[ErrorDetails], content: Any) -> str:
    problem = problems[0]
    found = problem.get("input")
    match problem["type"]:
        case "extra_forbidden":
            *outer, name = key.split(".")
            said = f"unknown key '{key}'{suggest(name, _known_keys(outer, content))}"
        case "missing":
            said = f"key '{key}' is missing"
        case "union_tag_invalid":
            kind = str(found.get("kind") if isinstance(found, dict) else found)
            said = f"'{key}.kind' is '{kind}', which is no kind of stage{suggest(kind, KINDS)}"
        case "union_tag_not_found":
            said = f"'{key}.kind' is missing; it is one of {', '.join(KINDS)}"
        case "value_error":
            said = f"'{key}': {problem['msg'].removeprefix('Value error, ')}"
        case "string_pattern_mismatch":
            said = f"'{key}': expected a name of letters, digits, '_' and '-', found {_short(found)}"
        case _:
            branches = dict.fromkeys(other["msg"].replace("Input should be ", "") for other in problems)
            said = f"'{key}': expected {' or '.join(branches)}, found {_short(found)}"
    return said


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
_SECTIONS: dict[str, type[BaseModel]] = {"data": DataSettings, "compute": Compute, "tracking": Tracking}
_STAGE_SECTIONS: dict[str, type[BaseModel]] = {"optimizer": OptimizerSettings, "network": NetworkSettings}


def _known_keys(place: Sequence[str], content: Any) -> list[str]:
    """What may be written at `place` in a recipe."""
    model: type[BaseModel] = Recipe
    match place:
        case [section]:
            model = _SECTIONS[section]
        case ["stages", name]:
            model = _STAGES[content["stages"][name]["kind"]]
        case ["stages", name, "network"] if is_foreign(str(content["stages"][name]["network"].get("arch"))):
            model = ForeignSettings
        case ["stages", _, section]:
            model = _STAGE_SECTIONS[section]
    return [field.alias or name for name, field in model.model_fields.items()]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
