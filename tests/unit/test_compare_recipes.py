"""The comparison of methods is complete and fair: every method has its stage, and budgets are equal."""

from pathlib import Path

import pytest
import torch

from pbkd.data import open_data
from pbkd.engine import LocalSession, Precision
from pbkd.networks import BlockNetwork
from pbkd.stages import Block, Context, Distill, Prune, Stabilize, Train, run_stage
from pbkd.stages.base import TrainingStage
from pipelines.graph import Graph, build_graph
from pipelines.recipe_file import load_recipe

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
EPOCHS = 24
LONGER = {"scratch_b", "ticket_4"}

torch.set_num_threads(1)  # the networks are too small for more


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Graph:
    cache = tmp_path_factory.mktemp("cache")
    return build_graph(load_recipe(RECIPES / "compare_digits.yaml"), None, cache)


def path_to(graph: Graph, name: str) -> list[str]:
    """Stages from the teacher's to `name`, without the teacher."""
    path = []
    while name != graph.teacher:
        path.append(name)
        name = dict(graph.nodes[name].inputs)["from"]
    return path[::-1]


def epochs(graph: Graph, name: str) -> int:
    """Of all stages that the network was made by since it was the teacher's."""
    makers, pending = set[str](), [name]
    while pending:
        maker = pending.pop()
        if maker not in makers | {graph.teacher}:
            makers.add(maker)
            pending += [other for role, other in graph.nodes[maker].inputs if role != "teacher"]
    stages = [graph.nodes[maker].stage for maker in makers]
    return sum(stage.epochs or 0 for stage in stages if isinstance(stage, TrainingStage))


def test_budgets_are_equal_where_they_are_meant_to_be(graph: Graph) -> None:
    spent = {name: epochs(graph, name) for name in (graph.student, *graph.baselines)}
    assert {name for name, length in spent.items() if length != EPOCHS} == LONGER
    assert spent["ticket_4"] == 4 * EPOCHS
    pruned, teacher = graph.nodes["pruned"].cost, graph.nodes["teacher"].cost
    assert pruned is not None
    assert teacher is not None
    assert spent["scratch_b"] / EPOCHS == pytest.approx(teacher.macs / pruned.macs, rel=0.1), "the same MACs"
    assistant = graph.nodes["assistant"].stage
    assert isinstance(assistant, Distill)
    assert assistant.epochs == EPOCHS


def test_every_method_has_its_stage(graph: Graph) -> None:
    stages = {name: node.stage for name, node in graph.nodes.items()}

    def kinds(name: str) -> list[str]:
        return [stages[member].kind for member in path_to(graph, name)]

    def distill(name: str) -> Distill:
        stage = stages[name]
        assert isinstance(stage, Distill)
        return stage

    assert kinds("two_stage") == ["block", "block", "block", "stabilize", "distill"]
    assert kinds("one_stage") == ["block", "block", "block", "distill"]
    for pair in (("two_stage", "one_stage"), ("recovered", "recovered_at_once")):
        assert all(distill(name).shock for name in pair)
    apart = stages["blocks_apart.1"]
    assert isinstance(apart, Block)
    assert apart.input == "teacher"
    assert (distill("hinton").alpha, distill("hinton").temperature, distill("hinton").weights) == (
        0.9,
        4.0,
        "fresh",
    )
    assert (distill("attention").alpha, distill("attention").attention_weight) == (0.0, 60.0)
    relational = distill("relational")
    assert (relational.alpha, relational.distance_weight, relational.angle_weight) == (0.0, 25.0, 50.0)
    assert dict(graph.nodes["assisted"].inputs)["teacher"] == "assistant"
    assert kinds("recovered") == ["prune", "stabilize", "distill"]
    assert kinds("recovered_at_once") == ["prune", "distill"]
    assert kinds("fine_tuned") == kinds("scratch_e") == kinds("scratch_b") == ["prune", "train"]
    assert kinds("hybrid") == ["block", "block", "block", "prune", "stabilize", "distill"]
    assert kinds("ticket_4") == 4 * ["prune", "train"]
    trained = stages["teacher"]
    assert isinstance(trained, Train)
    for level in range(1, 5):
        sparse, ticket = stages[f"sparse_{level}"], stages[f"ticket_{level}"]
        assert isinstance(sparse, Prune)
        assert isinstance(ticket, Train)
        assert sparse.sparsity == 0.2
        assert (ticket.epochs, ticket.optimizer) == (trained.epochs, trained.optimizer), "its first steps"
        assert graph.nodes[f"ticket_{level}"].seed == graph.nodes["teacher"].seed


def test_students_of_one_architecture_are_compared(graph: Graph) -> None:
    def same(*names: str) -> bool:
        return len({graph.nodes[name].spec for name in names}) == 1

    assert same(
        *("two_stage", "one_stage", "independent", "hinton_same_start"),
        *("scratch", "hinton", "attention", "relational", "assisted"),
    )
    assert same("fine_tuned", "recovered", "recovered_at_once", "scratch_e", "scratch_b")


@pytest.mark.slow
def test_the_comparison_runs_at_smoke_size(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPES / "compare_digits.yaml", ["smoke=true", "data.limit=64"])
    graph = build_graph(recipe, None, tmp_path)
    data, results = open_data(graph.recipe.data), dict[str, BlockNetwork]()
    for name, node in graph.nodes.items():
        inputs = {role: results[other] for role, other in node.inputs}
        result = run_stage(node.stage, Context(LocalSession(), inputs, data, node.seed, Precision()))
        results[name] = result.network
        assert result.network.spec == node.spec
    assert any(isinstance(node.stage, Stabilize) for node in graph.nodes.values())


def test_the_sparse_network_is_compared_with_a_full_one_trained_as_long(tmp_path: Path) -> None:
    graph = build_graph(load_recipe(RECIPES / "sparse_resnet18.yaml"), None, tmp_path)
    teacher = graph.nodes["teacher"].stage
    assert isinstance(teacher, Train)
    assert teacher.epochs is not None
    assert epochs(graph, "recovered") == epochs(graph, "fine_tuned")
    for standard in ("full_size", "scratch"):
        assert epochs(graph, standard) == teacher.epochs + epochs(graph, "recovered")
