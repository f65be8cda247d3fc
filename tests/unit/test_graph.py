"""From a recipe to its graph: who starts from whom, who teaches whom, what can be planned."""

from pathlib import Path
from typing import Any

import pytest

from pbkd.errors import UserError
from pipelines.graph import Graph, build_graph, pipeline_id, stage_seed
from pipelines.recipe import Recipe

TEACHER = {"kind": "train", "network": {"arch": "resnet20"}, "epochs": 1}
BLOCKS = {"kind": "progressive", "epochs": 1}
DISTILL = {"kind": "distill", "epochs": 1}


def graph_of(folder: Path, stages: dict[str, Any], **changes: Any) -> Graph:
    content = {"name": "graph", "data": {"name": "digits"}, "compute": {"threads": 1}, "stages": stages}
    roles = {"teacher": next(iter(stages)), "student": list(stages)[-1]}
    return build_graph(Recipe.model_validate(content | roles | changes), None, folder)


def inputs(graph: Graph) -> dict[str, dict[str, str]]:
    return {name: dict(node.inputs) for name, node in graph.nodes.items()}


def test_a_stage_follows_the_one_before_it_and_learns_from_the_teacher(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, {"t": TEACHER, "b": BLOCKS | {"blocks": [1, 2]}, "d": DISTILL})
    assert inputs(graph) == {
        "t": {},
        "b.1": {"from": "t", "teacher": "t"},
        "b.2": {"from": "b.1", "teacher": "t"},
        "d": {"from": "b.2", "teacher": "t"},
    }


def test_a_member_of_a_progressive_stage_can_be_named_and_the_group_stands_for_its_last(
    tmp_path: Path,
) -> None:
    stages = {"t": TEACHER, "b": BLOCKS, "d": DISTILL | {"from": "b.2"}, "e": DISTILL | {"from": "b"}}
    graph = graph_of(tmp_path, stages, student="b.1", baselines=["b"])
    assert (graph.nodes["d"].inputs[0], graph.nodes["e"].inputs[0]) == (("from", "b.2"), ("from", "b.3"))
    assert (graph.student, graph.baselines) == ("b.1", ("b.3",))


def test_until_keeps_what_a_stage_needs_and_its_key(tmp_path: Path) -> None:
    stages = {"t": TEACHER, "b": BLOCKS, "d": DISTILL, "s": DISTILL | {"from": "b.1"}, "e": DISTILL}
    whole = graph_of(tmp_path, stages, baselines=["s"])
    part = whole.until(["d"])
    assert list(part.nodes) == ["t", "b.1", "b.2", "b.3", "d"]
    assert all(part.nodes[name] == whole.nodes[name] for name in part.nodes)
    assert (part.student, part.baselines) == ("d", ())
    assert list(whole.until(["s", "b"]).nodes) == ["t", "b.1", "b.2", "b.3", "s"]
    assert whole.until(["b", "s"]).baselines == ("s",)
    assert whole.until(["e"]).student == "e"
    with pytest.raises(UserError, match="--until: there is no stage 'f'"):
        whole.until(["f"])


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("bottom_up", ["b.1", "b.2", "b.3"]),
        ("top_down", ["b.3", "b.2", "b.1"]),
        ("listed", ["b.2", "b.3", "b.1"]),
    ],
)
def test_the_order_of_blocks(order: str, expected: list[str], tmp_path: Path) -> None:
    graph = graph_of(tmp_path, {"t": TEACHER, "b": BLOCKS | {"blocks": [2, 3, 1], "order": order}})
    assert list(graph.nodes)[1:] == expected


def test_blocks_on_the_teachers_own_features_depend_on_it_alone_and_are_assembled(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, {"t": TEACHER, "b": BLOCKS | {"input": "teacher"}, "d": DISTILL})
    for name in ("b.1", "b.2", "b.3"):
        assert dict(graph.nodes[name].inputs) == {"from": "t", "teacher": "t"}
    joined = {f"block.{number}": f"b.{number}" for number in (1, 2, 3)}
    assert joined.items() <= dict(graph.nodes["b.assembled"].inputs).items()
    assert dict(graph.nodes["d"].inputs)["from"] == "b.assembled"
    chain = graph_of(tmp_path, {"t": TEACHER, "b": BLOCKS})
    assert graph.nodes["b.assembled"].spec == chain.nodes["b.3"].spec


