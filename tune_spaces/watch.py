"""What a person sees of a search: a line for each trial, and a table at the end."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pipelines.quantities import human
from tune_spaces.record import Trial
from tune_spaces.results import Results
from tune_spaces.search import Watch

STYLES = {"stopped": "dim", "over": "dim", "refused": "dim", "failed": "red"}


class ConsoleWatch(Watch):
    """One line for every trial that has ended."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def ended(self, trial: Trial) -> None:
        """Print its line."""
        accuracy = trial.values.get("val_accuracy")
        parts = [
            f"trial {trial.number:<4}",
            f"{trial.outcome:<8}",
            "" if accuracy is None else f"val {accuracy:6.2f} %",
            "" if trial.values.get("macs") is None else f"MACs {human(trial.values['macs'])}",
            f"ran {len(trial.ran)} of {len(trial.stages)} stages in {trial.seconds:.1f} s",
        ]
        text = "  ".join(part for part in parts if part)
        reason = f"\n  {trial.message}" if trial.message else ""
        self._console.print(text + reason, markup=False, highlight=False, soft_wrap=True)


def table(results: Results) -> Group:
    """Trials with their validation accuracy; of the winners test accuracy and recipes; what was shared."""
    keys = [parameter.key for parameter in results.space.parameters]
    short = {key: key.removeprefix("stages.") for key in keys}
    rows = Table(title=f"{results.record.name}: trials", title_justify="left", box=None, pad_edge=False)
    for column in ("", *short.values(), "val %", "MACs", "ran", "s"):
        rows.add_column(column, justify="right", overflow="fold")
    winning = {winner.trial.number for winner in results.winners}
    unbegun = 0
    for trial in results.record.trials.values():
        if not trial.is_counted:
            unbegun += 1
            continue
        rows.add_row(
            str(trial.number),
            *(str(trial.params[key]) for key in keys),
            trial.outcome if trial.outcome != "finished" else _number(trial.values.get("val_accuracy")),
            human(trial.values.get("macs")),
            f"{len(trial.ran)}/{len(trial.stages)}",
            f"{trial.seconds:.1f}",
            style="bold green" if trial.number in winning else STYLES.get(trial.outcome),
        )
    best = Table(title="winners, with their test accuracy", title_justify="left", box=None, pad_edge=False)
    for column in ("", "val %", "test %", "MACs", "fewer", "ms", "recipe"):
        best.add_column(column, justify="left" if column == "recipe" else "right", overflow="fold")
    for winner in results.winners:
        metrics = winner.manifest.metrics
        best.add_row(
            str(winner.trial.number),
            _number(metrics.get("val_accuracy")),
            _number(metrics.get("test_accuracy")),
            human(metrics.get("macs")),
            f"{_number(metrics.get('macs_ratio'))}x",
            _number(winner.latency_ms),
            str(winner.file),
        )
    told: list[Any] = [rows, Text(), best, Text()]
    if unbegun:
        told.append(
            Text(f"{unbegun} more drawn trials could not be or broke the MACs limit, and were not begun")
        )
    told.append(
        Text(
            f"{results.stages_requested} stages in all trials, {results.stages_distinct} different ones; "
            f"{', '.join(results.files.values())}"
        )
    )
    return Group(*told)


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}"
