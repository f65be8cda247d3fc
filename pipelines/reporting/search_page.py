"""A search as one HTML page: its trials by accuracy and cost, what the searched values did, the winners."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pipelines.quantities import duration, human
from pipelines.reporting.drawing import BLUE, GREEN, GREY, VERMILLION, Canvas, Drawing, plain_ticks
from pipelines.reporting.page import NOTHING, STATUS, Card, Report, fill
from pipelines.reporting.search_facts import SearchFacts, TrialFacts

COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("macs", "multiply-accumulates of one image", human),
    ("latency_ms", "ms for one image", "{:.2f}".format),
)
LOOKS: dict[str, dict[str, Any]] = {
    "finished": {"marker": "o", "color": BLUE, "markersize": 6.0},
    "stopped": {"marker": "x", "color": GREY, "markersize": 6.0},
    "over": {"marker": "^", "color": GREY, "markersize": 6.0},
}
WINNER: dict[str, Any] = {"marker": "*", "color": VERMILLION, "markersize": 13.0, "zorder": 4}
TEACHER: dict[str, Any] = {"marker": "s", "color": GREEN, "markersize": 8.0}


def compose_search(facts: SearchFacts) -> Report:
    """The page and its figures."""
    drawings = [
        Drawing(
            f"search_{cost}",
            f"Validation accuracy against {axis} of the trials",
            partial(_trade_off, facts, cost, axis, form),
            (6.4, 4.2),
            (4.05, 3.6),
        )
        for cost, axis, form in COSTS
        if any(_is_placed(trial, cost) for trial in facts.trials)
    ]
    keys = list(facts.described["parameters"])
    measured = [trial for trial in facts.trials if trial.values.get("val_accuracy") is not None]
    if measured:
        rows, few = -(-len(keys) // 4), -(-len(keys) // 2)
        drawings.append(
            Drawing(
                "search_values",
                "Validation accuracy of the trials by the values of each searched key",
                partial(_values, facts, measured, keys),
                (10.2, 2.3 * rows),
                (4.05, 1.9 * few),
            )
        )
    html = fill(
        "search.html",
        facts=facts,
        headline=headline_of(facts),
        cards=_cards(facts),
        head=_head(facts),
        drawings=drawings,
        keys=keys,
        rows=[(trial, _cells(trial, keys)) for trial in _ordered(facts)],
        winners=[trial.number for trial in facts.winners],
        asked=[(key, ", ".join(map(str, values))) for key, values in facts.described["parameters"].items()],
        commands=[
            shlex.join(["pbkd", "report", f"{facts.name}.{trial.number:04d}", "--store", facts.store])
            for trial in facts.winners
        ],
    )
    return Report(html, drawings)


def headline_of(facts: SearchFacts) -> str:
    """What was tried and what came of it, in a sentence."""
    finished = sum(trial.outcome == "finished" for trial in facts.trials)
    said = f"{finished} of {len(facts.trials)} trials finished"
    if not facts.winners:
        return f"{said}; there is no winner yet."
    best = facts.winners[0]
    accuracy = f"{best.values['val_accuracy']:.2f}\N{NO-BREAK SPACE}%"
    if len(facts.winners) == 1:
        return f"{said}; trial {best.number} wins with {accuracy} on the validation split."
    return (
        f"{said}; {len(facts.winners)} of them are on the front of {', '.join(facts.goals)}, "
        f"the most accurate one, trial {best.number}, with {accuracy} on the validation split."
    )


def _cards(facts: SearchFacts) -> list[Card]:
    found = [Card("trials", str(len(facts.trials)), _outcomes(facts))]
    requested = sum(len(trial.stages) for trial in facts.trials)
    if requested:
        distinct = len({key for trial in facts.trials for key in trial.stages})
        ran = sum(trial.ran for trial in facts.trials)
        found.append(
            Card("stages run", str(ran), f"of {requested} that trials asked for, {distinct} distinct")
        )
    if facts.winners:
        best = facts.winners[0]
        found.append(
            Card(
                "best validation accuracy",
                f"{best.values['val_accuracy']:.2f}\N{NO-BREAK SPACE}%",
                f"trial {best.number}",
            )
        )
        macs = facts.teacher.metrics.get("macs") if facts.teacher else None
        if macs and (own := best.values.get("macs")):
            found.append(
                Card(
                    "its fewer multiply-accumulates",
                    f"{macs / own:.2f}x",
                    f"{human(own)} instead of {human(macs)}",
                )
            )
    return found


def _outcomes(facts: SearchFacts) -> str:
    outcomes = [trial.outcome for trial in facts.trials]
    return ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))


def _head(facts: SearchFacts) -> list[tuple[str, str]]:
    told = facts.described
    limits = {
        name: value for name, value in told["objective"].items() if name != "goals" and value is not None
    }
    return [
        ("recipe", str(told["recipe"]["name"])),
        ("space", str(told["space"])),
        ("goals", ", ".join(facts.goals)),
        ("limits", ", ".join(f"{name} {value:g}" for name, value in limits.items()) or "none"),
        ("sampler, seed", f"{told['sampler']}, {told['seed']}"),
        ("latest driver", STATUS.get(facts.status, str(facts.status))),
    ]


def _is_placed(trial: TrialFacts, cost: str) -> bool:
    return trial.outcome in LOOKS and None not in (trial.values.get(cost), trial.values.get("val_accuracy"))


def _ordered(facts: SearchFacts) -> list[TrialFacts]:
    """Winners first, then by accuracy; what has none last."""
    winners = {trial.number for trial in facts.winners}

    def rank(trial: TrialFacts) -> tuple[bool, float, int]:
        accuracy = trial.values.get("val_accuracy")
        return trial.number not in winners, -(accuracy if accuracy is not None else -1.0), trial.number

    return sorted(facts.trials, key=rank)


def _cells(trial: TrialFacts, keys: Sequence[str]) -> list[str]:
    forms: tuple[tuple[str, Callable[[float], str]], ...] = (
        ("val_accuracy", "{:.2f}".format),
        ("macs", human),
        ("params", human),
        ("latency_ms", "{:.2f}".format),
    )
    values = [(trial.values.get(name), form) for name, form in forms]
    cells = [NOTHING if value is None else form(value) for value, form in values]
    cells.append(NOTHING if trial.seconds is None else duration(trial.seconds))
    return cells + [str(trial.params.get(key, NOTHING)) for key in keys]


def _says(trial: TrialFacts) -> str:
    return f"trial {trial.number}: " + ", ".join(
        f"{key.rpartition('stages.')[2]} {value}" for key, value in trial.params.items()
    )


def _trade_off(
    facts: SearchFacts, cost: str, axis: str, form: Callable[[float], str], canvas: Canvas
) -> None:
    axes = canvas.figure.subplots()
    winners = [trial for trial in facts.winners if _is_placed(trial, cost)]
    front = sorted(
        (float(trial.values[cost] or 0), float(trial.values["val_accuracy"] or 0)) for trial in winners
    )
    if len(facts.goals) > 1:
        axes.plot([x for x, _ in front], [y for _, y in front], color=VERMILLION, linewidth=1.0, alpha=0.5)
    for trial in facts.trials:
        if _is_placed(trial, cost):
            look = WINNER if trial in winners else LOOKS[trial.outcome]
            x, y = float(trial.values[cost] or 0), float(trial.values["val_accuracy"] or 0)
            canvas.mark(axes, x, y, f"trial {trial.number}", _says(trial), **look)
    numbers: dict[tuple[float, float], list[str]] = {}
    for trial in winners:
        place = (float(trial.values[cost] or 0), float(trial.values["val_accuracy"] or 0))
        numbers.setdefault(place, []).append(str(trial.number))
    for place, equal in numbers.items():
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": VERMILLION}
        axes.annotate(", ".join(equal), place, xytext=(8, 5), **style)
    if facts.teacher is not None and (accuracy := facts.teacher.metrics.get("val_accuracy")) is not None:
        axes.axhline(accuracy, color=GREEN, linestyle=":", linewidth=1.2)
        if cost == "macs":
            canvas.mark(
                axes,
                float(facts.teacher.metrics["macs"] or 0),
                accuracy,
                "teacher",
                f"teacher: {accuracy:.2f} %",
                **TEACHER,
            )
    axes.set_xscale("log")
    plain_ticks(axes.xaxis, form)
    axes.set(xlabel=f"{axis} (log scale)", ylabel="validation accuracy, %")


def _values(facts: SearchFacts, measured: Sequence[TrialFacts], keys: Sequence[str], canvas: Canvas) -> None:
    across = 2 if canvas.is_narrow else 4
    winners = {trial.number for trial in facts.winners}
    grid = canvas.figure.subplots(-(-len(keys) // across), across, sharey=True, squeeze=False)
    for axes in list(grid.flat)[len(keys) :]:
        axes.set_visible(False)
    for axes, key in zip(grid.flat, keys, strict=False):
        ticks = list(dict.fromkeys(str(value) for value in facts.described["parameters"][key]))
        ticks += [
            text
            for text in dict.fromkeys(str(trial.params.get(key)) for trial in measured)
            if text not in ticks
        ]
        for trial in measured:
            look = dict(WINNER) if trial.number in winners else LOOKS.get(trial.outcome, LOOKS["stopped"])
            x, y = ticks.index(str(trial.params.get(key))), float(trial.values["val_accuracy"] or 0)
            axes.plot([x], [y], linestyle="", alpha=0.8, **(look | {"markersize": 0.75 * look["markersize"]}))
        step = -(-len(ticks) // 6)
        axes.set_xticks(range(0, len(ticks), step), ticks[::step], fontsize=8)
        axes.set_title(key.rpartition("stages.")[2], fontsize=9)
    canvas.figure.supylabel("validation accuracy, %", fontsize=9)
