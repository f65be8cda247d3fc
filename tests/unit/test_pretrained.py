"""A library's own weights: as it would load them itself, and a clear message where there is no network."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pbkd.data import Data, DataSettings
from pbkd.data.datasets import Arrays, divided
from pbkd.engine import LocalSession, Precision
from pbkd.errors import UserError
from pbkd.networks.builders import pretrained_tensors
from pbkd.stages import Context, Load
from pbkd.torchvision_compat import import_torchvision

pytestmark = pytest.mark.slow

SIZE = 64


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch looks for weights before it downloads them; nothing can be downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def published(name: str, cache: Path) -> Path:
    """A file as torchvision publishes it, of random weights, where it looks for it."""
    import_torchvision()
    from torchvision import models

    torch.manual_seed(1)
    arguments = {} if name.startswith("densenet") else {"init_weights": False}
    tensors = models.get_model(name, weights=None, **arguments).state_dict()
    tensors = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", key): tensors[key] for key in tensors}
    if name.startswith("densenet"):  # older than these
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("num_batches_tracked")}
    file = cache / Path(models.get_model_weights(name)["DEFAULT"].url).name
    torch.save(tensors, file)
    return file


@pytest.mark.parametrize("name", ["densenet121", "googlenet"])
def test_a_teacher_computes_what_the_library_makes_of_its_weights(
    name: str, cache: Path, tmp_path: Path
) -> None:
    file = published(name, cache)
    from torchvision import models

    original = models.get_model(name, weights="DEFAULT").eval()
    info = replace(DataSettings(name="digits").describe(), input_shape=(3, SIZE, SIZE), num_classes=1000)
    images = np.random.default_rng(0).integers(0, 256, (20, 3, SIZE, SIZE), dtype=np.uint8)
    some, digits = Arrays(images, np.arange(20) % 10), DataSettings(name="digits")
    data = Data(digits, divided(digits, {"train": some, "test": some}), "0123456789")
    data.info = info
    context = Context(LocalSession(tmp_path, torch.device("cpu"), 0, 1, 60.0), {}, data, 0, Precision())
    given: dict[str, object] = {"kind": "load", "network": {"arch": f"torchvision/{name}"}}
    own = {"arguments": {"transform_input": True, "init_weights": False}} if name == "googlenet" else {}
    stages = [
        Load.model_validate(given | {"pretrained": True}),
        Load.model_validate(given | {"network": {"arch": f"torchvision/{name}", **own}, "weights": file}),
    ]
    noise = torch.randn(2, 3, SIZE, SIZE)
    for stage in stages:
        network = stage.run(context)
        assert network.spec == stage.plan({}, info)
        with torch.inference_mode():
            torch.testing.assert_close(network(noise), original(noise))
    assert stages[0].semantic()["network"] == stages[1].semantic()["network"]


@pytest.mark.parametrize("arch", ["torchvision/resnet18"])
def test_weights_that_cannot_be_had_are_said_with_what_to_give_instead(arch: str, cache: Path) -> None:
    with pytest.raises(
        UserError, match=r"cannot be had \(.*give a\s+file: weights: FILE.safetensors"
    ) as error:
        pretrained_tensors(arch)
    assert len(str(error.value).splitlines()) <= 3
    assert not list(cache.iterdir())
