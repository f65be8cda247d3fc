"""The stage key: what is in it, what is not, each changed alone."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pbkd.data import Identity, loader
from pbkd.errors import UserError
from pbkd.stages import Train
from pipelines import graph as graph_module
from pipelines.graph import build_graph
from pipelines.recipe import Recipe

Content = dict[str, Any]


def content() -> Content:
    return {
        "name": "keys",
        "data": {"name": "digits", "batch_size": 50},
        "compute": {"threads": 1},
        "teacher": "teacher",
        "student": "distilled",
        "baselines": ["scratch"],
        "stages": {
            "teacher": {"kind": "train", "network": {"arch": "resnet20"}, "epochs": 2},
            "blocks": {"kind": "progressive", "epochs": 2},
            "distilled": {"kind": "distill", "epochs": 2},
            "scratch": {"kind": "train", "from": "distilled", "epochs": 2},
        },
    }


def keys(recipe: Content, folder: Path) -> dict[str, str]:
    nodes = build_graph(Recipe.model_validate(recipe), None, folder / "cache").nodes
    assert all(node.key for node in nodes.values())
    return {name: str(node.key) for name, node in nodes.items()}


def changed(change: Callable[[Content], object], folder: Path) -> set[str]:
    """The stages whose keys are others after `change`."""
    recipe = content()
    before = keys(recipe, folder)
    change(recipe)
    after = keys(recipe, folder)
    return {name for name in before if before[name] != after[name]}


EVERY = {"teacher", "blocks.1", "blocks.2", "blocks.3", "distilled", "scratch"}
BUT_THE_TEACHER = EVERY - {"teacher"}

IN_THE_KEY: dict[str, tuple[Callable[[Content], object], set[str]]] = {
    "a setting of a stage": (
        lambda recipe: recipe["stages"]["distilled"].update(alpha=0.5),
        {"distilled", "scratch"},
    ),
    "a setting of the optimizer": (
        lambda recipe: recipe["stages"]["scratch"].update(optimizer={"lr": 0.5}),
        {"scratch"},
    ),
    "a setting of one kind": (
        lambda recipe: recipe["stages"]["blocks"].update(init="inherit"),
        BUT_THE_TEACHER,
    ),
    "the inputs": (lambda recipe: recipe["stages"]["teacher"].update(epochs=3), EVERY),
    "which stage is started from": (
        lambda recipe: recipe["stages"]["scratch"].update({"from": "blocks"}),
        {"scratch"},
    ),
    "which stage teaches": (
        lambda recipe: recipe["stages"]["distilled"].update(teacher="blocks"),
        {"distilled", "scratch"},
    ),
    "the seed": (lambda recipe: recipe.update(seed=1), EVERY),
    "precision": (lambda recipe: recipe["compute"].update(precision="bf16"), EVERY),
    "memory layout": (lambda recipe: recipe["compute"].update(channels_last=True), EVERY),
    "world size": (lambda recipe: recipe["compute"].update(workers=2), EVERY),
    "elastic workers": (lambda recipe: recipe["compute"].update(min_workers=1), EVERY),
    "threads": (lambda recipe: recipe["compute"].update(threads=2), EVERY),
    "global batch": (lambda recipe: recipe["data"].update(batch_size=25), EVERY),
    "augmentation": (lambda recipe: recipe["data"].update(augment="none"), EVERY),
    "normalization": (lambda recipe: recipe["data"].update(mean=[0.5]), EVERY),
    "number of samples": (lambda recipe: recipe["data"].update(limit=100), EVERY),
    "smoke": (lambda recipe: recipe.update(smoke=True), EVERY),
}


def rename_stages(recipe: Content) -> None:
    stages = recipe["stages"]
    recipe["stages"] = {
        "t": stages["teacher"],
        "blocks": stages["blocks"],
        "d": stages["distilled"],
        "s": stages["scratch"] | {"from": "d"},
    }
    recipe.update(teacher="t", student="d", baselines=["s"])


NOT_IN_THE_KEY: dict[str, Callable[[Content], object]] = {
    "name of the recipe": lambda recipe: recipe.update(name="other"),
    "path of the data": lambda recipe: recipe["data"].update(root="/elsewhere"),
    "batch of evaluations": lambda recipe: recipe["data"].update(eval_batch_size=7),
    "threads that read": lambda recipe: recipe["data"].update(workers=5),
    "executor": lambda recipe: recipe["compute"].update(executor="local"),
    "fuse": lambda recipe: recipe["compute"].update(fuse=False),
    "jobs at the same time": lambda recipe: recipe["compute"].update(concurrency=1),
    "retries": lambda recipe: recipe["compute"].update(max_failures=9),
    "placement": lambda recipe: recipe["compute"].update(placement="spread", gpus_per_worker=0.5),
    "time between checkpoints": lambda recipe: recipe["compute"].update(checkpoint_seconds=1.0),
    "steps between checkpoints": lambda recipe: recipe["compute"].update(checkpoint_steps=7),
    "patience with workers": lambda recipe: recipe["compute"].update(watchdog_seconds=9.0),
    "device": lambda recipe: recipe["compute"].update(device="cpu"),
    "MLflow": lambda recipe: recipe.update(tracking={"uri": "http://127.0.0.1:1"}),
    "roles": lambda recipe: recipe.update(student="scratch", baselines=[]),
    "a default written out": lambda recipe: recipe["stages"]["blocks"].update(width=0.5),
}


@pytest.mark.parametrize("what", IN_THE_KEY)
def test_in_the_key(what: str, tmp_path: Path) -> None:
    change, expected = IN_THE_KEY[what]
    assert changed(change, tmp_path) == expected


@pytest.mark.parametrize("what", NOT_IN_THE_KEY)
def test_not_in_the_key(what: str, tmp_path: Path) -> None:
    assert changed(NOT_IN_THE_KEY[what], tmp_path) == set()


def test_names_of_stages_are_not_in_the_key(tmp_path: Path) -> None:
    recipe = content()
    before = keys(recipe, tmp_path)
    rename_stages(recipe)
    assert list(keys(recipe, tmp_path).values()) == list(before.values())


def test_the_place_of_a_stage_in_the_recipe_is_not_in_the_key(tmp_path: Path) -> None:
    recipe = content()
    before = keys(recipe, tmp_path)
    recipe["stages"]["blocks"]["from"] = "teacher"
    recipe["stages"]["distilled"]["from"] = "blocks"
    recipe["stages"] = dict(reversed(recipe["stages"].items()))
    assert keys(recipe, tmp_path) == before


@pytest.mark.parametrize("version", ["KEY_VERSION", "ENGINE_VERSION", "READER_VERSION"])
def test_versions_are_in_the_key(version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = keys(content(), tmp_path)
    monkeypatch.setattr(graph_module, version, 10**6)
    assert not set(keys(content(), tmp_path).values()) & set(before.values())


def test_the_version_of_a_kind_is_in_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = keys(content(), tmp_path)
    monkeypatch.setattr(Train, "VERSION", 10**6)
    after = keys(content(), tmp_path)
    assert after["teacher"] != before["teacher"]


def test_the_data_are_in_the_key_by_content_and_not_by_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = keys(content(), tmp_path)
    other = Identity("0" * 64, tuple("0123456789"), "")
    monkeypatch.setattr(loader, "data_identity", lambda settings, cache: other)
    assert not set(keys(content(), tmp_path).values()) & set(before.values())


def test_given_weights_are_in_the_key_by_content_and_not_by_path(tmp_path: Path) -> None:
    first, moved, other = (tmp_path / f"{name}.safetensors" for name in ("first", "moved", "other"))
    save_file({"a": torch.zeros(1)}, first)
    save_file({"a": torch.ones(1)}, other)
    shutil.copy(first, moved)

    def teacher(weights: Path) -> str:
        recipe = content()
        recipe["stages"]["teacher"] = {
            "kind": "load",
            "network": {"arch": "resnet20"},
            "weights": str(weights),
        }
        return keys(recipe, tmp_path)["teacher"]

    assert teacher(first) == teacher(moved) != teacher(other)
    first.unlink()
    with pytest.raises(AssertionError):  # without the file there is no key
        teacher(first)


def test_equal_stages_of_two_recipes_have_one_key_whatever_follows_them(tmp_path: Path) -> None:
    recipe = content()
    before = keys(recipe, tmp_path)
    del recipe["stages"]["scratch"]
    recipe.update(baselines=[], name="shorter")
    after = keys(recipe, tmp_path)
    assert after == {name: before[name] for name in after}


def test_a_key_needs_the_data(tmp_path: Path) -> None:
    recipe = content()
    recipe["data"] = {"name": "cifar10", "root": str(tmp_path)}
    graph = build_graph(Recipe.model_validate(recipe), None, tmp_path)
    assert {node.key for node in graph.nodes.values()} == {None}
    assert all("data.download=true" in str(node.reason) for node in graph.nodes.values())
    with pytest.raises(UserError, match=r"data\.download=true"):
        graph_module.require_keys(graph)
