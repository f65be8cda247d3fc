"""A pipeline's facts as one HTML page that needs nothing else: no network, no script, figures within."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from pbkd.errors import UserError
from pipelines import figures
from pipelines.display import human
from pipelines.durable import replace
from pipelines.report import PipelineFacts, Shock, StageFacts, shock_groups

NOTHING = "–"
SHOWN_DIGITS = 12
STATES = {
    "finished": "finished",
    "running": "begun, not ended (running, or killed)",
    "interrupted": "interrupted: the next run goes on with it",
    "not begun": "not begun",
    "removed": "its manifest is gone from the store: the next run repeats it",
}
STATUS = {
    "finished": "finished",
    "failed": "failed",
    "stopped": "stopped",
    None: "not ended (running, or killed)",
}


@dataclass(frozen=True)
class Column:
    """A column of the table of stages: a metric or latency, and how its number is written."""

    title: str
    metric: str
    form: Callable[[float], str]
    tip: str = ""
    if_any: bool = False  # leave it out where no stage has a value


def _digits(number: int, unit: str = "") -> Callable[[float], str]:
    return lambda value: f"{value:,.{number}f}{unit}"


COLUMNS = (
    Column("test, %", "test_accuracy", _digits(2), "accuracy on the test set after the last epoch"),
    Column("top-5, %", "test_top5", _digits(2), "the right class is among the five best"),
    Column("NLL", "nll", _digits(4), "negative log-likelihood of the test labels, nats"),
    Column("ECE, %", "ece", _digits(2), "expected calibration error, 15 bins"),
    Column("agreement, %", "agreement", _digits(2), "test images it puts into the teacher's class"),
    Column("KL", "kl", _digits(4), "mean KL(teacher, stage) on the test set, nats"),
    Column("params", "params", human, "parameters"),
    Column("non-zero", "nonzero_params", human, "parameters that are not zero"),
    Column("MACs", "macs", human, "multiply-accumulates of one image"),
    Column("MACs ratio", "macs_ratio", _digits(2, "x"), "MACs of the pipeline's teacher over the stage's"),
    Column("ms, batch 1", "latency_ms", _digits(2), "milliseconds for one image, median"),
    Column("ms, batch 32", "latency_ms_batch32", _digits(2), "milliseconds for 32 images, median"),
    Column("compiled, batch 1", "latency_ms_compiled", _digits(2), "by torch.compile, milliseconds", True),
    Column("compiled, batch 32", "latency_ms_batch32_compiled", _digits(2), "by torch.compile, ms", True),
    Column("memory, MB", "memory_peak_mb", _digits(0), "the stage's peak"),
)


def render(facts: PipelineFacts, command: str | None = None) -> str:
    """The page. `command` is what was typed to run the recipe, if it is known."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("pipelines").joinpath("report_page.html").read_text("utf-8"))
    columns = [
        column
        for column in COLUMNS
        if not column.if_any or any(stage.value(column.metric) is not None for stage in facts.finished)
    ]
    recorded = shlex.join(["pbkd", "run", str(facts.folder / "recipe.yaml"), "--store", str(facts.store)])
    return template.render(
        facts=facts,
        headline=headline(facts),
        head=_head(facts),
        columns=columns,
        rows=[(stage, _cells(facts, stage, columns)) for stage in facts.stages.values()],
        states=STATES,
        progress=_progress,
        accuracy=figures.accuracy_against_macs(facts),
        shocks=[_shock(group, f"shock{number}") for number, group in enumerate(shock_groups(facts))],
        curves=[
            (stage, figures.training_curves(stage, f"curves{number}"))
            for number, stage in enumerate(facts.stages.values())
            if stage.series("train_loss") or stage.series("val_accuracy")
        ],
        lineage=[_lineage(facts, stage) for stage in facts.stages.values()],
        provenance=_provenance(facts),
        commands=[command, recorded] if command else [recorded],
        recipe=_recipe(facts),
    )


def write(page: str, path: Path) -> Path:
    """Write it and return the absolute path. Raises UserError if that cannot be."""
    path = path.expanduser().absolute()
    try:
        replace(path, page.encode(), sync=False)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}\nname one in a folder that exists: --out FILE.html"
        ) from error
    return path


