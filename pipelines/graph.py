"""From a recipe to the graph of its stages: who starts from whom, who teaches whom, and every stage's key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pbkd import artifact
from pbkd.data import READER_VERSION, DataInfo, DataSettings, Identity, look_at
from pbkd.engine import ENGINE_VERSION
from pbkd.errors import UserError
from pbkd.measure import Cost
from pbkd.networks import AnySpec, cost_of
from pbkd.stages import Block, Distill, Load, Progressive, Stage, Unplanned
from pipelines.manifest import Input, Manifest
from pipelines.recipe import Compute, Recipe, suggest
from pipelines.store import Store

KEY_VERSION = 1
Links = tuple[tuple[str, str], ...]


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
        missing: why `key` is None.
        unplanned: why `spec` is None.
    """

    name: str
    stage: Stage
    inputs: tuple[tuple[str, str], ...]
    seed: int = 0
    spec: AnySpec | None = None
    key: str | None = None
    missing: str | None = None
    unplanned: str | None = None

    @property
    def reason(self) -> str | None:
        """Why something of it is not known yet."""
        return "; ".join(dict.fromkeys(why for why in (self.missing, self.unplanned) if why)) or None

    @property
    def cost(self) -> Cost | None:
        """Parameters and multiply-accumulates of the network it gives."""
        return None if self.spec is None else cost_of(self.spec)


@dataclass(frozen=True)
class Graph:
    """All stages of a recipe, each after those it depends on.

    `data` are the recipe's, with `loader` as it is taken here. `identity` is None, and `missing_data` the
    user's message, where the data, or betons that are asked for, are not.
    """

    recipe: Recipe
    data: DataSettings
    info: DataInfo
    nodes: dict[str, Node]
    teacher: str
    student: str
    baselines: tuple[str, ...]
    identity: Identity | None
    missing_data: str | None

    @property
    def data_digest(self) -> str | None:
        """The digest of the data that the keys are made with."""
        return None if self.identity is None else self.identity.digest

    def key_inputs(self, node: Node) -> list[Input]:
        """The inputs of `node` by key."""
        return [Input(role=role, key=self.nodes[name].key or "") for role, name in node.inputs]

    def until(self, names: Sequence[str]) -> Graph:
        """What leads to the stages `names`; if the student is not in it, the last of them is the student.

        Raises:
            UserError: there is no such stage.
        """
        wanted = []
        for name in names:
            members = [other for other in self.nodes if other == name or _group(other, ()) == name]
            if not members:
                raise UserError(f"--until: there is no stage '{name}'{suggest(name, list(self.nodes))}")
            wanted.append(members[-1])
        kept: set[str] = set()
        pending = [self.teacher, *wanted]
        while pending:
            kept.add(name := pending.pop())
            pending += [other for _, other in self.nodes[name].inputs if other not in kept]
        return replace(
            self,
            nodes={name: node for name, node in self.nodes.items() if name in kept},
            student=self.student if self.student in kept else wanted[-1],
            baselines=tuple(name for name in self.baselines if name in kept),
        )

    def role(self, name: str) -> str:
        """What the stage is to the recipe: `teacher`, `student`, `baseline` or `stage`."""
        if name in self.baselines:
            return "baseline"
        return {self.teacher: "teacher", self.student: "student"}.get(name, "stage")


def build_graph(recipe: Recipe, store: Store | None, cache: Path, identity: Identity | None = None) -> Graph:
    """Resolve every `from` and `teacher`, expand progressive stages, plan architectures, compute keys.

    Args:
        recipe: as written; `smoke` is applied here.
        store: where finished stages are looked up for architectures that cannot be planned.
        cache: folder for digests of data.
        identity: of data that were looked at before, which are not again if they are the recipe's.

    Raises:
        UserError: a stage that does not exist, a cycle, settings that do not fit the architecture.
    """
    recipe = recipe.shrunk()
    links = _links(recipe)
    builder = _Builder(recipe, store, cache, identity)
    for name in _order(recipe, links):
        builder.add(name, links[name])
    return Graph(
        recipe=recipe,
        data=builder.data,
        info=builder.info,
        nodes=builder.nodes,
        teacher=builder.node("teacher", recipe.teacher).name,
        student=builder.node("student", recipe.student).name,
        baselines=tuple(builder.node("baselines", name).name for name in recipe.baselines),
        identity=builder.identity,
        missing_data=builder.missing_data,
    )


