"""`pbkd report`: a page about what was run."""

from __future__ import annotations

import json
import shlex
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.inspect_command import AllowImport
from pipelines.recipe_arguments import Overrides, graph_of
from pipelines.store_commands import DEFAULT_STORE, Machine, StoreOption

if TYPE_CHECKING:
    from pipelines.store import Store


def report(
    which: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE|PIPELINE_ID|SEARCH]",
            help="What was run; without it the store's latest pipeline.",
        ),
    ] = None,
    overrides: Overrides = None,
    store: StoreOption = DEFAULT_STORE,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Where to; without it pipelines/ID/report.html in the store, or, if that may only be read, "
            "report-ID.html here.",
        ),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    allow_import: AllowImport = False,
    json_: Machine = False,
) -> None:
    """Write one HTML page about a pipeline or a search: results, figures, lineage. It needs no network.

    The figures lie beside it as PNG files. `pbkd ui` shows both in MLflow too.
    """
    from pbkd.errors import UserError
    from pipelines.reporting.write import leave_report, leave_search_report
    from pipelines.store import Store

    opened = Store.existing(store)
    if which is not None and which in opened.searches():
        about, written = {"search": which}, leave_search_report(opened, which, out)
    else:
        identity, command = _reported(which, overrides or [], opened)
        about, written = {"pipeline": identity}, leave_report(opened, identity, command, out)
    page, figures = str(written.page), [str(figure) for figure in written.figures]
    typer.echo(json.dumps({"path": page, **about, "figures": figures}) if json_ else page)
    if open_ and not webbrowser.open(written.page.as_uri()):
        raise UserError(f"{page}: is written, but no browser was found to show it; open it yourself")


def _reported(which: str | None, overrides: list[str], store: Store) -> tuple[str, str | None]:
    """The id of the pipeline that is meant, and the command that runs it, if it was named by its recipe."""
    from pbkd.errors import UserError
    from pipelines.reporting.facts import choose_pipeline

    if which is None:
        return choose_pipeline(store), None
    if "=" in which:
        raise UserError(f"override '{which}': name its recipe before it: pbkd report RECIPE {which}")
    path = Path(which)
    if not (path.suffix in (".yaml", ".yml") or len(path.parts) > 1 or path.is_file()):
        if overrides:
            raise UserError(f"override '{overrides[0]}': '{which}' is no recipe (.yaml) that it could be of")
        return choose_pipeline(store, which), None
    from pipelines.graph import pipeline_id, require_keys
    from pipelines.recipe_file import load_recipe

    graph = graph_of(path, load_recipe(path, overrides), store)
    require_keys(graph)
    return pipeline_id(graph), shlex.join(["pbkd", "run", which, *overrides, "--store", store.location])
