"""A pipeline's facts as one HTML page that needs nothing else: no network, no script, figures within."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.quantities import duration, human
from pipelines.reporting import figures, training_figures
from pipelines.reporting.drawing import Drawing
from pipelines.reporting.facts import PipelineFacts, Shock, StageFacts, shock_groups
from pipelines.reporting.pipeline_figure import pipeline_figure
from pipelines.reporting.reproduce import commands, provenance, recipe_of

HERE = Path(__file__).parent
NOTHING = "–"
MINUS = "\N{MINUS SIGN}"
SHOWN_DIGITS = 12
STATES = {
    "finished": "finished",
    "running": "begun, not ended (running, or killed)",
    "failed": "failed",
    "interrupted": "interrupted: the next run goes on with it",
    "not begun": "not begun",
    "removed": "its manifest is gone from the store: the next run repeats it",
    "damaged": "its manifest cannot be read",
}
STATUS = {
    "finished": "finished",
    "failed": "failed",
    "stopped": "stopped",
    None: "not ended (running, or killed)",
}


@dataclass(frozen=True)
class Column:
    """A column of a table of stages: a metric or latency, and how its number is written."""

    title: str
    metric: str
    form: Callable[[float], str]
    tip: str = ""
    if_any: bool = False  # leave it out where no stage has a value
    of_teacher: str | None = None  # this metric of the pipeline's teacher, divided by the stage's `metric`


@dataclass(frozen=True)
class Card:
    """A number that says at a glance what came of it, and what it is measured against."""

    title: str
    number: str
    beside: str


@dataclass(frozen=True)
class Report:
    """A page, and the drawings it shows, for files of their own."""

    html: str
    drawings: Sequence[Drawing]


def _digits(number: int, unit: str = "") -> Callable[[float], str]:
    return lambda value: f"{value:,.{number}f}{unit}"


COSTS = (
    Column("test, %", "test_accuracy", _digits(2), "accuracy on the test set after the last epoch"),
    Column("params", "params", human, "parameters"),
    Column(
        "compression",
        "nonzero_params",
        _digits(2, "x"),
        "the teacher's parameters over those not zero here",
        of_teacher="params",
    ),
    Column("MACs", "macs", human, "multiply-accumulates of one image"),
    Column("MACs ratio", "macs", _digits(2, "x"), "the teacher's MACs over those here", of_teacher="macs"),
    Column(
        "without zeros",
        "nonzero_macs",
        _digits(2, "x"),
        "the same, if nothing were multiplied by zero",
        of_teacher="macs",
    ),
    Column("ms, batch 1", "latency_ms", _digits(2), "milliseconds for one image, median"),
    Column("ms, batch 32", "latency_ms_batch32", _digits(2), "milliseconds for 32 images, median"),
    Column("compiled, batch 1", "latency_ms_compiled", _digits(2), "by torch.compile, milliseconds", True),
    Column("compiled, batch 32", "latency_ms_batch32_compiled", _digits(2), "by torch.compile, ms", True),
    Column("memory, MB", "memory_peak_mb", _digits(0), "the stage's peak"),
)
QUALITIES = (
    Column("test, %", "test_accuracy", _digits(2), "accuracy on the test set after the last epoch"),
    Column("top-5, %", "test_top5", _digits(2), "the right class is among the five best"),
    Column("agreement, %", "agreement", _digits(2), "test images it puts into the teacher's class"),
    Column("KL", "kl", _digits(4), "mean KL(teacher, stage) on the test set, nats"),
    Column("ECE, %", "ece", _digits(2), "expected calibration error, 15 bins"),
    Column("NLL", "nll", _digits(4), "negative log-likelihood of the test labels, nats"),
)


def compose(facts: PipelineFacts, command: str | None = None) -> Report:
    """The page and its figures. `command` is what was typed to run the recipe, if it is known."""
    overview = pipeline_figure(facts)
    trades = [
        drawing
        for metric, axis, name in (
            ("macs", "multiply-accumulates of one image", "accuracy_macs"),
            ("latency_ms", "ms for one image", "accuracy_latency"),
            ("latency_ms_batch32", "ms for 32 images", "accuracy_latency_batch32"),
        )
        if (drawing := figures.trade_off(facts, metric, axis, name)) is not None
    ]
    fidelity = figures.fidelity(facts)
    groups = shock_groups(facts)
    shocks = [training_figures.shock(group, f"shock_{number}") for number, group in enumerate(groups, 1)]
    errors, losses = training_figures.feature_errors(facts), training_figures.local_losses(facts)
    trained = [
        stage
        for stage in facts.stages.values()
        if stage.series(training_figures.LOSS) or stage.series(training_figures.ACCURACY)
    ]
    html = fill(
        "page.html",
        facts=facts,
        headline=headline(facts),
        cards=cards(facts),
        head=_head(facts),
        missing=_missing(facts),
        progress=_progress,
        overview=overview,
        trades=trades,
        costs=_table(facts, COSTS, with_time=True),
        fidelity=fidelity,
        qualities=_table(facts, QUALITIES),
        exports=[_export(record) for record in facts.exports],
        shocks=[(drawing, _shock(group)) for drawing, group in zip(shocks, groups, strict=True)],
        shock_missing=_shock_missing(facts, groups),
        errors=errors,
        losses=losses,
        curves=[
            (stage, training_figures.curves(stage, f"curves{number}")) for number, stage in enumerate(trained)
        ],
        lineage=[_lineage(facts, stage) for stage in facts.stages.values()],
        way=facts.path(facts.student),
        provenance=provenance(facts),
        commands=commands(facts, command),
        recipe=recipe_of(facts),
    )
    sheet = [training_figures.curve_sheet(trained)] if trained else []
    singles = [drawing for drawing in (fidelity, errors) if drawing is not None]
    return Report(html, [overview, *trades, *singles, *shocks, *losses, *sheet])


def fill(template: str, **content: object) -> str:
    """A page from one of this package's templates."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (HERE / "page.css").read_text("utf-8")
    return environment.get_template(template).render(style=style, **content)


