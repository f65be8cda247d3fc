"""Which stages run next, and which of them share a job."""

from pathlib import Path
from typing import Any

from pipelines.graph import Graph, build_graph
from pipelines.recipe import Recipe
from pipelines.schedule import next_chain

STAGES = {
    "t": {"kind": "train", "network": {"arch": "resnet20"}, "steps": 1},
    "a": {"kind": "distill", "steps": 1},
    "b": {"kind": "distill", "steps": 1, "alpha": 0.1},
    "c": {"kind": "distill", "steps": 1, "from": "t", "alpha": 0.2},
}
AGES = 10**9  # steps


def graph_of(folder: Path, stages: dict[str, Any], fuse: bool | str) -> Graph:
    content = {
        "name": "schedule",
        "data": {"name": "digits"},
        "stages": stages,
        "teacher": "t",
        "student": "b",
    }
    compute = {"threads": 1, "fuse": fuse}
    return build_graph(Recipe.model_validate(content | {"compute": compute}), None, folder)


def chain(graph: Graph, done: set[str], taken: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    return [node.name for node in next_chain(graph, done, taken)]


def test_without_fusing_every_stage_is_a_job(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, STAGES, fuse=False)
    assert chain(graph, set()) == ["t"]
    assert chain(graph, {"t"}) == ["a"], "the longest way to the end goes first"
    assert chain(graph, {"t"}, {"a"}) == ["c"]
    assert chain(graph, {"t"}, {"a", "c"}) == []
    assert chain(graph, {"t", "a"}, {"c"}) == ["b"]


def test_fusing_gives_a_chain_to_one_job_and_leaves_branches_to_others(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, STAGES, fuse=True)
    assert chain(graph, set()) == ["t", "a", "b"]
    assert chain(graph, {"t"}, {"a", "b"}) == ["c"]


def test_a_stage_that_somebody_else_runs_ends_the_chain(tmp_path: Path) -> None:
    assert chain(graph_of(tmp_path, STAGES, fuse=True), set(), {"a"}) == ["t", "c"]


def test_auto_fuses_what_is_shorter_than_the_start_of_a_job(tmp_path: Path) -> None:
    long = STAGES | {"b": STAGES["b"] | {"steps": AGES}}
    assert chain(graph_of(tmp_path, STAGES, fuse="auto"), set()) == ["t", "a", "b"]
    assert chain(graph_of(tmp_path, long, fuse="auto"), set()) == ["t", "a"]
    assert chain(graph_of(tmp_path, long, fuse="auto"), {"t", "a"}) == ["b"]


def test_nothing_is_left_when_all_is_done(tmp_path: Path) -> None:
    assert chain(graph_of(tmp_path, STAGES, fuse=True), set(STAGES)) == []
