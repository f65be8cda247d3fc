"""The `pbkd` command. It imports what is heavy only when a command needs it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pbkd import __version__
from pipelines.data_commands import app as data_app
from pipelines.export_command import export
from pipelines.init_command import init
from pipelines.inspect_command import AllowImport, inspect
from pipelines.recipe_arguments import Overrides, RecipePath, Until, graph_of
from pipelines.report_command import report
from pipelines.store_commands import DEFAULT_STORE, Machine, StoreOption, store_argument
from pipelines.store_commands import app as store_app

if TYPE_CHECKING:
    from pipelines.graph import Graph
    from pipelines.run import PipelineResult
    from pipelines.store import Store

ENVIRONMENT = {
    # Idle OpenMP threads that spin starve other processes of a small machine; read when torch is imported.
    "OMP_WAIT_POLICY": "PASSIVE",
    # It reports to its makers unless told not to.
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
WIDTH_WITHOUT_TERMINAL = 140
COSTS = ("params", "nonzero_params", "macs", "nonzero_macs", "macs_ratio", "memory_peak_mb")
QUALITIES = ("test_accuracy", "test_top5", "val_accuracy", "nll", "ece", "agreement", "kl")

app = typer.Typer(
    epilog="Start with: pbkd run pipelines/recipes/digits.yaml",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data_app, name="data")
app.command(epilog="Example: pbkd init torchvision/resnet18 --data photos --weights mine.pt")(init)
app.command(epilog="Example: pbkd inspect torchvision/resnet50 --width 0.5 --width 0.25")(inspect)
app.command(epilog="Example: pbkd export runs/artifacts/0123abcd... --dynamic-batch")(export)
app.command(epilog="Example: pbkd report pipelines/recipes/digits.yaml --open")(report)
app.add_typer(store_app, name="store")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"pbkd {__version__}")
        raise typer.Exit


@app.callback()
def pbkd(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make trained CNN classifiers smaller and faster by blockwise distillation and pruning."""


@app.command(epilog="Example: pbkd run pipelines/recipes/digits.yaml seed=1")
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    until: Until = None,
    store: StoreOption = DEFAULT_STORE,
    allow_import: AllowImport = False,
    json_: Machine = False,
) -> None:
    """Run a recipe. Finished stages are reused; an interrupted run goes on when it is typed again."""
    from rich.console import Console

    from pipelines.recipe_file import load_recipe
    from pipelines.signals import Stop, stopping

    console = Console(stderr=True)
    try:
        with stopping(), ExitStack() as logged:
            loaded = load_recipe(recipe, overrides or [])  # before what takes seconds to import

            from pipelines.display import LiveDisplay, LogLines, PlainDisplay, result_table
            from pipelines.executors import require_lasting, require_machine
            from pipelines.graph import require_keys
            from pipelines.run import run_pipeline
            from pipelines.store import Store

            logged.enter_context(LogLines(console))
            opened = _existing(store)
            if opened is not None:
                opened.require_writable()
            graph = graph_of(recipe, loaded, opened, until)
            require_keys(graph)
            if opened is None:  # made only now: a mistake leaves nothing behind
                require_machine(graph.recipe.compute)
                require_lasting(store)
                opened = Store(store)
            display = LiveDisplay(console, graph) if console.is_terminal else PlainDisplay(console)
            # Stdout is for the result: Ray prints there, whatever it is told, that a worker has died.
            with redirect_stdout(sys.stderr), display:
                result = run_pipeline(graph, opened, display, with_report=not json_)
    except Stop as stop:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(stop.code) from None
    if json_:
        typer.echo(json.dumps(_run_report(result)))
        return
    out = _output()
    out.print(result_table(result))
    student = result.manifests[graph.student]
    out.print(f"\nstudent: {opened.artifact_location(student.artifact)}", soft_wrap=True)
    where = store_argument(store)
    commands = (f"pbkd lineage {student.key[:12]}", f"pbkd export {student.key[:12]}")
    out.print("next:    " + "    ".join(command + where for command in commands), soft_wrap=True)
    out.print(f"report:  {result.report}", soft_wrap=True)
    out.print(f"MLflow:  pbkd ui{where}", soft_wrap=True)


@app.command(epilog="Example: pbkd plan pipelines/recipes/cifar100_vgg16.yaml")
def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    until: Until = None,
    store: StoreOption = DEFAULT_STORE,
    allow_import: AllowImport = False,
    json_: Machine = False,
) -> None:
    """Show what a recipe would run and what its networks would cost; needs neither data nor weights."""
    from pipelines.recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"download": False})})
    opened = _existing(store)
    graph = graph_of(recipe, loaded, opened, until)
    rows = _plan_rows(graph, opened)
    if json_:
        typer.echo(json.dumps({"recipe": loaded.name, "stages": rows}))
        return
    from pipelines.display import plan_table

    out = _output()
    out.print(plan_table(rows, loaded.name))
    for reason in dict.fromkeys(row["reason"] for row in rows if row["reason"]):
        out.print(f"unknown: {reason}", soft_wrap=True, markup=False)


