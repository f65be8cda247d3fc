"""A recipe as commands take it: its file, overrides, and the stages that are wanted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipelines.graph import Graph
    from pipelines.recipe import Recipe
    from pipelines.store import Store

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as stages.blocks.epochs=2."),
]
Until = Annotated[
    str | None, typer.Option(metavar="STAGE[,STAGE]", help="Only these stages and those they need.")
]


def graph_of(path: Path, recipe: Recipe, store: Store | None, until: str | None = None) -> Graph:
    """The recipe's stages; names its file in what is wrong with them. Without a store, nothing is kept."""
    from pbkd.errors import UserError
    from pbkd.storage import user_cache
    from pipelines.graph import build_graph

    try:
        graph = build_graph(recipe, store, user_cache())
        return graph if until is None else graph.until(until.split(","))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
