"""The `pbkd` command. It imports what is heavy only when a command needs it."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from pipelines.graph import Graph
    from pipelines.run import PipelineResult

app = typer.Typer(
    help="Make trained CNN classifiers smaller and faster by blockwise distillation and pruning.",
    epilog="Start with: pbkd run pipelines/recipes/digits.yaml",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as stages.blocks.epochs=2."),
]
StoreOption = Annotated[
    Path, typer.Option("--store", envvar="PBKD_STORE", help="Folder of finished work.", show_default=True)
]
Machine = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]


@app.command(epilog="Example: pbkd run pipelines/recipes/digits.yaml seed=1")
def run(
    recipe: RecipePath, overrides: Overrides = None, store: StoreOption = Path("runs"), json_: Machine = False
) -> None:
    """Run a recipe. Finished stages are reused; an interrupted run goes on when it is typed again."""
    with _mistakes():
        from rich.console import Console

        from pipelines.display import LiveDisplay, PlainDisplay, result_table
        from pipelines.graph import build_graph
        from pipelines.recipe import load_recipe
        from pipelines.run import run_pipeline
        from pipelines.store import Store

        def interrupt(number: int, frame: object) -> NoReturn:
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, interrupt)
        loaded = load_recipe(recipe, overrides or [])
        opened = Store(store)
        graph = build_graph(loaded, opened, opened.root / "cache")
        console = Console(stderr=True)
        with LiveDisplay(console, graph) if console.is_terminal else PlainDisplay(console) as display:
            result = run_pipeline(graph, opened, display)
        if json_:
            typer.echo(json.dumps(_run_report(result)))
            return
        out = Console(width=None if sys.stdout.isatty() else 140)
        out.print(result_table(result))
        student = result.manifests[graph.student]
        out.print(f"\nstudent: {opened.artifact(student.artifact)}", soft_wrap=True)
        where = "" if os.environ.get("PBKD_STORE") or store == Path("runs") else f" --store {store}"
        out.print(f"next:    pbkd ui{where}    pbkd lineage {student.artifact[:12]}{where}", soft_wrap=True)


@app.command(epilog="Example: pbkd plan pipelines/recipes/cifar100_vgg16.yaml")
def plan(
    recipe: RecipePath, overrides: Overrides = None, store: StoreOption = Path("runs"), json_: Machine = False
) -> None:
    """Show what a recipe would run and what its networks would cost; needs neither data nor weights."""
    with _mistakes(), tempfile.TemporaryDirectory() as cache:
        from pipelines.graph import build_graph
        from pipelines.recipe import load_recipe
        from pipelines.store import Store

        loaded = load_recipe(recipe, overrides or [])
        loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"download": False})})
        opened = Store(store) if store.is_dir() else None
        graph = build_graph(loaded, opened, opened.root / "cache" if opened else Path(cache))
        rows = _plan_rows(graph, opened)
        if json_:
            typer.echo(json.dumps({"recipe": loaded.name, "stages": rows}))
            return
        from rich.console import Console

        from pipelines.display import plan_table

        out = Console(width=None if sys.stdout.isatty() else 140)
        out.print(plan_table(rows, loaded.name))
        for reason in dict.fromkeys(row["reason"] for row in rows if row["reason"]):
            out.print(f"unknown: {reason}", soft_wrap=True, markup=False)


@app.command(epilog="Example: pbkd lineage runs/artifacts/0123abcd...")
def lineage(
    reference: Annotated[
        str, typer.Argument(metavar="RUN_OR_ARTIFACT", help="MLflow run id, stage key or artifact.")
    ],
    store: StoreOption = Path("runs"),
    json_: Machine = False,
) -> None:
    """Show the stages a network was made from, back to the teacher and the data."""
    with _mistakes():
        from pbkd.errors import UserError
        from pipelines.lineage import chain
        from pipelines.store import Store
        from pipelines.tracking import default_uri

        if not store.is_dir():
            raise UserError(f"store {store}: there is no such folder; name it by --store DIR or PBKD_STORE")
        opened = Store(store)
        rows = chain(opened, reference, default_uri(opened))
        if json_:
            typer.echo(json.dumps({"chain": rows}))
            return
        _print_chain(rows)


@app.command(epilog="Example: pbkd ui --port 5001")
def ui(
    store: StoreOption = Path("runs"),
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000,
    uri: Annotated[
        str | None, typer.Option(help="MLflow server of the runs, if it is not the store's own.")
    ] = None,
) -> None:
    """Start the MLflow UI on the store, on this machine only, and print the pages worth opening."""
    with _mistakes():
        from pbkd.errors import UserError
        from pipelines.store import Store
        from pipelines.tracking import default_uri
        from pipelines.ui import serve

        if not store.is_dir():
            raise UserError(
                f"store {store}: there is no such folder; run a recipe first, or name it by --store DIR"
            )
        opened = Store(store)
        serve(opened, uri or default_uri(opened), port)


def main() -> None:
    """The console script."""
    # Idle OpenMP threads that spin starve other processes of a small machine; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


@contextmanager
def _mistakes() -> Iterator[None]:
    """A user's mistake is a message and exit code 2; a failed stage a message and 1; Ctrl-C 130."""
    from rich.console import Console
    from rich.logging import RichHandler

    from pbkd.errors import StageError, UserError

    console = Console(stderr=True, soft_wrap=True)
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    try:
        yield
    except (UserError, StageError) as error:
        console.print("[bold red]error:[/] ", end="")
        console.print(str(error), markup=False, highlight=False)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(130) from None
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        raise typer.Exit(1) from None


def _plan_rows(graph: Graph, store: Any) -> list[dict[str, Any]]:
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
    graph, ids = result.graph, result.ids["stages"]
    stages = []
    for name, node in graph.nodes.items():
        manifest = result.manifests[name]
        measured = {
            metric: manifest.metrics.get(metric)
            for metric in ("params", "macs", "macs_ratio", "test_accuracy", "val_accuracy", "agreement")
        }
        stages.append(
            {
                "name": name,
                "kind": node.stage.kind,
                "key": node.key,
                "state": result.outcomes[name],
                "seconds": manifest.seconds,
                "run_id": ids.get(manifest.key, {}).get("run_id"),
                "artifact": str(result.store.artifact(manifest.artifact)),
                **measured,
                "latency_ms": result.latencies[name],
                "digest": manifest.digest,
            }
        )
    return {
        "recipe": graph.recipe.name,
        "pipeline_run": result.ids["pipeline_run"],
        "store": str(result.store.root),
        "seconds": result.seconds,
        "teacher": graph.teacher,
        "student": graph.student,
        "baselines": list(graph.baselines),
        "stages": stages,
    }


def _print_chain(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

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
    Console().print(table)


if __name__ == "__main__":
    main()