@app.command(epilog="Example: pbkd lineage runs/artifacts/0123abcd...")
def lineage(
    reference: Annotated[
        str, typer.Argument(metavar="RUN_OR_ARTIFACT", help="MLflow run id, stage key or artifact.")
    ],
    store: StoreOption = DEFAULT_STORE,
    json_: Machine = False,
) -> None:
    """Show the stages a network was made from, back to the teacher and the data."""
    from pipelines.lineage import chain
    from pipelines.store import Store
    from pipelines.tracking import default_uri

    opened = Store.existing(store)
    rows = chain(opened, reference, default_uri(opened))
    if json_:
        typer.echo(json.dumps({"chain": rows}))
    else:
        from pipelines.display import chain_table

        _output().print(chain_table(rows))


@app.command(epilog="Example: pbkd ui --port 5001")
def ui(
    store: StoreOption = DEFAULT_STORE,
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
    uri: Annotated[
        str | None, typer.Option(help="MLflow server of the runs; MLFLOW_TRACKING_URI, or the store's own.")
    ] = None,
) -> None:
    """Start the MLflow UI on the store, on this machine only, and print the pages worth opening."""
    from pipelines.recipe import without_secrets
    from pipelines.store import Store
    from pipelines.tracking import default_uri
    from pipelines.ui import serve

    if uri is not None:
        without_secrets(uri)
    opened = Store.existing(store)
    opened.require_writable()  # of the database; what it lacks is written first
    serve(opened, uri or default_uri(opened), port)


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script.

    Returns 0; 1 for a failure; 2 for a user's mistake; 130, 143 or 140 when asked to end by Ctrl-C, SIGTERM
    or SIGUSR2: what was running is kept, and the same command goes on from there.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import pipelines.seldom_collected  # noqa: F401

    _add_registered()
    try:
        code = app(
            list(sys.argv[1:] if arguments is None else arguments) or ["--help"], standalone_mode=False
        )
    except typer.TyperException as error:
        _complain(f"{error.format_message()}\nsee pbkd --help")
        return error.exit_code
    except Exception as error:
        from pbkd.errors import StageError, UserError
        from pbkd.storage import Unreachable
        from pipelines.exhaustion import exhaustion

        has_said = isinstance(error, UserError | StageError | Unreachable)
        reason = str(error) if has_said else exhaustion(error)
        if reason is None:
            raise
        _complain(reason)
        return 2 if isinstance(error, UserError) else 1
    return int(code or 0)


@cache
def _add_registered() -> None:
    """Add what packages above this one have registered; an app of one command is that command."""
    for entry in entry_points(group="pbkd.commands"):
        added: typer.Typer = entry.load()
        if len(added.registered_commands) == 1 and added.registered_callback is None:
            app.registered_commands += added.registered_commands
        else:
            app.add_typer(added, name=entry.name)


def _complain(message: str) -> None:
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True)
    console.print("[bold red]error:[/] ", end="")
    console.print(message, markup=False, highlight=False)


def _output() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)


def _existing(location: str) -> Store | None:
    """The store, if it is one already: looking at a recipe makes none."""
    from pipelines.store import Store

    return Store(location, writable=False) if Store.exists(location) else None


def _plan_rows(graph: Graph, store: Store | None) -> list[dict[str, Any]]:
    from pipelines.graph import finished

    done = finished(graph, store) if store is not None else {}
    teacher = graph.nodes[graph.teacher].cost
    rows = []
    for name, node in graph.nodes.items():
        cost, inputs = node.cost, dict(node.inputs)
        known = cost is not None and teacher is not None
        rows.append(
            {
                "name": name,
                "kind": node.stage.kind,
                "key": node.key,
                "state": "done" if name in done else "unknown" if node.key is None else "pending",
                "reason": node.reason,
                "from": inputs.get("from"),
                "teacher": inputs.get("teacher"),
                "params": cost.params if cost else None,
                "macs": cost.macs if cost else None,
                "params_ratio": teacher.params / cost.params if known and teacher and cost else None,
                "macs_ratio": teacher.macs / cost.macs if known and teacher and cost else None,
            }
        )
    return rows


def _run_report(result: PipelineResult) -> dict[str, Any]:
    from pipelines.latency import TIMINGS

    graph, ids = result.graph, result.ids["stages"]
    stages = []
    for name, node in graph.nodes.items():
        manifest = result.manifests[name]
        costs, qualities = (
            {metric: manifest.metrics.get(metric) for metric in metrics} for metrics in (COSTS, QUALITIES)
        )
        stages.append(
            {
                "name": name,
                "kind": node.stage.kind,
                "key": node.key,
                "state": result.outcomes[name],
                "seconds": manifest.seconds,
                "run_id": ids.get(manifest.key, {}).get("run_id"),
                "artifact": result.store.artifact_location(manifest.artifact),
                **costs,
                **{timing: result.latencies[name].get(timing) for timing in TIMINGS},
                **qualities,
                "digest": manifest.digest,
            }
        )
    return {
        "recipe": graph.recipe.name,
        "pipeline_run": result.ids["pipeline_run"],
        "store": result.store.location,
        "seconds": result.seconds,
        "teacher": graph.teacher,
        "student": graph.student,
        "baselines": list(graph.baselines),
        "stages": stages,
    }


if __name__ == "__main__":
    sys.exit(main())
