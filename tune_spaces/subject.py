"""What is searched: a recipe, cut down to the stages its student needs, and the plan of a trial of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbkd.errors import UserError
from pbkd.stages import Block, Progressive
from pipelines.graph import Graph, build_graph
from pipelines.recipe import Recipe
from pipelines.recipe_file import revise
from pipelines.store import Store

EITHER = (("epochs", "steps"), ("ratio", "macs", "sparsity"))
"""Of these keys of a stage one has a value: giving it to one takes it from the others."""

Params = Mapping[str, Any]
"""Values by searched key."""


@dataclass(frozen=True)
class Subject:
    """A recipe that is searched.

    Attributes:
        path: of its file, for messages.
        recipe: with the stages alone that its student needs, and the threads of this machine.
        graph: of those stages.
        cache: folder for digests of data.
        store: where finished stages are looked up.
    """

    path: Path
    recipe: Recipe
    graph: Graph
    cache: Path
    store: Store | None = None

    @classmethod
    def of(cls, path: Path, recipe: Recipe, store: Store | None, cache: Path) -> Subject:
        """Cut `recipe` down; raises UserError if it is wrong."""
        try:
            graph = build_graph(recipe, store, cache).until([recipe.student])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return cls(path, _needed(recipe, graph), graph, cache, store)

    def stages(self, kind: str) -> list[str]:
        """The names of its stages of a kind, in order."""
        return [name for name, stage in self.recipe.stages.items() if stage.kind == kind]

    def blocks(self, name: str) -> tuple[int, ...]:
        """The blocks of a progressive stage, in the order in which its widths are written."""
        stage = self.recipe.stages[name]
        assert isinstance(stage, Progressive)
        if stage.blocks is not None:
            return stage.blocks
        return tuple(sorted(self._members(name)))

    def widths(self, name: str) -> dict[int, float]:
        """The width of every block of a progressive stage, by number."""
        return {number: block.width for number, block in self._members(name).items()}

    def _members(self, name: str) -> dict[int, Block]:
        nodes = self.graph.nodes.items()
        found = [node.stage for member, node in nodes if member.rpartition(".")[0] == name]
        return {stage.block: stage for stage in found if isinstance(stage, Block)}

    def overrides(self, params: Params) -> list[str]:
        """What gives the searched keys these values, as it would be typed behind `pbkd run`."""
        written: dict[str, Any] = {}
        for key, value in params.items():
            section, *rest = key.split(".")
            match (section, rest):
                case ("stages", [name, "width", number]):
                    own = written.setdefault(f"stages.{name}.width", self.widths(name))
                    own[int(number)] = value
                case ("stages", [name, last]):
                    others = [other for keys in EITHER if last in keys for other in keys if other != last]
                    stage = self.recipe.stages[name]
                    written |= {
                        f"stages.{name}.{other}": None
                        for other in others
                        if getattr(stage, other, None) is not None
                    }
                    written[key] = value
                case _:
                    written[key] = value
        for key, value in written.items():
            if isinstance(value, dict):
                written[key] = [value[number] for number in self.blocks(key.split(".")[1])]
        return [f"{key}={_text(value)}" for key, value in written.items()]

    def plan(self, params: Params) -> Plan:
        """The pipeline of a trial, as far as it can be planned."""
        overrides = self.overrides(params)
        recipe = revise(self.recipe, overrides, self.path)
        try:
            graph = build_graph(recipe, self.store, self.cache, self.graph.identity)
        except UserError as error:
            return Plan(overrides, recipe, None, str(error))
        return Plan(overrides, recipe, graph, None)


@dataclass(frozen=True)
class Plan:
    """A trial before it runs; `refusal` says why it cannot, and then there is no graph."""

    overrides: Sequence[str]
    recipe: Recipe
    graph: Graph | None
    refusal: str | None

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of the student; None if they are not known yet."""
        cost = None if self.graph is None else self.graph.nodes[self.graph.student].cost
        return None if cost is None else cost.macs

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of its stages, in the order in which they run."""
        return () if self.graph is None else tuple(node.key or "" for node in self.graph.nodes.values())


def _needed(recipe: Recipe, graph: Graph) -> Recipe:
    """The recipe of the stages in `graph` alone; what one starts from is written out, since the one before it
    may be gone."""
    kept = {}
    for name, stage in recipe.stages.items():
        nodes = [node for member, node in graph.nodes.items() if name in (member, member.rpartition(".")[0])]
        if nodes:
            origin = dict(nodes[0].inputs).get("from")
            kept[name] = stage.model_copy(update={"from_": origin}) if origin is not None else stage
    compute = recipe.compute.model_copy(update={"threads": recipe.compute.worker_threads})
    return recipe.model_copy(update={"stages": kept, "baselines": (), "compute": compute})


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
