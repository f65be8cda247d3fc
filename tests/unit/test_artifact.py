"""Artifacts: what is loaded computes what was saved, anywhere, or is refused."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pbkd import artifact
from pbkd.errors import StageError, UserError
from pbkd.networks import BlockNetwork, fresh
from pbkd.stages import Prune
from tests.unit.small_networks import random_norms, small_bottleneck, small_resnet, small_vgg

ROOT = Path(__file__).parents[2]


def network_of(kind: str) -> BlockNetwork:
    spec = {"vgg": small_vgg(norm=False), "a": small_resnet(shortcut="A"), "bottleneck": small_bottleneck()}[
        kind
    ]
    return random_norms(fresh(spec, 1)).eval()


@pytest.mark.parametrize("kind", ["vgg", "a", "bottleneck"])
def test_round_trip(kind: str, tmp_path: Path) -> None:
    network = network_of(kind)
    saved = artifact.save(network, tmp_path / "new" / "folder")
    found = artifact.load(saved.path)
    x = torch.randn(2, *network.spec.input_shape)
    assert torch.equal(found(x), network(x))
    assert found.spec == network.spec
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert artifact.read(saved.path) == saved
    again = artifact.save(found.to(memory_format=torch.channels_last), tmp_path / "again")
    assert (again.digest, again.weights_digest) == (saved.digest, saved.weights_digest)
    assert {path.name for path in saved.path.iterdir()} == {"spec.json", "weights.safetensors"}


@pytest.mark.slow
def test_a_pruned_network_gives_equal_logits_in_a_fresh_process(tmp_path: Path) -> None:
    network = Prune(ratio=0.5, round_to=2)._pruned(network_of("bottleneck"))
    saved = artifact.save(network, tmp_path / "pruned")
    x = torch.randn(2, *network.spec.input_shape)
    save_file({"x": x}, tmp_path / "x.safetensors")
    program = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from pbkd import artifact
torch.set_num_threads(1)
folder = Path(sys.argv[1])
network = artifact.load(folder / "pruned")
save_file({"logits": network(load_file(folder / "x.safetensors")["x"])}, folder / "logits.safetensors")
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], network(x))
    assert saved.spec.blocks != network_of("bottleneck").spec.blocks


def test_a_network_that_diverged_is_not_saved(tmp_path: Path) -> None:
    network = network_of("vgg")
    network.state_dict()["classifier.fc1.bias"].fill_(float("inf"))
    with pytest.raises(StageError, match="logits are not finite: its training diverged"):
        artifact.save(network, tmp_path / "diverged")
    assert not (tmp_path / "diverged").exists()


def test_a_network_that_diverged_and_was_saved_nevertheless_is_not_loaded(tmp_path: Path) -> None:
    """As versions before did."""
    saved = artifact.save(network_of("vgg"), tmp_path)
    path = saved.path / "spec.json"
    described = json.loads(path.read_text())
    described["probe"][0] = float("nan")
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match="logits are not finite: its training diverged; train it again"):
        artifact.load(tmp_path)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    saved = artifact.save(network_of("vgg"), tmp_path)
    file = saved.path / "weights.safetensors"
    tensors = load_file(file)
    tensors["classifier.fc1.bias"] += 1e-6
    save_file(tensors, file)
    with pytest.raises(UserError, match="weights do not match their digest"):
        artifact.load(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        artifact.load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="no such weights file"):
        artifact.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("network", {"arch": "x"}), ("digest", "0" * 64), ("weights_digest", None), ("dropout", 0.9)],
)
def test_an_edited_spec_is_refused(tmp_path: Path, key: str, value: object) -> None:
    artifact.save(network_of("vgg"), tmp_path)
    file = tmp_path / "spec.json"
    description = json.loads(file.read_text())
    if key == "dropout":
        description["network"]["classifier"]["dropout"] = (
            value  # changes no logits, only what training would do
        )
    else:
        description[key] = value
    file.write_text(json.dumps(description))
    with pytest.raises(
        UserError, match=r"spec.json: not a pbkd architecture spec; the file was edited or damaged"
    ):
        artifact.load(tmp_path)


def test_a_network_that_computes_something_else_is_refused(tmp_path: Path) -> None:
    artifact.save(network_of("vgg"), tmp_path)
    file = tmp_path / "spec.json"
    description = json.loads(file.read_text())
    description["probe"][0] += 1.0
    file.write_text(json.dumps(description))
    with pytest.raises(UserError, match="does not compute what it did"):
        artifact.load(tmp_path)


def test_nothing_is_ever_unpickled(tmp_path: Path) -> None:
    artifact.save(network_of("vgg"), tmp_path)

    class Trap:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return (Path.touch, (tmp_path / "sprung",))

    (tmp_path / "weights.safetensors").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        artifact.load(tmp_path)
    torch.save({"w": Trap()}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        artifact.load(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_no_artifact_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no artifact here"):
        artifact.read(tmp_path)
    (tmp_path / "spec.json").write_text("[1, 2")
    with pytest.raises(UserError, match="not a pbkd architecture spec"):
        artifact.read(tmp_path)
