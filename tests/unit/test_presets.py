"""The recipes that carry the paper's name have the paper's settings."""

import pytest

from pbkd.engine import OptimizerSettings
from pbkd.stages import Progressive
from pipelines.recipe_file import load_recipe
from tests.integration.pbkd_process import ROOT

CIFAR = OptimizerSettings(lr=0.01, weight_decay=5e-3, schedule="step", milestones=(0.5,), decay=0.1)
IMAGENET = OptimizerSettings(lr=0.01, weight_decay=5e-4, schedule="constant")


@pytest.mark.parametrize(
    ("name", "batch_size", "epochs", "steps", "optimizer"),
    [
        ("cifar10_vgg16", 100, 6, None, CIFAR),
        ("cifar100_vgg16", 100, 6, None, CIFAR),
        ("imagenet_vgg16_conv", 32, None, 50_000, IMAGENET),
        ("imagenet_resnet18", 32, None, 50_000, IMAGENET),
        ("imagenet_resnet50", 32, None, 50_000, IMAGENET),
    ],
)
def test_block_stages_are_trained_as_published(
    name: str, batch_size: int, epochs: int | None, steps: int | None, optimizer: OptimizerSettings
) -> None:
    recipe = load_recipe(ROOT / "pipelines" / "recipes" / f"{name}.yaml", [])
    blocks = next(stage for stage in recipe.stages.values() if isinstance(stage, Progressive))
    assert recipe.data.batch_size == batch_size
    assert (blocks.width, blocks.order, blocks.input) == (0.5, "bottom_up", "student")
    assert (blocks.epochs, blocks.steps) == (epochs, steps)
    trained = blocks.optimizer
    assert trained == optimizer and (trained.name, trained.momentum, trained.nesterov) == ("sgd", 0.9, False)
    rates = {0: 0.01, 2: 0.01, 3: 0.001, 5: 0.001} if optimizer is CIFAR else {0: 0.01, 5: 0.01}
    assert {epoch: round(trained.rate(epoch * 500, 6 * 500), 9) for epoch in rates} == rates