def headline(facts: PipelineFacts) -> str:
    """The student against the teacher in one sentence."""
    student, teacher = facts.stages[facts.student], facts.stages[facts.teacher]
    for stage, role in ((teacher, "teacher"), (student, "student")):
        if stage.manifest is None:
            return f"The {role}, {stage.name}, is not finished yet: student and teacher cannot be compared."
    accuracy, reference = student.value("test_accuracy"), teacher.value("test_accuracy")
    said = f"The student, {student.name}, "
    if accuracy is not None and reference is not None:
        difference = f"{accuracy - reference:+.2f}".replace("-", "−")
        said += f"reaches {accuracy:.2f} % on the test set, the teacher {reference:.2f} % ({difference}); it "
    fewer = [
        f"{ratio:.2f}x fewer {noun}"
        for metric, noun in (("macs", "multiply-accumulates"), ("params", "parameters"))
        if (ratio := _ratio(teacher, student, metric)) is not None
    ]
    said += f"has {' and '.join(fewer)}" if fewer else "was not counted"
    if (ratio := _ratio(teacher, student, "latency_ms")) is not None:
        said += f" and was measured {ratio:.2f}x as fast (one image in {student.value('latency_ms'):.2f} ms "
        said += f"instead of {teacher.value('latency_ms'):.2f} ms)"
    return said.replace(" %", "\N{NO-BREAK SPACE}%") + "."


def _ratio(teacher: StageFacts, student: StageFacts, metric: str) -> float | None:
    first, second = teacher.value(metric), student.value(metric)
    return first / second if first and second else None


def _head(facts: PipelineFacts) -> list[tuple[str, str]]:
    data = facts.recipe.get("data") or {}
    return [
        ("pipeline", facts.id),
        ("data", str(data.get("name", NOTHING))),
        ("seed", str(facts.recipe.get("seed", NOTHING))),
        ("begun, UTC", _when(facts.begun)),
        ("ended, UTC", _when(facts.ended)),
        ("latest run", STATUS[facts.status]),
        ("stages finished", f"{len(facts.finished)} of {len(facts.stages)}"),
    ]


def _cells(facts: PipelineFacts, stage: StageFacts, columns: Sequence[Column]) -> list[str]:
    cells = []
    for column in columns:
        value = stage.value(column.metric)
        if column.metric == "macs_ratio":
            # The manifest's is to the stage's own teacher, which may be an assistant.
            value = _ratio(facts.stages[facts.teacher], stage, "macs")
        cells.append(NOTHING if value is None else column.form(value))
    return [*cells, NOTHING if stage.manifest is None else f"{stage.manifest.seconds:,.1f}"]


def _progress(stage: StageFacts) -> str:
    """Its state, and how far it has come."""
    text = STATES[stage.state]
    return f"{text}; at epoch {stage.rows[-1]['epoch']:g}" if stage.manifest is None and stage.rows else text


def _shock(group: Sequence[Shock], name: str) -> dict[str, object]:
    def number(value: float | None, digits: int) -> str:
        return NOTHING if value is None else f"{value:.{digits}f}"

    rows = []
    for shock in group:
        norms, similarities = ([value for _, value in points] for points in (shock.norms, shock.similarities))
        rows.append(
            (
                shock.stage.name,
                figures.stabilization(shock),
                number(norms[0] if norms else None, 3),
                number(max(norms, default=None), 3),
                number(min(similarities, default=None), 4),
                number(similarities[-1] if similarities else None, 4),
                number(shock.stage.value("test_accuracy"), 2),
            )
        )
    return {
        "origin": group[0].origin,
        "norms": figures.gradient_norms(group, f"{name}norms"),
        "similarity": figures.feature_similarity(group, f"{name}cka"),
        "rows": rows,
    }


def _lineage(facts: PipelineFacts, stage: StageFacts) -> tuple[str, ...]:
    made_from = ", ".join(name for role, name in stage.inputs if role != "teacher")
    artifact = f"artifacts/{stage.manifest.artifact}" if stage.manifest else NOTHING
    return (
        stage.name,
        made_from or NOTHING,
        dict(stage.inputs).get("teacher", NOTHING),
        (stage.key or NOTHING)[:SHOWN_DIGITS],
        artifact,
    )


def _provenance(facts: PipelineFacts) -> list[tuple[str, str]]:
    """What the stages were made with; more than one value where they were not all made alike."""
    manifests = [stage.manifest for stage in facts.finished if stage.manifest is not None]
    found: list[tuple[str, list[str | None]]] = [
        ("data digest", [manifest.data_digest for manifest in manifests]),
        ("git commit", [manifest.git for manifest in manifests]),
        ("machine", [_pairs(manifest.machine) for manifest in manifests]),
        ("compute", [_pairs(manifest.compute) for manifest in manifests]),
        ("versions", [_pairs(manifest.versions) for manifest in manifests]),
    ]
    return [(title, " / ".join(dict.fromkeys(text or NOTHING for text in texts))) for title, texts in found]


def _pairs(mapping: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in mapping.items())


def _recipe(facts: PipelineFacts) -> str:
    path = facts.folder / "recipe.yaml"
    return path.read_text("utf-8") if path.is_file() else ""


def _when(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