def headline(facts: PipelineFacts) -> str:
    """The student against the teacher in one sentence."""
    student, teacher = facts.stages[facts.student], facts.stages[facts.teacher]
    for stage, role in ((teacher, "teacher"), (student, "student")):
        if stage.manifest is None:
            return f"The {role}, {stage.name}, is not finished yet: student and teacher cannot be compared."
    accuracy, reference = student.value("test_accuracy"), teacher.value("test_accuracy")
    said = f"The student, {student.name}, "
    if accuracy is not None and reference is not None:
        said += f"reaches {accuracy:.2f} % on the test set, the teacher {reference:.2f} % "
        said += f"({_signed(accuracy - reference)}); it "
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


def cards(facts: PipelineFacts) -> list[Card]:
    """The student's numbers beside the teacher's, those that are known."""
    student, teacher = facts.stages[facts.student], facts.stages[facts.teacher]
    found = []
    accuracy, reference = student.value("test_accuracy"), teacher.value("test_accuracy")
    if accuracy is not None:
        beside = (
            "" if reference is None else f"{_signed(accuracy - reference)} to the teacher's {reference:.2f}"
        )
        found.append(Card("test accuracy", f"{accuracy:.2f}\N{NO-BREAK SPACE}%", beside))
    for metric, title, form in (
        ("macs", "fewer multiply-accumulates", human),
        ("params", "fewer parameters", human),
        ("latency_ms", "as fast, one image", "{:.2f} ms".format),
        ("latency_ms_batch32", "as fast, 32 images", "{:.2f} ms".format),
    ):
        before, after = teacher.value(metric), student.value(metric)
        if before and after:
            found.append(Card(title, f"{before / after:.2f}x", f"{form(after)} instead of {form(before)}"))
    if (agreement := student.value("agreement")) is not None:
        found.append(
            Card("agreement with the teacher", f"{agreement:.2f}\N{NO-BREAK SPACE}%", "of test images")
        )
    return found


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", MINUS)


def _ratio(teacher: StageFacts, student: StageFacts, metric: str) -> float | None:
    first, second = teacher.value(metric), student.value(metric)
    return first / second if first and second else None


def _head(facts: PipelineFacts) -> list[tuple[str, str]]:
    data = facts.recipe.get("data") or {}
    seconds = [stage.seconds for stage in facts.stages.values() if stage.seconds is not None]
    return [
        ("pipeline", facts.id),
        ("data", str(data.get("name", NOTHING))),
        ("seed", str(facts.recipe.get("seed", NOTHING))),
        ("begun, UTC", _when(facts.begun)),
        ("ended, UTC", _when(facts.ended)),
        ("all stages took", duration(sum(seconds)) if seconds else NOTHING),
        ("latest run", STATUS[facts.status]),
        ("stages finished", f"{len(facts.finished)} of {len(facts.stages)}"),
    ]


