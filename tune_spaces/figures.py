"""Figures of a search, as PNG: trials by accuracy and cost, with the winners; which keys mattered."""

from __future__ import annotations

import io
from collections.abc import Mapping

from matplotlib import rc_context
from matplotlib.figure import Figure

from pipelines.manifest import Manifest
from pipelines.quantities import human
from pipelines.reporting.drawing import BLUE, GREY, LINES, STYLE, VERMILLION
from tune_spaces.objective import Objective
from tune_spaces.record import SearchRecord

COSTS = {"macs": "multiply-accumulates of one image", "latency_ms": "latency of one image, ms"}


def pareto_figure(record: SearchRecord, objective: Objective, teacher: Manifest | None) -> bytes:
    """Validation accuracy of every trial over its MACs, and over its latency if that was looked for."""
    costs = ["macs", "latency_ms"] if objective.wants_latency else ["macs"]
    winners = objective.winners(record.trials.values())
    with rc_context(STYLE):
        figure = Figure((6.5 * len(costs), 4.6), layout="constrained")
        for axes, cost in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs, strict=True):
            points = {"finished": [], "stopped": [], "over": []}  # type: dict[str, list[tuple[float, float]]]
            for trial in record.trials.values():
                x, y = trial.values.get(cost), trial.values.get("val_accuracy")
                if x is not None and y is not None and trial.outcome in points:
                    points[trial.outcome].append((x, y))
            for outcome, colour, marker in (
                ("finished", BLUE, "o"),
                ("stopped", GREY, "x"),
                ("over", GREY, "^"),
            ):
                if points[outcome]:
                    axes.scatter(*zip(*points[outcome], strict=True), c=colour, marker=marker, label=outcome)
            best = sorted((w.values[cost] or 0.0, w.values["val_accuracy"] or 0.0, w.number) for w in winners)
            if best:
                axes.plot(
                    [x for x, _, _ in best], [y for _, y, _ in best], "*-", color=VERMILLION, markersize=13,
                    label="winners" if len(best) > 1 else "winner",
                )  # fmt: skip
                for x, y, number in best:
                    axes.annotate(f"{number}", (x, y), xytext=(5, 6), textcoords="offset points", fontsize=8)
            accuracy = teacher.metrics.get("val_accuracy") if teacher is not None else None
            if accuracy is not None:
                axes.axhline(accuracy, color=GREY, linewidth=1, linestyle=":", label="teacher")
            if cost == "macs":
                axes.xaxis.set_major_formatter(lambda value, _: human(value))
            axes.set(xlabel=COSTS[cost], ylabel="validation accuracy, %")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.suptitle(record.name)
        return _png(figure)


def importance_figure(importance: Mapping[str, Mapping[str, float]]) -> bytes:
    """The share of each key in the variance of each measure, as bars."""
    keys = sorted({key for shares in importance.values() for key in shares}, reverse=True)
    with rc_context(STYLE):
        figure = Figure((8.0, 1.1 + 0.45 * len(keys)), layout="constrained")
        axes, height = figure.subplots(), 0.8 / len(importance)
        for number, (measure, shares) in enumerate(importance.items()):
            places = [place - number * height for place in range(len(keys))]
            widths = [shares.get(key, 0.0) for key in keys]
            axes.barh(places, widths, height, color=LINES[number][0], label=measure)
        axes.set_yticks([place - 0.4 + height / 2 for place in range(len(keys))], keys)
        axes.set(xlabel="share of the variance between trials (fANOVA)", xlim=(0, 1))
        figure.legend(loc="outside lower center", ncols=len(importance))
        return _png(figure)


def _png(figure: Figure) -> bytes:
    found = io.BytesIO()
    figure.savefig(found, format="png", dpi=130)
    return found.getvalue()