def require_keys(graph: Graph) -> None:
    """Raise UserError if data or weights that a run needs are missing; says how to get them."""
    if graph.missing_data is not None:
        raise UserError(graph.missing_data)
    for node in graph.nodes.values():
        if node.key is None:
            raise UserError(f"stages.{node.name}.{node.missing}")


def _links(recipe: Recipe) -> dict[str, Links]:
    """Of every stage, (role, name) of what it needs; the teacher and what it is made from have no teacher."""
    stages = recipe.stages

    def known(key: str, name: str) -> str:
        if _group(name, stages) not in stages:
            raise UserError(f"{key}: there is no stage '{name}'{suggest(name, list(stages))}")
        return name

    for key, name in [("teacher", recipe.teacher), ("student", recipe.student)]:
        known(key, name)
    for name in recipe.baselines:
        known("baselines", name)
    origins: dict[str, str] = {}
    before: str | None = None
    for name, stage in stages.items():
        if stage.teacher is not None:
            known(f"stages.{name}.teacher", stage.teacher)
        origin = stage.from_ or before
        before = name
        if not stage.needs_from():
            if stage.from_ is not None:
                raise UserError(f"stages.{name}.from: it has a network of its own; leave `from` out")
        elif origin is None:
            raise UserError(f"stages.{name}.from: the first stage has none before it; begin with a teacher")
        else:
            origins[name] = known(f"stages.{name}.from", origin)

    untaught: set[str] = set()
    pending = [recipe.teacher]
    while pending:
        name = _group(pending.pop(), stages)
        if name not in untaught:
            untaught.add(name)
            pending += [other for other in (origins.get(name), stages[name].teacher) if other is not None]

    links: dict[str, Links] = {}
    for name, stage in stages.items():
        teacher = stage.teacher or (None if name in untaught else recipe.teacher)
        if teacher is None and isinstance(stage, Block | Progressive | Distill):
            raise UserError(
                f"stages.{name}.teacher: is missing; the recipe's teacher, '{recipe.teacher}', "
                "is made from this stage, so it needs another one"
            )
        pairs = [("from", origins.get(name)), ("teacher", teacher)]
        links[name] = tuple((role, other) for role, other in pairs if other is not None)
    return links


def _group(name: str, stages: Collection[str]) -> str:
    """The stage in the recipe that `name`, perhaps a member such as `blocks.2`, belongs to."""
    return name if name in stages else name.rpartition(".")[0]


def _order(recipe: Recipe, links: Mapping[str, Links]) -> list[str]:
    """Each stage after those it needs, otherwise in the order of the recipe."""
    names = list(recipe.stages)
    sorter = TopologicalSorter({name: [_group(other, names) for _, other in links[name]] for name in names})
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " <- ".join(reversed(error.args[1]))
        raise UserError(f"stages: they depend on one another in a circle, {circle}; mend a from") from error
    order: list[str] = []
    ready = list(sorter.get_ready())
    while ready:
        ready.sort(key=names.index)
        order.append(ready.pop(0))
        sorter.done(order[-1])
        ready += sorter.get_ready()
    return order


