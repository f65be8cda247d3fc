"""Weights from files as people save them: the network's own are found, or the message says what to do."""

import argparse
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from pbkd.data import Data, DataSettings
from pbkd.data.beton import open_checked
from pbkd.engine import LocalSession, Precision
from pbkd.errors import UserError
from pbkd.networks import (
    AnySpec,
    BlockNetwork,
    ForeignSettings,
    NetworkSettings,
    architecture,
    fresh,
    load_weights,
    weights_digest,
)
from pbkd.networks.weights import empty
from pbkd.stages import Context, Load
from pbkd.weight_files import read_tensors, split_part
from pipelines.recipe_file import load_recipe
from tests.unit.small_networks import random_norms, small_resnet

State = dict[str, Tensor]

MODULE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(8, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.classify = nn.Linear(16, classes)

    def forward(self, x):
        return self.classify(self.late(self.early(x)).mean((2, 3)))

class Wrapped(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.module = Net(classes)

    def forward(self, x):
        return self.module(x * 2 - 1)

def net(num_classes):
    return Net(num_classes)

def wrapped(num_classes):
    return Wrapped(num_classes)
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], BlockNetwork]:
    """Networks of the user's by the name of their function, with random weights."""
    (tmp_path / "weight_files_net.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PBKD_ALLOW_IMPORT", "1")

    def network(name: str, classes: int = 10) -> BlockNetwork:
        return fresh(
            architecture(ForeignSettings(arch=f"weight_files_net:{name}"), (1, 8, 8), classes), seed=1
        )

    return network


@pytest.fixture(scope="module")
def spec() -> AnySpec:
    return small_resnet()


@pytest.fixture(scope="module")
def state(spec: AnySpec) -> State:
    return random_norms(fresh(spec, 1)).state_dict()


def original(network: BlockNetwork) -> State:
    """The state_dict of a foreign network, under its own names."""
    depth = {"stem": 1, "blocks": 2, "classifier": 2}
    return {
        name.split(".", depth[name.partition(".")[0]])[-1]: tensor
        for name, tensor in network.state_dict().items()
    }