def _missing(facts: PipelineFacts) -> list[str]:
    """What a finished pipeline would have and this one lacks, apart from unfinished stages."""
    lost = [stage.name for stage in facts.finished if not stage.has_artifact]
    untimed = [stage.name for stage in facts.finished if stage.value("latency_ms") is None]
    found = []
    if lost:
        found.append(
            f"The store has lost the networks of {', '.join(lost)}: only their numbers are left. "
            "pbkd store check says how to get them back."
        )
    if untimed:
        what = "no stage" if len(untimed) == len(facts.finished) else f"not {', '.join(untimed)}"
        found.append(f"Latency was measured of {what}: that is done at a pipeline's end.")
    return found


def _table(
    facts: PipelineFacts, wanted: Sequence[Column], with_time: bool = False
) -> tuple[list[Column], list[tuple[StageFacts, list[str]]]]:
    """The columns that are shown, and of every stage what stands in them."""
    shown = [
        column
        for column in wanted
        if not column.if_any or any(stage.value(column.metric) is not None for stage in facts.finished)
    ]
    rows = []
    for stage in facts.stages.values():
        cells = []
        for column in shown:
            value = stage.value(column.metric)
            if column.of_teacher is not None and value:
                whole = facts.stages[facts.teacher].value(column.of_teacher)
                value = whole / value if whole else None
            cells.append(NOTHING if value is None else column.form(value))
        if with_time:
            cells.append(NOTHING if stage.seconds is None else duration(stage.seconds))
        rows.append((stage, cells))
    if with_time:
        shown.append(Column("time", "seconds", duration, "what the stage took"))
    return shown, rows


def _progress(stage: StageFacts) -> str:
    """Its state, how far it has come, and what stopped it."""
    text = STATES[stage.state]
    if stage.manifest is None and stage.rows:
        text += f"; at epoch {stage.rows[-1]['epoch']:g}"
    return f"{text}: {stage.reason}" if stage.reason else text


def _shock(group: Sequence[Shock]) -> list[tuple[str, ...]]:
    def number(value: float | None, digits: int) -> str:
        return NOTHING if value is None else f"{value:.{digits}f}"

    rows: list[tuple[str, ...]] = []
    for shock in group:
        norms, similarities = ([value for _, value in points] for points in (shock.norms, shock.similarities))
        rows.append(
            (
                shock.stage.name,
                training_figures.stabilization(shock),
                number(norms[0] if norms else None, 3),
                number(max(norms, default=None), 3),
                number(min(similarities, default=None), 4),
                number(similarities[-1] if similarities else None, 4),
                number(shock.stage.value("test_accuracy"), 2),
            )
        )
    return rows


def _shock_missing(facts: PipelineFacts, groups: Sequence[Sequence[Shock]]) -> str:
    """What the section on gradient shock lacks, and what would bring it; empty if it has both sides."""
    if any(not shock.stabilized for group in groups for shock in group):
        return ""
    if groups:
        origin = groups[0][0].origin
        return (
            "Recorded with stabilization alone. To see what it is worth, train without it too: "
            f"by a stage with from: {origin} and shock: true, as compare_digits.yaml has one."
        )
    stages: Mapping[str, Mapping[str, object]] = facts.recipe.get("stages") or {}
    if asked := [name for name, settings in stages.items() if settings.get("shock")]:
        return f"Not recorded yet: {', '.join(asked)} will, once begun."
    return "Not recorded: no stage of the recipe has shock: true, such as one of kind distill."


def _export(record: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table of exported files."""
    form = record["format"] + (", fp16" if record["fp16"] else "")
    latency = record["latency_ms"] or {}
    times = (f"{latency[by]:.2f}" if by in latency else NOTHING for by in ("file", "pytorch"))
    parity = (f"{record['max_abs_diff']:.1e}", f"{record['agreement']:.2f}", record["compared_on"])
    return (record["stage"], form, f"{record['bytes'] / 1e6:.2f}", *times, *parity, record["path"])


def _lineage(facts: PipelineFacts, stage: StageFacts) -> Mapping[str, str]:
    made_from = ", ".join(name for role, name in stage.inputs if role != "teacher")
    artifact = NOTHING
    if stage.manifest is not None:
        artifact = f"artifacts/{stage.manifest.artifact}" if stage.has_artifact else "gone from the store"
    return {
        "stage": stage.name,
        "role": stage.role,
        "from": made_from or NOTHING,
        "teacher": dict(stage.inputs).get("teacher", NOTHING),
        "key": (stage.key or NOTHING)[:SHOWN_DIGITS],
        "artifact": artifact,
    }


def _when(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
