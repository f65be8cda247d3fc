"""From a recipe to the graph of its stages: who starts from whom, who teaches whom, and every stage's key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pbkd import artifact
from pbkd.data import READER_VERSION, DataInfo, data_digest
from pbkd.engine import ENGINE_VERSION
from pbkd.errors import UserError
from pbkd.measure import Cost
from pbkd.networks import NetworkSpec, cost_of
from pbkd.stages import Block, Load, Progressive, Stage, Unplanned
from pipelines.recipe import Recipe, suggest
from pipelines.store import Input, Manifest, Store

KEY_VERSION = 1


@dataclass(frozen=True)
class Node:
    """A stage in its place.

    Attributes:
        name: in the recipe; members of a progressive stage are called `GROUP.BLOCK`.
        stage: its settings.
        inputs: (role, name) of the stages it depends on.
        seed: of everything random in it.
        spec: the architecture it gives; None if only running it can tell.
        key: of its result; None if data or weights are missing on this machine.
        reason: why `spec` or `key` is None.
    """

    name: str
    stage: Stage
    inputs: tuple[tuple[str, str], ...]
    seed: int = 0
    spec: NetworkSpec | None = None
    key: str | None = None
    reason: str | None = None

    @property
    def cost(self) -> Cost | None:
        """Parameters and multiply-accumulates of the network it gives."""
        return None if self.spec is None else cost_of(self.spec)


@dataclass(frozen=True)
class Graph:
    """All stages of a recipe, each after those it depends on."""

    recipe: Recipe
    info: DataInfo
    nodes: dict[str, Node]
    teacher: str
    student: str
    baselines: tuple[str, ...]
    data_digest: str | None

    def key_inputs(self, node: Node) -> list[Input]:
        """The inputs of `node` by key."""
        return [Input(role=role, key=self.nodes[name].key or "") for role, name in node.inputs]

    def role(self, name: str) -> str:
        """What the stage is to the recipe: `teacher`, `student`, `baseline` or `stage`."""
        if name in self.baselines:
            return "baseline"
        return {self.teacher: "teacher", self.student: "student"}.get(name, "stage")


def build_graph(recipe: Recipe, store: Store | None, cache: Path) -> Graph:
    """Resolve every `from` and `teacher`, expand progressive stages, plan architectures, compute keys.

    Args:
        recipe: as written; `smoke` is applied here.
        store: where finished stages are looked up for architectures that cannot be planned.
        cache: folder for digests of data.

    Raises:
        UserError: a stage that does not exist, a cycle, settings that do not fit the architecture.
    """
    recipe = recipe.shrunk()
    info = recipe.data.describe()
    links = _links(recipe)
    try:
        digest, missing = data_digest(recipe.data, cache), None
    except UserError as error:
        digest, missing = None, str(error).splitlines()[0]
    nodes: dict[str, Node] = {}
    last: dict[str, str] = {}  # the stage whose network a name stands for; for a group, its last member
    for name in _order(recipe, links):
        stage = recipe.stages[name]
        inputs = tuple((role, last.get(other, other)) for role, other in links[name])
        for role, other in inputs:
            if other not in nodes:
                raise UserError(
                    f"stages.{name}.{role}: there is no stage '{other}'{suggest(other, list(nodes))}"
                )
        for node in _expanded(name, stage, inputs, nodes):
            nodes[node.name] = _completed(node, nodes, recipe, info, digest, missing, store)
            last[name] = node.name
    return Graph(
        recipe=recipe,
        info=info,
        nodes=nodes,
        teacher=last[recipe.teacher],
        student=last[recipe.student],
        baselines=tuple(last[name] for name in recipe.baselines),
        data_digest=digest,
    )


def _links(recipe: Recipe) -> dict[str, tuple[tuple[str, str], ...]]:
    """Of every stage, (role, name) of what it needs; the teacher and its ancestors have no teacher."""
    names = list(recipe.stages)
    for key, name in (
        ("teacher", recipe.teacher),
        ("student", recipe.student),
        *(("baselines", name) for name in recipe.baselines),
    ):
        if name not in names:
            raise UserError(f"{key}: there is no stage '{name}'{suggest(name, names)}")
    origins: dict[str, str | None] = {}
    for position, (name, stage) in enumerate(recipe.stages.items()):
        origins[name] = None
        if not stage.needs_from():
            continue
        origin = stage.from_ or (names[position - 1] if position else None)
        if origin is None:
            raise UserError(
                f"stages.{name}.from: the first stage has none before it to start from; begin with a teacher"
            )
        group = origin.rpartition(".")[0]
        if origin not in names and group not in names:
            raise UserError(f"stages.{name}.from: there is no stage '{origin}'{suggest(origin, names)}")
        origins[name] = origin
    taught_by_nobody = {recipe.teacher}
    pending = [recipe.teacher]
    while pending:
        stage, origin = recipe.stages[_group(pending.pop(), names)], None
        origin = origins[next(name for name, known in recipe.stages.items() if known is stage)]
        for other in (origin, stage.teacher):
            if other is not None and _group(other, names) not in taught_by_nobody:
                taught_by_nobody.add(_group(other, names))
                pending.append(other)
    links = {}
    for name, stage in recipe.stages.items():
        teacher = stage.teacher or (None if name in taught_by_nobody else recipe.teacher)
        if teacher is not None and _group(teacher, names) not in names:
            raise UserError(f"stages.{name}.teacher: there is no stage '{teacher}'{suggest(teacher, names)}")
        pairs = [("from", origins[name]), ("teacher", teacher)]
        links[name] = tuple((role, other) for role, other in pairs if other is not None)
    return links


def _group(name: str, names: Sequence[str]) -> str:
    return name if name in names else name.rpartition(".")[0]


def _order(recipe: Recipe, links: Mapping[str, tuple[tuple[str, str], ...]]) -> list[str]:
    """Each stage after those it needs, otherwise in the order of the recipe."""
    names = list(recipe.stages)
    sorter = TopologicalSorter({name: [_group(other, names) for _, other in links[name]] for name in names})
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " <- ".join(reversed(error.args[1]))
        raise UserError(
            f"stages: they depend on one another in a circle: {circle}; mend a from or a teacher"
        ) from error
    order: list[str] = []
    ready = list(sorter.get_ready())
    while ready:
        ready.sort(key=names.index)
        order.append(ready.pop(0))
        sorter.done(order[-1])
        ready += sorter.get_ready()
    return order


def _expanded(
    name: str, stage: Stage, inputs: tuple[tuple[str, str], ...], nodes: Mapping[str, Node]
) -> list[Node]:
    if not isinstance(stage, Progressive):
        return [Node(name, stage, inputs)]
    origin = dict(inputs)["from"]
    try:
        blocks = stage.expand(nodes[origin].spec)
    except UserError as error:
        raise UserError(f"stages.{name}.{error}") from error
    members = []
    for block in blocks:
        member = f"{name}.{block.block}"
        members.append(Node(member, block, (("from", origin), *inputs[1:])))
        origin = member
    return members


def _completed(
    node: Node,
    nodes: Mapping[str, Node],
    recipe: Recipe,
    info: DataInfo,
    digest: str | None,
    missing: str | None,
    store: Store | None,
) -> Node:
    block = node.stage.block if isinstance(node.stage, Block) else None
    seed = stage_seed(recipe.seed, node.stage.kind, block) if not isinstance(node.stage, Load) else 0
    inputs = {role: nodes[name] for role, name in node.inputs}
    key, reason = None, missing
    try:
        semantic = node.stage.semantic()
    except UserError as error:
        reason = reason or str(error)
    else:
        unknown = next((given.reason for given in inputs.values() if given.key is None), None)
        reason = reason or unknown
        if digest is not None and unknown is None:
            key = stage_key(node.stage, semantic, inputs, recipe, digest, seed)
    spec, unplanned = _spec(node, inputs, info)
    if spec is None and key is not None and store is not None and (manifest := store.manifest(key)):
        spec = artifact.read(store.artifact(manifest.artifact)).spec
    return replace(
        node,
        seed=seed,
        spec=spec,
        key=key,
        reason=reason if key is None else unplanned if spec is None else None,
    )


def _spec(node: Node, inputs: Mapping[str, Node], info: DataInfo) -> tuple[NetworkSpec | None, str | None]:
    specs = {role: given.spec for role, given in inputs.items()}
    known = {role: spec for role, spec in specs.items() if spec is not None}
    if len(known) < len(specs):
        return None, next(given.reason for given in inputs.values() if given.spec is None)
    try:
        return node.stage.plan(known, info), None
    except Unplanned as reason:
        return None, str(reason)
    except UserError as error:
        raise UserError(f"stages.{node.name}: {error}") from error


def stage_seed(seed: int, kind: str, block: int | None) -> int:
    """The seed of a stage, from the recipe's seed, the kind and the block; never from name or position."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{kind}/{block}".encode()).digest()[:4], "big")


