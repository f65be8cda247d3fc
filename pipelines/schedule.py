"""Which stages run next: those whose inputs are finished, in chains where starting a job would cost more."""

from __future__ import annotations

from collections.abc import Collection

from pbkd.stages.base import TrainingStage
from pipelines.graph import Graph, Node

JOB_START_SECONDS = 9.0
MACS_PER_SECOND = 25e9
"""Of one CPU thread, roughly: it only decides what is fused."""
TRAINING_SAMPLES = {"digits": 700, "cifar10": 45_000, "cifar100": 45_000, "folder": 1_000_000}


def next_chain(graph: Graph, done: Collection[str], taken: Collection[str]) -> list[Node]:
    """The next stages to run as one job, in order; empty if nothing is ready.

    Args:
        graph: all stages.
        done: names of finished stages.
        taken: names of stages that run, or that somebody else runs.
    """
    ready = [
        node
        for name, node in graph.nodes.items()
        if name not in done and name not in taken and all(given in done for _, given in node.inputs)
    ]
    if not ready:
        return []
    depth = _depths(graph)
    chain = [max(ready, key=lambda node: depth[node.name])]
    while is_fused(graph, chain[-1]):
        available = {*done, *(node.name for node in chain)}
        following = [
            node
            for name, node in graph.nodes.items()
            if name not in available
            and name not in taken
            and any(given == chain[-1].name for _, given in node.inputs)
            and all(given in available for _, given in node.inputs)
            and is_fused(graph, node)
        ]
        if not following:
            break
        chain.append(max(following, key=lambda node: depth[node.name]))
    return chain


def is_fused(graph: Graph, node: Node) -> bool:
    """Whether the stage shares a job with its neighbours."""
    compute = graph.recipe.compute
    if compute.fuse != "auto":
        return compute.fuse
    return estimated_seconds(graph, node) < JOB_START_SECONDS


def estimated_seconds(graph: Graph, node: Node) -> float:
    """A rough guess of how long a stage trains, from its multiply-accumulates and the size of its data."""
    stage, data = node.stage, graph.recipe.data
    if not isinstance(stage, TrainingStage):
        return 0.0
    samples = min(TRAINING_SAMPLES[data.name], data.limit or 10**9)
    seen = stage.steps * data.batch_size if stage.steps is not None else (stage.epochs or 0) * samples
    costs = [graph.nodes[name].cost for _, name in node.inputs] + [node.cost]
    macs = max((cost.macs for cost in costs if cost is not None), default=0)
    workers = graph.recipe.compute.workers * graph.recipe.compute.worker_threads
    return 3 * macs * seen / (MACS_PER_SECOND * workers)


def _depths(graph: Graph) -> dict[str, int]:
    """For every stage, the length of the longest path that starts with it."""
    depth: dict[str, int] = {}
    for name in reversed(list(graph.nodes)):
        users = [other.name for other in graph.nodes.values() if name in [given for _, given in other.inputs]]
        depth[name] = 1 + max((depth[user] for user in users), default=0)
    return depth