def test_blocks_after_their_interface_was_pruned_are_refused_in_the_plan(tmp_path: Path) -> None:
    teacher = TEACHER | {"network": {"arch": "resnet20", "shortcut": "B"}}
    pruned = {"kind": "prune", "ratio": 0.5, "scope": "all"}
    with pytest.raises(UserError, match=r"stages\.b"):
        graph_of(tmp_path, {"t": teacher, "p": pruned, "b": BLOCKS | {"blocks": [1]}})


def test_an_assistant_teaches_where_it_is_named(tmp_path: Path) -> None:
    stages = {"t": TEACHER, "assistant": DISTILL, "s": DISTILL | {"from": "t", "teacher": "assistant"}}
    assert inputs(graph_of(tmp_path, stages))["s"] == {"from": "t", "teacher": "assistant"}


def test_the_teacher_and_what_it_is_made_from_have_no_teacher(tmp_path: Path) -> None:
    stages = {
        "trained": TEACHER,
        "pruned": {"kind": "prune", "ratio": 0.5},
        "tuned": {"kind": "train", "weights": "keep", "epochs": 1},
        "s": DISTILL,
    }
    graph = graph_of(tmp_path, stages, teacher="tuned")
    assert [inputs(graph)[name] for name in stages] == [
        {},
        {"from": "trained"},
        {"from": "pruned"},
        {"from": "tuned", "teacher": "tuned"},
    ]


def test_what_the_teacher_is_made_from_may_name_its_own_teacher(tmp_path: Path) -> None:
    stages = {"first": TEACHER, "blocks": BLOCKS | {"teacher": "first"}, "s": DISTILL}
    graph = graph_of(tmp_path, stages, teacher="blocks")
    assert inputs(graph)["blocks.1"] == {"from": "first", "teacher": "first"}
    assert graph.teacher == "blocks.3"


def test_a_stage_with_a_network_of_its_own_starts_from_no_other(tmp_path: Path) -> None:
    loads = {"kind": "load", "network": {"arch": "resnet20"}, "weights": "w", "from": "t"}
    with pytest.raises(UserError, match=r"stages\.l\.from: it has a network of its own"):
        graph_of(tmp_path, {"t": TEACHER, "l": loads})


def test_what_cannot_be_planned_says_why_and_has_a_key_all_the_same(tmp_path: Path) -> None:
    pruned = {"kind": "prune", "ratio": 0.5, "ranking": "global"}
    graph = graph_of(tmp_path, {"t": TEACHER, "p": pruned, "d": DISTILL})
    for name in ("p", "d"):
        node = graph.nodes[name]
        assert node.spec is None and node.cost is None
        assert node.reason == "which layers lose channels depends on the weights"
        assert node.key is not None


def test_smoke_shrinks_data_and_stages(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, {"t": TEACHER, "b": BLOCKS}, smoke=True)
    assert graph.recipe.data.limit == 256
    assert {getattr(node.stage, "steps", None) for node in graph.nodes.values()} == {4}
    assert graph.recipe.shrunk() == graph.recipe


def test_seeds_differ_by_recipe_kind_and_block_alone() -> None:
    seeds = [
        stage_seed(*what) for what in [(0, "block", 1), (0, "block", 2), (0, "train", None), (1, "block", 1)]
    ]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_the_pipeline_is_the_same_whatever_runs_it(tmp_path: Path) -> None:
    stages = {"t": TEACHER, "d": DISTILL}
    first = graph_of(tmp_path, stages)
    assert pipeline_id(first) == pipeline_id(
        graph_of(tmp_path, stages, compute={"threads": 1, "executor": "local"})
    )
    assert pipeline_id(first) != pipeline_id(graph_of(tmp_path, stages, seed=1))
