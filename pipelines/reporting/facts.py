"""What the store knows of one pipeline: facts only, nothing is run or changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pbkd.errors import UserError
from pipelines.journal import Record
from pipelines.manifest import Manifest
from pipelines.store import Store

Row = Mapping[str, Any]
State = Literal["finished", "running", "failed", "interrupted", "not begun", "removed", "damaged"]
SAME = {"nll": "test_loss"}  # of manifests that have the one and not the other
FEATURE_ERROR = "feature_error_"  # and the number of the block
LISTED = 5


@dataclass(frozen=True)
class StageFacts:
    """A stage of the pipeline, finished or not.

    Attributes:
        role: `teacher`, `student`, `baseline` or `stage`.
        state: `running` is what a killed run leaves, too; `removed`: finished, but its manifest is gone;
            `damaged`: its manifest cannot be read.
        key: None if no run has come to it.
        inputs: (role, name) of the stages it was made from, as far as it is known.
        manifest: None unless it is finished.
        rows: its history; of an unfinished stage what the journal has of it.
        latencies: milliseconds by name, such as `latency_ms`; None: it was tried, and does not work there.
        reason: why it failed or is damaged.
        begun: seconds since 1970 of its latest begin in the pipeline; None if it was reused or never begun.
        has_artifact: whether the network it made is still in the store.
    """

    name: str
    kind: str
    role: str
    state: State
    key: str | None = None
    inputs: tuple[tuple[str, str], ...] = ()
    manifest: Manifest | None = None
    rows: tuple[Row, ...] = ()
    latencies: Mapping[str, float | None] = field(default_factory=dict)
    reason: str = ""
    begun: float | None = None
    has_artifact: bool = False

    @property
    def source(self) -> str | None:
        """The stage whose network it starts from, if it is one of the pipeline."""
        return dict(self.inputs).get("from")

    @property
    def seconds(self) -> float | None:
        """What it took; of an unfinished stage what it took until its last report."""
        if self.manifest is not None:
            return self.manifest.seconds
        if self.begun is None or not self.rows:
            return None
        return max(float(self.rows[-1]["time"]) - self.begun, 0.0)

    @property
    def feature_errors(self) -> dict[int, float]:
        """By block, from 1: L_local of its features on test images, in the unit `relative`."""
        metrics = self.manifest.metrics if self.manifest else {}
        found = {
            int(name.removeprefix(FEATURE_ERROR)): value
            for name, value in metrics.items()
            if name.startswith(FEATURE_ERROR) and value is not None
        }
        return dict(sorted(found.items()))

    def value(self, name: str) -> float | None:
        """The metric or latency called `name`, or None: not every version of pbkd measured everything."""
        metrics = self.manifest.metrics if self.manifest else {}
        found = metrics.get(name, self.latencies.get(name))
        return self.value(SAME[name]) if found is None and name in SAME else found

    def series(self, name: str, along: str = "step") -> list[tuple[float, float]]:
        """(`along`, value) of the rows of its history that have `name`."""
        return [(row[along], row[name]) for row in self.rows if row.get(name) is not None]


@dataclass(frozen=True)
class PipelineFacts:
    """A pipeline as its journal and the manifests of its stages tell it.

    Attributes:
        store: its address.
        recipe_path: its recipe.yaml, on this machine.
        recipe: as it ran, in full.
        status: of its latest run; None if that has not ended, or was killed.
        reason: why that failed, if it is known.
        begun, ended: seconds since 1970 of its first run's begin and its latest run's end.
        stages: by name, in the order of the recipe.
        exports: what the journal has of files that networks of it were written to, the latest of each path.
    """

    id: str
    name: str
    store: str
    recipe_path: Path
    recipe: Mapping[str, Any]
    teacher: str
    student: str
    status: str | None
    reason: str
    begun: float
    ended: float | None
    stages: dict[str, StageFacts]
    exports: tuple[Record, ...] = ()

    @property
    def finished(self) -> list[StageFacts]:
        """The stages that are finished."""
        return [stage for stage in self.stages.values() if stage.manifest is not None]

    @property
    def unfinished(self) -> list[StageFacts]:
        """The others."""
        return [stage for stage in self.stages.values() if stage.manifest is None]

    @property
    def compared(self) -> list[StageFacts]:
        """Teacher, student and baselines: the finished stages that have a role."""
        return [stage for stage in self.finished if stage.role != "stage"]

    @property
    def leading(self) -> list[StageFacts]:
        """The stages whose accuracies figures have room for; what is far below them may stand at the foot."""
        student = self.stages[self.student]
        return self.finished if student.manifest is None else self.compared

    def path(self, name: str) -> list[str]:
        """From the first stage to `name`, each starting from the one before it."""
        names = [name]
        while (source := self.stages[names[0]].source) is not None and source not in names:
            names.insert(0, source)
        return names


@dataclass(frozen=True)
class Shock:
    """A stage that recorded gradient shock.

    Attributes:
        stabilized: steps of stabilization between `origin` and it; 0 without.
    """

    stage: StageFacts
    origin: str
    stabilized: int

    @property
    def norms(self) -> list[tuple[float, float]]:
        """(step, norm of the gradient of stem and blocks before clipping)."""
        return self.stage.series("gradient_norm")

    @property
    def similarities(self) -> list[tuple[float, float]]:
        """(step, linear CKA of the features with those the stage began with)."""
        return self.stage.series("feature_cka")


def choose_pipeline(store: Store, prefix: str | None = None) -> str:
    """The id that begins with `prefix`, or the pipeline written to last; UserError if there is none."""
    known = store.pipelines()
    if not known:
        raise UserError(f"store {store.location}: no pipeline was run in it yet; start one: pbkd run RECIPE")
    if prefix is None:
        return known[0]
    fitting = [name for name in known if name.startswith(prefix)]
    if prefix in known:
        return prefix
    if len(fitting) != 1:
        found = f"fits {len(fitting)} of them, {_some(fitting)}" if fitting else f"has {_some(known)}"
        raise UserError(
            f"store {store.location}: it has no single pipeline '{prefix}'; it {found}\n"
            "give an id of these, or a recipe (a .yaml file), or nothing for the latest"
        )
    return fitting[0]


def gather(store: Store, pipeline_id: str) -> PipelineFacts:
    """Read the journal of a pipeline and the manifests of its stages, finished or not.

    Raises:
        UserError: there is no such pipeline, or it has left no journal.
    """
    known = store.pipelines()
    if pipeline_id not in known:
        raise UserError(
            f"store {store.location}: pipeline {pipeline_id} was not run in it; "
            f"it has {_some(known) or 'none'}\n"
            "run it first with pbkd run, or name another store with --store DIR"
        )
    records, _ = store.journal(pipeline_id).read()
    begins = [number for number, record in enumerate(records) if record.get("type") == "pipeline"]
    if not begins:
        place = store.records(pipeline_id).location("journal.jsonl")
        raise UserError(f"{place}: tells of no run; run the recipe again: pbkd run RECIPE")
    latest, this_run = records[begins[-1]], records[begins[-1] :]
    ends = [record for record in records if record.get("type") == "ended"]
    exports = {record["path"]: record for record in records if record.get("type") == "export"}
    end = ends[-1] if any(record.get("type") == "ended" for record in this_run) else None
    return PipelineFacts(
        id=pipeline_id,
        name=latest["name"],
        store=store.location,
        recipe_path=store.recipe(pipeline_id),
        recipe=latest.get("recipe") or {},
        teacher=latest["teacher"],
        student=latest["student"],
        status=end["status"] if end else None,
        reason=str(end.get("reason") or "") if end else "",
        begun=records[begins[0]]["time"],
        ended=ends[-1]["time"] if ends else None,
        stages=_stages(store, records, this_run, is_over=end is not None),
        exports=tuple(exports.values()),
    )


def shock_groups(facts: PipelineFacts) -> list[list[Shock]]:
    """The stages that recorded gradient shock, those of a common origin together.

    The origin is what a stage starts from, with stabilizations skipped: so the same network's training with
    and without them is one group. Stabilizing itself moves no features and is left out.
    """
    groups: dict[str, list[Shock]] = {}
    for stage in facts.stages.values():
        if stage.kind == "stabilize" or not (stage.series("gradient_norm") or stage.series("feature_cka")):
            continue
        origin, stabilized = stage.source, 0
        while origin is not None and facts.stages[origin].kind == "stabilize":
            rows = facts.stages[origin].rows
            stabilized += int(max((row["step"] for row in rows), default=0))
            origin = facts.stages[origin].source
        shock = Shock(stage, origin or "fresh weights", stabilized)
        groups.setdefault(origin or stage.name, []).append(shock)
    return list(groups.values())


def _stages(
    store: Store, records: Sequence[Record], this_run: Sequence[Record], *, is_over: bool
) -> dict[str, StageFacts]:
    """Every stage of the latest run, from what all runs of the pipeline have recorded."""
    started = _by_name(records, "started")
    done = _by_name(records, "finished")
    latest, since, failed = this_run[0], _by_name(this_run, "started"), _by_name(this_run, "failed")
    names = list(latest["stages"])
    keys = {name: (done.get(name) or started.get(name) or {}).get("key") for name in names}
    name_of = {key: name for name, key in reversed(keys.items()) if key is not None}
    progress: dict[str, list[Row]] = {}
    latencies: dict[str, Mapping[str, float | None]] = {}
    for record in records:
        if record.get("type") == "progress":
            progress.setdefault(record["key"], []).append(record["row"])
        elif record.get("type") == "latency":
            latencies[record["key"]] = record.get("latencies") or {"latency_ms": record["milliseconds"]}
    stages = {}
    for name in names:
        key = keys[name]
        manifest, damage = _manifest(store, key)
        inputs: Iterable[tuple[str, str]] = ()
        if manifest is not None:
            inputs = ((given.role, given.key) for given in manifest.inputs)
        elif name in started:
            inputs = ((given["role"], given["key"]) for given in started[name]["inputs"])
        by_name = tuple((role, name_of[other]) for role, other in inputs if other in name_of)
        if key is None and (source := _planned_source(latest, names, name)) is not None:
            by_name = (("from", source),)
        state: State = "not begun"
        if manifest is not None:
            state = "finished"
        elif damage:
            state = "damaged"
        elif name in done:
            state = "removed"
        elif name in failed:
            state = "failed"
        elif name in started:
            state = "running" if name in since and not is_over else "interrupted"
        stages[name] = StageFacts(
            name=name,
            kind=manifest.kind if manifest else started.get(name, {}).get("kind") or _kind(latest, name),
            role=_role(latest, name),
            state=state,
            key=key,
            inputs=by_name,
            manifest=manifest,
            rows=tuple(manifest.history if manifest else progress.get(key or "", ())),
            latencies=latencies.get(key or "", {}),
            reason=damage or str(failed.get(name, {}).get("reason", "")),
            begun=started[name]["time"] if name in started else None,
            has_artifact=manifest is not None and store.artifact(manifest.artifact).is_dir(),
        )
    return stages


def _manifest(store: Store, key: str | None) -> tuple[Manifest | None, str]:
    """The manifest of `key`, or what is wrong with it."""
    try:
        return (store.manifest(key) if key else None), ""
    except UserError as error:
        return None, str(error)


def _by_name(records: Iterable[Record], kind: str) -> dict[str, Record]:
    """The latest record of that type of each stage."""
    return {record["name"]: record for record in records if record.get("type") == kind}


def _role(latest: Record, name: str) -> str:
    if name in (latest.get("baselines") or ()):
        return "baseline"
    return {latest["teacher"]: "teacher", latest["student"]: "student"}.get(name, "stage")


def _kind(latest: Record, name: str) -> str:
    """What the recipe calls it; a member of a progressive stage is known by its group only."""
    return str(_settings(latest, name).get("kind", "?"))


def _settings(latest: Record, name: str) -> Mapping[str, Any]:
    """What the recipe says of a stage, or of the group it is a member of."""
    stages = (latest.get("recipe") or {}).get("stages") or {}
    return stages.get(name) or stages.get(name.rpartition(".")[0]) or {}


def _planned_source(latest: Record, names: Sequence[str], name: str) -> str | None:
    """The stage that one which no run has come to would start from, by the recipe's rules."""
    settings, position = _settings(latest, name), names.index(name)
    if settings.get("kind") == "load" or settings.get("network") or not position:
        return None
    group, before = name.rpartition(".")[0], names[position - 1]
    if settings.get("from") and not (group and before.startswith(f"{group}.")):
        fitting = [other for other in names if settings["from"] in (other, other.rpartition(".")[0])]
        return fitting[-1] if fitting else None
    return before


def _some(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