def behind(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def others(state: State) -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def loaded(spec: AnySpec, path: Path) -> str:
    """The digest of the network with the weights of a file."""
    network = empty(spec)
    load_weights(network, read_tensors(path, network), str(path))
    return weights_digest(network.state_dict())


def refused(spec: AnySpec, path: Path) -> str:
    with pytest.raises(UserError) as said:
        loaded(spec, path)
    assert str(path).partition("::")[0] in str(said.value) and len(str(said.value).splitlines()) <= 3
    return str(said.value)


OPTIMIZER = {"state": {0: {"momentum": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
NAMED_OPTIMIZER = {"state": {"fc.weight": {"step": torch.ones(()), "exp_avg": torch.ones(3)}}}

SAVED: dict[str, Callable[[State], Any]] = {
    "plain.pth": lambda state: state,
    "plain.PTH": lambda state: state,
    "plain.th": lambda state: state,
    "no_suffix": lambda state: state,
    "misnamed.safetensors": lambda state: state,
    **{
        f"{key}.pt": lambda state, key=key: {key: state, "epoch": 3, "optimizer": OPTIMIZER}
        for key in (
            "state_dict",
            "model",
            "net",
            "model_state_dict",
            "model_ema",
            "state_dict_ema",
            "ema",
            "module",
            "network",
            "weights",
            "params",
        )
    },
    "nested.pt": lambda state: {"ema": {"params": {"model": state}}, "loss": torch.ones(())},
    "named_optimizer.pt": lambda state: {"model": state, "optim": NAMED_OPTIMIZER},
    "criterion.pt": lambda state: {"model": state, "criterion": {"weight": torch.ones(10)}},
    "teacher.pt": lambda state: {"student": state, "teacher": {"a.weight": torch.ones(3)}},
    "ddp.pt": lambda state: behind("module.", state),
    "ddp_in_ddp.pt": lambda state: behind("module.module.", state),
    "compiled.pt": lambda state: behind("_orig_mod.", state),
    "ddp_compiled.pt": lambda state: {"model": behind("module._orig_mod.", state)},
    "lightning.ckpt": lambda state: {"state_dict": behind("model.", state), "loops": {}, "callbacks": {}},
    "lightning_compiled.ckpt": lambda state: {"state_dict": behind("model._orig_mod.", state)},
    "block_compiled.pt": lambda state: {
        name.replace("stem.", "stem._orig_mod."): value for name, value in state.items()
    },
    "averaged.pt": lambda state: {"n_averaged": torch.tensor(3), **behind("module.", state)},
    "averaged_ddp.pt": lambda state: {"n_averaged": torch.tensor(3), **behind("module.module.", state)},
    "namespace.pt": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1, out=Path("runs"))},
    "numpy.pt": lambda state: {"model": state, "best": np.float64(93.0), "epoch": np.int64(3)},
    "history.pt": lambda state: {"model": state, "losses": np.ones(3), "found": [np.bool_(True)]},
    "parameters.pt": lambda state: {
        name: nn.Parameter(value) if value.is_floating_point() else value for name, value in state.items()
    },
}


@pytest.mark.parametrize("name", SAVED)
def test_weights_load_as_people_save_them(name: str, spec: AnySpec, state: State, tmp_path: Path) -> None:
    torch.save(SAVED[name](state), tmp_path / name)
    assert loaded(spec, tmp_path / name) == weights_digest(state)


def test_the_kind_of_a_file_is_found_by_its_content(spec: AnySpec, state: State, tmp_path: Path) -> None:
    save_file(behind("module.", state), tmp_path / "weights.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("weights.pth", "old.pth"):
        assert loaded(spec, tmp_path / name) == weights_digest(state)


def test_what_torch_averages_loads(spec: AnySpec, tmp_path: Path) -> None:
    network = fresh(spec, 1)
    torch.save({"model": AveragedModel(network).state_dict()}, tmp_path / "averaged.pt")
    assert loaded(spec, tmp_path / "averaged.pt") == weights_digest(network.state_dict())


def test_half_precision_is_cast(spec: AnySpec, state: State, tmp_path: Path) -> None:
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    torch.save(half, tmp_path / "half.pt")
    wide = {name: value.to(state[name].dtype) for name, value in half.items()}
    assert loaded(spec, tmp_path / "half.pt") == weights_digest(wide)


def test_the_networks_own_names_win_over_wrappers(
    foreign: Callable[[str], BlockNetwork], tmp_path: Path
) -> None:
    for name, prefixes in {"net": ("", "module."), "wrapped": ("", "module.", "model._orig_mod.")}.items():
        network = foreign(name)
        for prefix in prefixes:
            torch.save(behind(prefix, original(network)), tmp_path / "w.pt")
            assert loaded(network.spec, tmp_path / "w.pt") == weights_digest(network.state_dict())


@pytest.mark.parametrize(
    "keys", [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("net", "ema.module")]
)
def test_a_choice_is_the_users(keys: tuple[str, str], spec: AnySpec, state: State, tmp_path: Path) -> None:
    path = tmp_path / "both.pth.tar"
    outer, _, inner = keys[1].partition(".")
    averaged = {"n_averaged": torch.tensor(5), **behind("module.", state)}
    torch.save({keys[0]: others(state), outer: {inner: averaged} if inner else averaged, "epoch": 3}, path)
    said = refused(spec, path)
    assert f"holds 2 sets of weights: '{keys[0]}', '{keys[1]}'" in said
    assert f"weights: {path}::{keys[1]}" in said
    with pytest.raises(UserError, match="holds 2 sets of weights"):
        read_tensors(path)
    assert loaded(spec, Path(f"{path}::{keys[1]}")) == weights_digest(state)
    assert loaded(spec, Path(f"{path}::{outer}")) == weights_digest(state)
    assert loaded(spec, Path(f"{path}::{keys[0]}")) == weights_digest(others(state))
    said = refused(spec, Path(f"{path}::modle"))
    assert f"{path}: has no weights 'modle'; its weights are in '{keys[0]}', '{keys[1]}'" in said


def test_the_beginning_of_names_chooses_too(spec: AnySpec, state: State, tmp_path: Path) -> None:
    path = tmp_path / "lightning.ckpt"
    torch.save({"state_dict": behind("model.", others(state)) | behind("ema.", state)}, path)
    assert "left over" in refused(spec, path)
    assert loaded(spec, Path(f"{path}::state_dict.ema")) == weights_digest(state)
    save_file(behind("model.", others(state)) | behind("ema.", state), tmp_path / "flat.safetensors")
    assert loaded(spec, Path(f"{tmp_path}/flat.safetensors::ema")) == weights_digest(state)
    torch.save(state, path)
    assert "has no weights 'ema'; it holds weights directly" in refused(spec, Path(f"{path}::ema"))


def test_weights_beside_a_mapping_of_weights_are_a_choice(
    spec: AnySpec, state: State, tmp_path: Path
) -> None:
    path = tmp_path / "flat.pt"
    torch.save(state | {"ema": others(state)}, path)
    assert "holds 2 sets of weights: '', 'ema'" in refused(spec, path)
    assert loaded(spec, Path(f"{path}::")) == weights_digest(state)


def test_a_file_whose_name_has_colons_is_itself(state: State, tmp_path: Path) -> None:
    path = tmp_path / "a::b.pt"
    torch.save({"model": state, "ema": others(state)}, path)
    assert split_part(path) == (path, None)
    assert split_part(Path(f"{path}::ema")) == (path, "ema")
    assert split_part(Path(f"{path}::x::y")) == (path, "x::y")
    assert split_part(tmp_path / "none.pt::ema") == (tmp_path / "none.pt::ema", None)
    torch.save(state, tmp_path / "a")
    assert split_part(path) == (path, None)


def test_a_stage_takes_a_part_by_any_path_and_its_key_holds_the_part(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"model": state, "ema": others(state)}, tmp_path / "w.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def identity(weights: str) -> object:
        stage = Load(network=NetworkSettings(arch="resnet20"), weights=weights)  # type: ignore[arg-type]
        return stage.semantic()["weights"]

    whole = identity("w.pt")
    assert isinstance(whole, str) and len(whole) == len(weights_digest(state))
    parts = {identity(f"{path}::ema") for path in ("w.pt", "~/w.pt", str(tmp_path / "w.pt"))}
    assert len(parts | {whole, identity("w.pt::model")}) == 3
    with pytest.raises(UserError, match=r"none\.pt::ema cannot be read"):
        identity("none.pt::ema")


def test_a_stage_loads_the_part_it_names_or_the_only_one_that_fits(tmp_path: Path) -> None:
    settings = DataSettings(name="digits")
    data = Data(settings, {}, "0123456789")
    context = Context(LocalSession(tmp_path, torch.device("cpu"), 0, 1, 60.0), {}, data, 0, Precision())
    network = NetworkSettings(arch="resnet20")
    state = fresh(architecture(network, (1, 8, 8), 10), 1).state_dict()
    path = tmp_path / "w.ckpt"

    def digest(weights: str) -> str:
        stage = Load.model_validate({"network": network, "weights": weights})
        return weights_digest(stage.run(context).state_dict())

    torch.save({"model": state, "ema": others(state), "teacher": {"a.weight": torch.ones(1)}}, path)
    assert digest(f"{path}::model") == weights_digest(state)
    assert digest(f"{path}::ema") == weights_digest(others(state))
    with pytest.raises(UserError, match="holds 2 sets of weights: 'model', 'ema'"):
        digest(str(path))
    torch.save({"teacher": {"a.weight": torch.ones(1)}, "ema": state}, path)
    assert digest(str(path)) == weights_digest(state)


def test_objects_are_never_unpickled_and_the_message_has_the_cure(
    spec: AnySpec, state: State, tmp_path: Path
) -> None:
    path, sprung = tmp_path / "w.pt", tmp_path / "sprung"

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (sprung,))

    cure = "torch.save(model.state_dict(), FILE)"
    torch.save(nn.Sequential(nn.Linear(2, 2)), path)
    said = refused(spec, path)
    assert "torch.nn.modules.container.Sequential" in said and cure in said
    for content in ({"model": state, "trap": Trap()}, Trap()):
        torch.save(content, path)
        assert cure in refused(spec, path)
        for protocol in (2, 4):
            path.write_bytes(pickle.dumps(content, protocol))
            said = refused(spec, path)
            assert cure in said and "weights_only" not in said
    assert not sprung.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3, "args": argparse.Namespace()}, "holds no weights by name, but 'epoch', 'args'"),
        ([torch.ones(2)], "an object of type list"),
        (torch.ones(2), "an object of type Tensor"),
        ({}, "an object of type dict"),
        (argparse.Namespace(), "holds no weights"),
    ],
)
def test_a_file_without_weights_is_refused(
    content: object, words: str, spec: AnySpec, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "w.pt")
    said = refused(spec, tmp_path / "w.pt")
    assert words in said and "torch.save(model.state_dict(), FILE)" in said


