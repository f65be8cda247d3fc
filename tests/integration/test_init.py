"""`pbkd init` writes a recipe that can be planned, and finds out before what could not work."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pbkd.torchvision_compat import import_torchvision
from pipelines.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two classes of noise, and weights of a ResNet-18 for them."""
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / part / name).mkdir(parents=True)
            pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pets" / part / name / "0.png")
    network = import_torchvision().models.resnet18(num_classes=2)
    torch.save(network.state_dict(), tmp_path / "mine.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PBKD_ALLOW_IMPORT", "0")
    return tmp_path


def test_a_recipe_for_ones_own_network_and_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["init", "torchvision/resnet18", "--data", "pets", "--weights", "mine.pt", "--image-size", "32"]
    assert main(command) == 0
    path = folder / "resnet18_pets.yaml"
    recipe = yaml.safe_load(path.read_text())
    assert recipe["data"] == {
        "name": "folder",
        "root": "pets",
        "image_size": 32,
        "resize": "short_side",
        "resize_size": 37,
        "interpolation": "bilinear",
        "crop": "center",
        "orientation": "stored",
        "augment": "resized_crop_flip",
        "batch_size": 64,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    assert recipe["stages"]["teacher"]["weights"] == "mine.pt"
    epochs = {name: stage["epochs"] for name, stage in recipe["stages"].items() if "epochs" in stage}
    trained = 4 * epochs["blocks"] + sum(epochs[name] for name in epochs if name not in ("blocks", "scratch"))
    assert epochs["scratch"] == trained, "the baseline has the same budget"
    capsys.readouterr()
    assert main(["plan", "resnet18_pets.yaml"]) == 0
    assert "recovered" in capsys.readouterr().out
    before = path.read_text()
    assert main(command) == 2 and "is there already" in capsys.readouterr().err
    assert path.read_text() == before


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_without_weights_the_teacher_is_trained(
    data: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "resnet20", "--data", data, "--out", "r.yaml"]) == 0
    assert yaml.safe_load((folder / "r.yaml").read_text())["stages"]["teacher"]["kind"] == "train"
    assert main(["plan", "r.yaml"]) == 0


MISTAKES = {
    ("torchvision/resnet18", "--data", "petz"): "--data petz: no such folder",
    ("torchvision/resnet18", "--data", "."): "/train: No such file or directory",
    ("torchvision/resnet19", "--data", "pets"): "did you mean 'torchvision/resnet18'?",
    (
        "torchvision/resnet34",
        "--data",
        "pets",
        "--weights",
        "mine.pt",
    ): "tensors missing: 'layer1.2.conv1.weight', 'layer1.2.bn1.weight'",
    ("torchvision/resnet18", "--data", "pets", "--weights", "none.pt"): "--weights none.pt: no such file",
    ("torchvision/resnet18", "--data", "pets", "--weights", "mine.pt::ema"): "mine.pt: has no weights 'ema'",
    ("torchvision/resnet18", "--data", "digits"): "'conv1' takes 3 channels, but gets 1",
    (
        "torchvision/resnet18",
        "--data",
        "pets",
        "--weights",
        "mine.pt",
        "--pretrained",
    ): "leave one of them out",
    ("torchvision/resnet18", "--data", "digits", "--image-size", "32"): "digits has 8; leave it out",
    ("my_net:small", "--data", "pets"): "add --allow-import",
}


def test_what_could_not_work_is_said_before_a_recipe_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for typed, words in MISTAKES.items():
        code = main(["init", *typed])
        out, err = capsys.readouterr()
        assert code == 2 and out == "" and words in err and len(err.splitlines()) <= 3, (typed, err)
    assert list(folder.glob("*.yaml")) == []
