"""What is asked of Slurm, and a site's habits: one YAML file of profiles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from pbkd.errors import UserError

PROFILES = Path("~/.config/pbkd/slurm.yaml")
START_SECONDS = 60
"""What a job needs for its cluster and its first step, roughly."""


class Allocation(BaseModel):
    """What is asked for, and what a site wants of every job; the keys of a profile.

    Attributes:
        nodes, cpus_per_node, gpus_per_node, mem: without `cpus_per_node`, whole nodes.
        partition, account, qos, time: as of sbatch; `time` is `minutes`, `hours:minutes:seconds` or
            `days-hours[:minutes[:seconds]]`.
        grace_seconds: before the end of the time, to keep the state of the trainings.
        requeues: time limits and, in jobs of at most ten minutes, preemptions that are survived.
        restarts: how often a job is begun again after a failure that Slurm does not requeue for.
        setup: lines of shell before Python: module loads, `source .../activate`.
        python: the command that starts Python in a step, such as a container's; default: this one, which also
            ends the job, outside of any container: nodes have to see it in either case.
        srun, sbatch: options more, such as `--container-image=...`, and `{constraint: a100}`; a bare one is
            `true`.
        temporary: a folder of each node alone, with a short name; sockets lie in it.
        probe: ask free nodes, before submission, whether they see the store and have the same Python.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    nodes: PositiveInt = 1
    cpus_per_node: PositiveInt | None = None
    gpus_per_node: NonNegativeInt = 0
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = "60"
    grace_seconds: PositiveInt = 90
    requeues: NonNegativeInt = 20
    restarts: NonNegativeInt = 3
    setup: tuple[str, ...] = ()
    python: str | None = None
    srun: tuple[str, ...] = ()
    sbatch: dict[str, str] = Field(default_factory=dict)
    temporary: Path = Path("/tmp")
    probe: bool = True

    def flags(self) -> dict[str, str | bool]:
        """`sbatch`, with the names and values that go on a command line; True: without a value."""
        return {name.replace("_", "-"): value == "true" or value for name, value in self.sbatch.items()}

    @property
    def minutes(self) -> int:
        """The time limit. Raises UserError if it is none, or too short to be of use."""
        minutes = parse_minutes(self.time)
        if minutes is None or minutes <= 0:
            raise UserError(f"--time {self.time}: expected minutes, H:MM:SS or D-HH[:MM[:SS]]")
        need = self.grace_seconds + START_SECONDS
        if minutes * 60 < need:
            raise UserError(
                f"--time {self.time}: too short to start, train and keep the state: "
                f"{minutes * 60} s, and {self.grace_seconds} s of them are kept for the end\n"
                f"ask for at least {-(-need // 60)} minutes, or lower grace_seconds in the site profile"
            )
        return minutes


def parse_minutes(text: str) -> int | None:
    """Minutes of a time as sbatch and sinfo write it, rounded down; None if it is none."""
    days, dash, clock = text.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        whole_days = int(days) if dash else 0
    except ValueError:
        return None
    if len(parts) > 3 or min(parts) < 0:
        return None
    # D-HH:MM:SS is filled from the left, MM:SS from the right, a lone number is minutes.
    if dash or len(parts) == 3:
        hours, minutes, seconds = parts + [0] * (3 - len(parts))
    else:
        hours, minutes, seconds = 0, parts[0], parts[1] if len(parts) == 2 else 0
    return (whole_days * 24 + hours) * 60 + minutes + seconds // 60


def load_allocation(profile: str | None, given: dict[str, Any]) -> Allocation:
    """A profile of the site's file, and what was typed, which wins.

    The file is $PBKD_SLURM_PROFILES or ~/.config/pbkd/slurm.yaml; its profile `default` is used unless
    another is named.

    Raises:
        UserError: names the file, the profile, the key.
    """
    path = Path(os.environ.get("PBKD_SLURM_PROFILES", PROFILES)).expanduser()
    chosen = _profile(path, profile)
    try:
        return Allocation.model_validate(chosen | given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        where = f"--{key.replace('_', '-')}" if key in given else f"{path}: '{profile or 'default'}.{key}'"
        known = f"; known: {', '.join(Allocation.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise UserError(f"{where}: {first['msg']}, found {first['input']!r}{known}") from error


def _profile(path: Path, name: str | None) -> dict[str, Any]:
    try:
        # Its own reading of values would make 14400 of 4:00:00; here all are strings until they are checked.
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except FileNotFoundError as error:
        if name is None and "PBKD_SLURM_PROFILES" not in os.environ:
            return {}
        raise UserError(f"{path}: no such file, so there is no profile '{name or 'default'}'") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: not a YAML mapping of profiles: {' '.join(str(error).split())[:200]}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
        raise UserError(f"{path}: expected a mapping of profiles, such as 'default: {{partition: gpu}}'")
    if name is not None and name not in content:
        raise UserError(f"{path}: no profile '{name}'; there are: {', '.join(map(str, content))}")
    profile: dict[str, Any] = content.get(name or "default", {})
    return profile
