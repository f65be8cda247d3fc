"""`pbkd tune`. It imports what is heavy only when it is called."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from pipelines.inspect_command import AllowImport
from pipelines.store_commands import DEFAULT_STORE, Machine, StoreOption, store_argument

if TYPE_CHECKING:
    from pipelines.recipe import Recipe
    from pipelines.store import Store
    from tune_spaces.objective import Objective
    from tune_spaces.search import Options
    from tune_spaces.space import Space
    from tune_spaces.subject import Subject

app = typer.Typer()


@app.command(epilog="Example: pbkd tune joint pipelines/recipes/digits.yaml --trials 8 data.val_fraction=0.2")
def tune(
    space: Annotated[
        str,
        typer.Argument(
            metavar="SPACE",
            help="student_widths, pruning_ratios, stabilization_lengths, joint or a SPACE.yaml.",
        ),
    ],
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, for all trials.")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="How many; a small space may have fewer.")] = 16,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Trials at the same time; as many as the cluster holds.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="GOALS",
            help="Of accuracy,macs,latency: one is optimized, several give a Pareto front; "
            "accuracy with a limit, accuracy,macs without.",
        ),
    ] = None,
    max_macs: Annotated[
        float | None, typer.Option(help="Most multiply-accumulates; up to 1: a share of the teacher's.")
    ] = None,
    max_latency: Annotated[float | None, typer.Option(help="Longest latency of one image, in ms.")] = None,
    sampler: Annotated[
        Literal["tpe", "nsga2", "fixed"],
        typer.Option(help="fixed: a list drawn beforehand, in the order that shares most."),
    ] = "tpe",
    seed: Annotated[int, typer.Option(min=0, help="Of the drawing of trials.")] = 0,
    early_stop: Annotated[
        bool, typer.Option("--early-stop", help="Stop trials that fall behind (ASHA); for accuracy alone.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="Of the search in the store; RECIPE-SPACE.")] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Run nothing; report on what is there, finished or not.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    allow_import: AllowImport = False,
    json_: Machine = False,
) -> None:
    """Search values for keys of a recipe with Ray Tune; a stage that trials share is run once.

    An interrupted search goes on when the same command is typed again.
    """
    from contextlib import redirect_stdout

    from rich.console import Console

    from pbkd.errors import UserError
    from pipelines.display import LogLines
    from pipelines.executors import require_machine
    from pipelines.graph import require_keys
    from pipelines.recipe_file import load_recipe
    from pipelines.signals import Stop, stopping
    from pipelines.store import Store
    from tune_spaces.results import write
    from tune_spaces.search import Options, Search
    from tune_spaces.watch import ConsoleWatch, table

    console = Console(stderr=True)
    quiet = redirect_stdout(sys.stderr)
    try:
        with stopping(), quiet, LogLines(console):
            loaded = load_recipe(recipe, overrides or [])
            opened = Store(store) if Store.exists(store) else None  # a report of a search is written into it
            options = Options(name or "", trials, sampler, seed, max_concurrent, early_stop)
            limits = (objective, max_macs, max_latency)
            asked = _asked(recipe, loaded, space, limits, options, opened)
            require_keys(asked.subject.graph)
            if report and opened is None:
                raise UserError(
                    f"store {store}: there is none; run the search first, or name it by --store DIR"
                )
            if opened is None:  # made only now: a mistake leaves nothing behind
                require_machine(asked.subject.graph.recipe.compute)
                opened = Store(store)
            search = Search(*asked, opened, ConsoleWatch(console))
            if report:
                search.require_record()
            else:
                search.run()
            results = write(search, opened)
            page = search.record_report()
    except Stop as stop:
        console.print("stopped; the same command goes on from here")
        raise typer.Exit(stop.code) from None
    if json_:
        typer.echo(json.dumps(results.report | {"page": str(page)}))
        return
    out = Console(width=None if sys.stdout.isatty() else 140)
    out.print(table(results))
    out.print(_where_to_look(asked.options.name, page, store_argument(store)), soft_wrap=True)


def _where_to_look(name: str, page: Path, where: str) -> str:
    return f"\nnext:    pbkd report {name}{where}\nreport:  {page}\nMLflow:  pbkd ui{where}"


class _Asked(NamedTuple):
    """What was typed, checked."""

    subject: Subject
    space: Space
    objective: Objective
    options: Options


def check(words: Sequence[str], store: str) -> str:
    """The name of the search that `pbkd tune WORDS` is; nothing is begun, written or downloaded.

    Raises:
        UserError, typer.TyperException: it would be refused.
    """
    from pipelines.recipe_file import load_recipe
    from pipelines.store import Store
    from tune_spaces.search import Options

    typed: dict[str, Any] = typer.main.get_command(app).make_context("pbkd tune", list(words)).params
    recipe = Path(typed["recipe"])
    loaded = load_recipe(recipe, typed["overrides"] or [])
    loaded = loaded.model_copy(update={"data": loaded.data.model_copy(update={"download": False})})
    drawing = ("trials", "sampler", "seed", "max_concurrent", "early_stop")
    options = Options(typed["name"] or "", **{name: typed[name] for name in drawing})
    limits = (typed["objective"], typed["max_macs"], typed["max_latency"])
    opened = Store(store, writable=False) if Store.exists(store) else None
    return _asked(recipe, loaded, typed["space"], limits, options, opened).options.name


def _asked(
    path: Path,
    recipe: Recipe,
    space: str,
    limits: tuple[str | None, float | None, float | None],
    options: Options,
    store: Store | None,
) -> _Asked:
    """See whether it can be searched, as far as one can know before. Raises UserError if it can not."""
    from pbkd.errors import UserError
    from pbkd.storage import user_cache
    from pipelines.store import place
    from tune_spaces.objective import objective_of
    from tune_spaces.space import open_space
    from tune_spaces.subject import Subject

    subject = Subject.of(path, recipe, store, user_cache())
    searched = open_space(space, subject)
    objective = objective_of(subject, *limits)
    options = replace(options, name=options.name or f"{recipe.name}-{searched.name}")
    place("searches", options.name)
    if options.early_stop and len(objective.goals) > 1:
        raise UserError(
            f"--early-stop: goes by accuracy alone, and would stop the small networks of "
            f"{','.join(objective.goals)}\n"
            "leave it out, or search accuracy under a limit: --objective accuracy --max-macs 0.5"
        )
    return _Asked(subject, searched, objective, options)