class _Builder:
    """Adds the stages of a recipe one by one, each after those it needs.

    Attributes:
        data: the recipe's, with `loader` resolved.
        info: the data's.
        identity, missing_data: of the data, or why there is none.
        nodes: so far.
    """

    def __init__(self, recipe: Recipe, store: Store | None, cache: Path, known: Identity | None) -> None:
        self.data, self.identity, self.missing_data = look_at(recipe.data, cache, known)
        self.info = recipe.data.describe(None if self.identity is None else len(self.identity.classes))
        self.nodes: dict[str, Node] = {}
        self._recipe, self._store = recipe, store
        self._last: dict[
            str, str
        ] = {}  # of a progressive stage, its last member: the one its name stands for

    def node(self, key: str, name: str) -> Node:
        """The node that `name` under `key` in the recipe stands for."""
        node = self.nodes.get(self._last.get(name, name))
        if node is None:
            raise UserError(f"{key}: there is no stage '{name}'{suggest(name, list(self.nodes))}")
        return node

    def add(self, name: str, links: Links) -> None:
        """Add a stage of the recipe, or the members of a progressive one."""
        stage = self._recipe.stages[name]
        inputs = {role: self.node(f"stages.{name}.{role}", other) for role, other in links}
        if not isinstance(stage, Progressive):
            self._add(name, stage, inputs)
            return
        try:
            members = stage.members(inputs["from"].spec)
        except UserError as error:
            raise UserError(f"stages.{name}.{error}") from error
        if not members:
            raise UserError(f"stages.{name}.blocks: is empty; list some, or leave it out for all of them")
        for member in members:
            own = {
                role: inputs["from"] if other is None else self.nodes[f"{name}.{other}"]
                for role, other in member.inputs
            }
            self._last[name] = self._add(f"{name}.{member.name}", member.stage, inputs | own).name

    def _add(self, name: str, stage: Stage, inputs: Mapping[str, Node]) -> Node:
        try:
            stage.check_lineage(self._since_teacher(inputs))
        except UserError as error:
            raise UserError(f"stages.{_group(name, self._recipe.stages)}: {error}") from error
        spec, unplanned = self._spec(name, stage, inputs)
        block = stage.block if isinstance(stage, Block) else None
        seed = 0 if isinstance(stage, Load) else stage_seed(self._recipe.seed, stage.kind, block)
        key, missing = self._key(stage, inputs, seed)
        if spec is None and key is not None and self._store is not None:
            manifest = self._store.manifest(key)
            if manifest is not None:
                spec = artifact.read(self._store.artifact(manifest.artifact)).spec
        self.nodes[name] = Node(
            name=name,
            stage=stage,
            inputs=tuple((role, given.name) for role, given in inputs.items()),
            seed=seed,
            spec=spec,
            key=key,
            missing=missing,
            unplanned=unplanned if spec is None else None,
        )
        return self.nodes[name]

    def _since_teacher(self, inputs: Mapping[str, Node]) -> list[Stage]:
        """The stages the network went through since it was the teacher's, oldest first."""

        def ancestors(node: Node | None) -> list[Node]:
            found = []
            while node is not None:
                found.append(node)
                origin = dict(node.inputs).get("from")
                node = None if origin is None else self.nodes[origin]
            return found

        taught = ancestors(inputs.get("teacher"))
        return [node.stage for node in reversed(ancestors(inputs.get("from"))) if node not in taught]

    def _key(self, stage: Stage, inputs: Mapping[str, Node], seed: int) -> tuple[str | None, str | None]:
        """The key, or None and the reason."""
        if self.identity is None:
            return None, "; ".join((self.missing_data or "").splitlines())
        for given in inputs.values():
            if given.key is None:
                return None, given.missing
        try:
            semantic = stage.semantic()
        except UserError as error:
            return None, str(error)
        digest = self.identity.digest
        return stage_key(stage, semantic, inputs, self.data, self._recipe.compute, digest, seed), None

    def _spec(self, name: str, stage: Stage, inputs: Mapping[str, Node]) -> tuple[AnySpec | None, str | None]:
        """The architecture, or None and the reason."""
        specs: dict[str, AnySpec] = {}
        for role, given in inputs.items():
            if given.spec is None:
                return None, given.unplanned
            specs[role] = given.spec
        try:
            return stage.plan(specs, self.info), None
        except Unplanned as reason:
            return None, str(reason)
        except UserError as error:
            raise UserError(f"stages.{_group(name, self._recipe.stages)}: {error}") from error


def stage_seed(seed: int, kind: str, block: int | None) -> int:
    """The seed of a stage, from the recipe's seed, the kind and the block; never from name or position."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{kind}/{block}".encode()).digest()[:4], "big")


def stage_key(
    stage: Stage,
    semantic: Mapping[str, Any],
    inputs: Mapping[str, Node],
    data: DataSettings,
    compute: Compute,
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
        "data": data.semantic(),
        "seed": seed,
        "precision": compute.precision,
        "channels_last": compute.channels_last,
        "world_size": compute.world_size,
        "threads": compute.worker_threads,
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
