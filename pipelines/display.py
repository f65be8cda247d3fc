"""What a person sees of a run: bars, or one line a stage where there is no terminal; a table at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from pbkd.stages.base import TrainingStage
from pipelines.driver import Outcome
from pipelines.graph import Graph, Node
from pipelines.manifest import Manifest
from pipelines.quantities import human
from pipelines.run import PipelineResult


class LogLines(logging.Handler):
    """One line for a warning, above the bars if there are any: within its context."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print it."""
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        self._console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> None:
        logging.getLogger().addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


STYLES = {"teacher": "bold", "student": "bold green", "baseline": "cyan"}


class LiveDisplay:
    """A bar for the pipeline and one for every stage that runs."""

    def __init__(self, console: Console, graph: Graph) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", table_column=None),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
        )
        self._console = console
        self._all = self._progress.add_task(f"[bold]{graph.recipe.name}", total=len(graph.nodes), note="")
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, node: Node) -> None:
        """Show a bar for the stage."""
        self._bars[node.name] = self._progress.add_task(
            f"  {node.name}", total=_length(node), note=node.stage.kind
        )

    def progress(self, node: Node, row: Mapping[str, Any]) -> None:
        """Move its bar."""
        if node.name in self._bars:
            done = row["step" if _is_by_steps(node) else "epoch"]
            self._progress.update(
                self._bars[node.name], completed=done, note=f"epoch {row['epoch']:g}  {_losses(row)}"
            )

    def finished(self, node: Node, outcome: Outcome, manifest: Manifest) -> None:
        """Replace its bar by a line."""
        if node.name in self._bars:
            self._progress.remove_task(self._bars.pop(node.name))
        self._console.print(_line(node, outcome, manifest))
        self._progress.advance(self._all)


class PlainDisplay:
    """Readable in a log file: a line for every finished stage, and now and then how one gets on."""

    def __init__(self, console: Console, seconds: float = 30.0) -> None:
        """Print how a stage gets on at most every so many seconds."""
        self._console, self._seconds = console, seconds
        self._printed: dict[str, float] = {}  # when something was printed of a stage that runs, by its name

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def started(self, node: Node) -> None:
        """Nothing, unless it takes long."""
        self._printed[node.name] = time.monotonic()

    def progress(self, node: Node, row: Mapping[str, Any]) -> None:
        """Print it if nothing was printed of the stage for a while."""
        now = time.monotonic()
        if now - self._printed.setdefault(node.name, now) >= self._seconds:
            self._printed[node.name] = now
            length = _length(node)
            end = f" of {length:g}" if length else ""
            unit = "step" if _is_by_steps(node) else "epoch"
            line = f"{node.name:<24} {node.stage.kind:<10} {unit} {row[unit]:g}{end}  {_losses(row)}"
            self._console.print(line.rstrip(), soft_wrap=True)

    def finished(self, node: Node, outcome: Outcome, manifest: Manifest) -> None:
        """Print its line."""
        self._console.print(_line(node, outcome, manifest), soft_wrap=True)


def _length(node: Node) -> float | None:
    stage = node.stage
    if not isinstance(stage, TrainingStage):
        return None
    return float(stage.steps if stage.steps is not None else stage.epochs or 0) or None


def _is_by_steps(node: Node) -> bool:
    return isinstance(node.stage, TrainingStage) and node.stage.steps is not None


def _losses(row: Mapping[str, Any]) -> str:
    found = []
    if "train_loss" in row:
        found.append(f"loss {row['train_loss']:.3g}")
    if "val_accuracy" in row:
        found.append(f"val % {row['val_accuracy']:.2f}")
    return "  ".join(found)


def _line(node: Node, outcome: Outcome, manifest: Manifest) -> str:
    accuracy = manifest.metrics.get("test_accuracy")
    seconds = f"{manifest.seconds:.1f} s" if outcome == "ran" else "reused"
    return f"{node.name:<24} {node.stage.kind:<10} test {accuracy:6.2f} %  {seconds}"


def result_table(result: PipelineResult) -> Table:
    """Teacher, every stage, the student and the baselines: cost and accuracy side by side, in 80 columns."""
    graph = result.graph
    table = _table(f"{graph.recipe.name}: every stage's network", ["stage", ""])
    for column in ("MACs", "fewer", "params", "test %", "agree %", "ms", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, node in sorted(graph.nodes.items(), key=lambda item: item[0] in graph.baselines):
        manifest = result.manifests[name]
        metrics = manifest.metrics
        role = graph.role(name)
        table.add_row(
            name,
            node.stage.kind if role == "stage" else role,
            human(metrics.get("macs")),
            _number(metrics.get("macs_ratio"), ".2f", "x"),
            human(metrics.get("params")),
            _number(metrics.get("test_accuracy"), ".2f"),
            _number(metrics.get("agreement"), ".2f"),
            _number(result.latencies[name]["latency_ms"], ".2f"),
            "reused" if result.outcomes[name] == "reused" else f"{manifest.seconds:.1f} s",
            style=STYLES.get(role),
        )
    return table


def plan_table(rows: list[dict[str, Any]], name: str) -> Table:
    """What a run would do."""
    table = _table(f"{name}: the plan", ["stage", "kind", "from", "state"])
    for column in ("params", "fewer", "MACs", "fewer"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("key", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"],
            row["kind"],
            row["from"] or "",
            row["state"],
            human(row["params"]),
            _number(row["params_ratio"], ".3f", "x"),
            human(row["macs"]),
            _number(row["macs_ratio"], ".3f", "x"),
            (row["key"] or "")[:7],
        )
    return table


def chain_table(rows: list[dict[str, Any]]) -> Table:
    """From a network back to the teacher."""
    table = Table(title="from the network back to the teacher", title_justify="left", pad_edge=False)
    for column in ("stage", "kind", "key", "made from", "MLflow run", "data"):
        table.add_column(column, no_wrap=True)
    names = {row["key"]: row["stage"] for row in rows}
    for row in rows:
        made_from = ", ".join(f"{given['role']}: {names[given['key']]}" for given in row["inputs"])
        table.add_row(
            row["stage"],
            row["kind"],
            row["key"][:12],
            made_from,
            (row["run_id"] or "")[:8],
            (row["data_digest"] or "")[:8],
        )
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "?" if value is None else format(value, form) + unit