def stage_key(
    stage: Stage,
    semantic: Mapping[str, Any],
    inputs: Mapping[str, Node],
    recipe: Recipe,
    digest: str,
    seed: int,
) -> str:
    """sha256 over all that determines the weights, and nothing else: no names, paths, executor, retries."""
    identity = {
        "key_version": KEY_VERSION,
        "kind": stage.kind,
        "stage_version": stage.VERSION,
        "engine_version": ENGINE_VERSION,
        "reader_version": READER_VERSION,
        "settings": semantic,
        "inputs": {role: node.key for role, node in sorted(inputs.items())},
        "data_digest": digest,
        "data": recipe.data.semantic(),
        "seed": seed,
        "precision": recipe.compute.precision,
        "channels_last": recipe.compute.channels_last,
        "world_size": recipe.compute.workers,
        "threads": recipe.compute.worker_threads,
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def pipeline_id(graph: Graph) -> str:
    """The same recipe on the same data is the same pipeline, however often it is run."""
    identity = [
        graph.recipe.name,
        sorted((name, node.key) for name, node in graph.nodes.items()),
        [graph.teacher, graph.student, *graph.baselines],
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


def finished(graph: Graph, store: Store) -> dict[str, Manifest]:
    """The stages that are finished already, by name."""
    found = {name: store.manifest(node.key) for name, node in graph.nodes.items() if node.key is not None}
    return {name: manifest for name, manifest in found.items() if manifest is not None}
