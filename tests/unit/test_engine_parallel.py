"""Two ranks of a gloo group train as one process does at the same global batch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pbkd.engine import LocalSession, OptimizerSettings, Row, Task, TrainingSettings, fit
from pbkd.networks import BlockNetwork, FeatureNetwork, Features, fresh
from pbkd.objectives import attention, cross_entropy, local_feature
from tests.unit.small_networks import digits, random_norms, small_vgg

pytestmark = pytest.mark.slow

WORLD = 2


def objective(output: Tensor, logits: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
    local = local_feature(output, target, "mean")
    return {"loss": local + cross_entropy(logits, labels), "local_loss": local}


def train_block(network: BlockNetwork, session: LocalSession) -> list[Row]:
    """Train block 2 towards what it was, from a disturbed start; 97 and 3 samples make uneven shares."""
    teacher = fresh(network.spec, 1).blocks[1]
    task = Task(
        trained=network.blocks[1],
        objective=objective,
        prefix=network.prefix(1),
        suffix=network.suffix(1),
        teacher=teacher,
        teacher_input="prefix",
    )
    settings = TrainingSettings(epochs=2, optimizer=OptimizerSettings(lr=0.05, clip=1.0))
    data = digits(limit=194)
    reader = data.reader("train", 97, 3, rank=session.rank, world=session.world_size, shuffle=True)
    return fit(task, settings, reader, session, 0)


def attention_objective(
    output: Features, logits: Features, target: Features, labels: Tensor
) -> dict[str, Tensor]:
    return {"loss": 100 * attention(output.blocks, target.blocks) + cross_entropy(output.logits, labels)}


def train_on_features(network: BlockNetwork, session: LocalSession) -> None:
    """Every block looks where the teacher's looks."""
    teacher = FeatureNetwork(fresh(network.spec, 1))
    task = Task(FeatureNetwork(network), attention_objective, teacher=teacher)
    settings = TrainingSettings(steps=3, optimizer=OptimizerSettings(lr=0.05, clip=1.0))
    reader = digits(limit=194).reader(
        "train", 97, 3, rank=session.rank, world=session.world_size, shuffle=True
    )
    fit(task, settings, reader, session, 0)


def network_of(norm: bool) -> BlockNetwork:
    return random_norms(fresh(small_vgg(norm), 0)).eval().requires_grad_(False)


def run_rank(rank: int, folder: str) -> None:
    """One of `WORLD` processes."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    try:
        largest = LocalSession(rank=rank, world_size=WORLD).max(torch.tensor([float(rank), -float(rank)]))
        save_file({"largest": largest}, Path(folder) / f"largest-{rank}.safetensors")
        for norm in (False, True):
            network = network_of(norm)
            history = train_block(network, LocalSession(rank=rank, world_size=WORLD))
            tensors = network.state_dict() | {"loss": torch.tensor([row["train_loss"] for row in history])}
            save_file(tensors, Path(folder) / f"{norm}-{rank}.safetensors")
        network = network_of(norm=False)
        train_on_features(network, LocalSession(rank=rank, world_size=WORLD))
        save_file(network.state_dict(), Path(folder) / f"features-{rank}.safetensors")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(path),), nprocs=WORLD)
    return path


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[tuple[bool, int], dict[str, Tensor]]:
    return {
        (norm, rank): load_file(folder / f"{norm}-{rank}.safetensors")
        for norm in (False, True)
        for rank in range(WORLD)
    }


def test_every_rank_knows_the_largest_value_of_all(folder: Path) -> None:
    for rank in range(WORLD):
        found = load_file(folder / f"largest-{rank}.safetensors")["largest"]
        assert found.tolist() == [WORLD - 1, 0]


@pytest.mark.parametrize("norm", [False, True])
def test_ranks_end_alike_and_change_only_the_trained_block(
    ranks: dict[tuple[bool, int], dict[str, Tensor]], norm: bool
) -> None:
    first, second = ranks[norm, 0], ranks[norm, 1]
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items()), "weights and statistics"
    before = network_of(norm).state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, first[name])}
    assert changed == {name for name in before if name.startswith("blocks.1.")}


def test_without_batch_norm_two_ranks_are_one_process(
    ranks: dict[tuple[bool, int], dict[str, Tensor]],
) -> None:
    network = network_of(norm=False)
    history = train_block(network, LocalSession())
    assert ranks[False, 0]["loss"].tolist() == pytest.approx([row["train_loss"] for row in history], rel=1e-5)
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(ranks[False, 0][name], tensor, rtol=1e-4, atol=1e-6)


def test_features_reach_the_objective_on_every_rank(folder: Path) -> None:
    network = network_of(norm=False)
    train_on_features(network, LocalSession())
    first, second = (load_file(folder / f"features-{rank}.safetensors") for rank in range(WORLD))
    for name, tensor in network.state_dict().items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-6)