def test_a_damaged_file_is_refused(spec: AnySpec, state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for zipped in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for length in (12, len(whole) // 2, len(whole) - 9):
            path.write_bytes(whole[:length])
            assert "damaged" in refused(spec, path)
    path.write_bytes(b"<html>")
    assert "cannot be read as safetensors, nor as what torch.save writes" in refused(spec, path)
    path.write_bytes(b"")
    assert "damaged or another format" in refused(spec, path)


def test_a_mismatch_is_told_in_the_names_of_file_and_network(
    foreign: Callable[[str], BlockNetwork], tmp_path: Path
) -> None:
    network, path = foreign("net"), tmp_path / "w.pt"
    state = behind("module.", original(network))
    moved = {name.replace("classify", "fc"): tensor for name, tensor in state.items()}
    torch.save(moved, path)
    said = refused(network.spec, path)
    assert f"{path}: does not hold the weights of weight_files_net:net\n" in said
    assert "2 of 12 tensors missing: 'classify.weight', 'classify.bias'; " in said
    assert "2 left over: 'module.fc.weight', 'module.fc.bias'\n" in said
    torch.save(behind("module.", {"a.b": torch.ones(1), "c.d": torch.ones(1)}), path)
    said = refused(network.spec, path)
    assert "12 of 12 tensors missing: 'early.0.weight', 'early.1.weight', 'early.1.bias', ...; " in said
    assert "2 left over: 'module.a.b', 'module.c.d'" in said and "blocks." not in said
    torch.save(state, path)
    said = refused(architecture(ForeignSettings(arch="weight_files_net:net"), (1, 8, 8), 7), path)
    assert "'module.classify.weight' has shape (10, 16), but weight_files_net:net needs (7, 16)" in said
    assert "check the recipe's network and the data's classes, which are 7" in said


@pytest.mark.parametrize(
    ("ending", "value", "words"),
    [
        ("conv.weight", float("nan"), "holds NaN"),
        ("conv.weight", float("-inf"), "holds infinite values"),
        ("conv.weight", 1j, "is complex"),
        ("running_mean", float("nan"), "holds NaN"),
        ("running_var", float("inf"), "holds infinite values"),
        ("running_var", -0.5, "holds negative variances"),
    ],
)
def test_damaged_values_are_refused_by_name(
    ending: str, value: complex, words: str, spec: AnySpec, state: State, tmp_path: Path
) -> None:
    name = next(name for name in state if name.endswith(ending))
    tensor = state[name].to(torch.complex64) if isinstance(value, complex) else state[name].clone()
    tensor.view(-1)[-1] = value
    torch.save({"model": behind("module.", state | {name: tensor})}, tmp_path / "w.pt")
    assert f"w.pt: tensor 'module.{name}' {words}" in refused(spec, tmp_path / "w.pt")


def test_a_sparse_tensor_is_refused(spec: AnySpec, state: State, tmp_path: Path) -> None:
    torch.save(state | {"classifier.fc1.weight": state["classifier.fc1.weight"].to_sparse()}, tmp_path / "w")
    assert "tensor 'classifier.fc1.weight' is torch.sparse_coo" in refused(spec, tmp_path / "w")


def test_what_becomes_infinite_when_it_is_cast_is_refused(
    spec: AnySpec, state: State, tmp_path: Path
) -> None:
    name = next(iter(state))
    torch.save(state | {name: torch.full_like(state[name], 1e300, dtype=torch.float64)}, tmp_path / "w.pt")
    assert "holds infinite values" in refused(spec, tmp_path / "w.pt")


def test_a_missing_file_is_refused(spec: AnySpec, tmp_path: Path) -> None:
    assert "no such weights file" in refused(spec, tmp_path / "none.pt")
    with pytest.raises(UserError, match=r"none\.pt::ema: no such weights file"):
        read_tensors(tmp_path / "none.pt::ema")


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a folder"])
def test_what_is_no_file_is_named_and_not_waited_for(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    network = fresh(architecture(NetworkSettings(arch="resnet20"), (1, 8, 8), 10), 1)
    readers: list[Callable[[], object]] = [
        lambda: read_tensors(path, network),
        lambda: Load.model_validate({"network": {"arch": "resnet20"}, "weights": path}).semantic(),
        lambda: load_recipe(path),
        lambda: open_checked(path.rename(tmp_path / "train.beton.json").with_suffix(""), None),
    ]
    for read in readers:
        with pytest.raises(UserError, match=f"is {kind}, not a file") as caught:
            read()
        assert len(str(caught.value).splitlines()) <= 3
