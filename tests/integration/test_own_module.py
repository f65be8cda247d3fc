"""A network of the user's own, in a file outside the package: looked at, compressed, traced back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pbkd.artifact import read_tensors
from pbkd.errors import UserError
from pbkd.networks import architecture, load_weights, settings_of
from pbkd.networks.weights import empty
from pbkd.torchvision_compat import import_torchvision
from tests.integration.pbkd_process import ROOT, SECONDS, Pbkd

MODULE = """
import torch
from torch import nn

class Unit(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.second(torch.relu(self.first(x))))

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.enter = nn.Conv2d(1, 8, 3, padding=1)
        self.early = nn.Sequential(Unit(8), Unit(8))
        self.widen = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.late = nn.Sequential(Unit(16), Unit(16))
        self.classify = nn.Linear(16, classes)

    def forward(self, x):
        x = self.late(torch.relu(self.widen(self.early(self.enter(x)))))
        return self.classify(x.mean((2, 3)))

class Fixed(Net):
    def forward(self, x):
        x = self.enter(x)
        for unit in self.early:
            inner = torch.relu(unit.first(x)).reshape(-1, 8, x.shape[2], x.shape[3])
            x = torch.relu(x + unit.second(inner))
        return self.classify(self.late(torch.relu(self.widen(x))).mean((2, 3)))

class Branching(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)

class Two(Net):
    def forward(self, x, y):
        return super().forward(x + y)

class Pair(Net):
    def forward(self, x):
        logits = super().forward(x)
        return logits, logits

class Shared(Net):
    def forward(self, x):
        x = self.late(torch.relu(self.widen(self.early(self.enter(x)))))
        x = self.late(nn.functional.max_pool2d(x, 2))
        return self.classify(x.mean((2, 3)))

class Unfinished(Net):
    def forward(self, x):
        return super().forward(x).softmax(1)

def small(num_classes):
    return Net(num_classes)

def fixed(num_classes):
    return Fixed(num_classes)

def branching(num_classes):
    return Branching(num_classes)

def two(num_classes):
    return Two(num_classes)

def pair(num_classes):
    return Pair(num_classes)

def unfinished(num_classes):
    return Unfinished(num_classes)

def shared(num_classes):
    return Shared(num_classes)

def seven():
    return Net(7)

def nothing(num_classes):
    return None

def forgetful(num_classes):
    widths = {"early": 8}
    return Net(widths["late"])

def mismatched(num_classes):
    nn.Linear(3, 4)(torch.ones(2, 5))
    return Net(num_classes)
"""
BROKEN = {
    "unclosed": "def small(num_classes:\n    return None\n",
    "needy": "import torch\nimport nowhere_to_be_found\n",
    "raising": "\n\nraise RuntimeError('not today')\n",
}

RECIPE = """
name: own
data: {name: digits, batch_size: 50, limit: 200}
compute: {executor: local, threads: 1}
teacher: teacher
student: recovered
stages:
  teacher: {kind: train, network: {arch: "own_net:small"}, steps: 20, optimizer: {lr: 0.05}}
  blocks: {kind: progressive, width: 0.5, init_images: 64, steps: 2, optimizer: {lr: 0.01}}
  stabilized: {kind: stabilize, steps: 2}
  distilled: {kind: distill, steps: 2}
  pruned: {kind: prune, ratio: 0.3, round_to: 1, init: least_squares, init_images: 64, recalibrate_images: 0}
  recovered: {kind: distill, steps: 2, feature_weight: 1.0}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own_net.py").write_text(MODULE)
    for name, text in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "own.yaml").write_text(RECIPE)
    return tmp_path


def typed(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `pbkd ARGUMENTS`, typed in `folder`."""
    command = Pbkd(*arguments, folder=folder)
    try:
        return command.wait(2 * SECONDS)
    finally:
        command.end()


def test_a_module_of_ones_own_goes_through_inspect_run_and_lineage(folder: Path) -> None:
    code, _, said = typed(folder, "run", "own.yaml", "--json")
    assert code == 2 and "add --allow-import" in said
    assert not (folder / "runs").exists()

    size = ("--channels", "1", "--input-size", "8", "--classes", "10")
    _, looked, _ = typed(folder, "inspect", "own_net:small", *size, "--allow-import", "--json")
    shown = json.loads(looked)
    assert shown["exact"] and shown["arch"] == "own_net:small"
    assert [block["output_shape"] for block in shown["blocks"]] == [[8, 8, 8], [16, 4, 4]]

    code, out, said = typed(folder, "run", "own.yaml", "--json", "--allow-import")
    assert code == 0, said
    report = json.loads(out)
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert stages["distilled"]["macs_ratio"] > 1.2
    assert stages["pruned"]["macs"] < stages["distilled"]["macs"]
    assert all(stage["latency_ms"] for stage in stages.values())

    again = json.loads(typed(folder, "run", "own.yaml", "--json", "--allow-import")[1])
    assert {stage["state"] for stage in again["stages"]} == {"reused"}

    chain = json.loads(typed(folder, "lineage", stages["recovered"]["artifact"], "--json")[1])["chain"]
    names = [row["stage"] for row in chain]
    assert names[0] == "recovered" and names[-1] == "teacher" and "blocks.2" in names

    # An artifact alone never has code imported.
    program = (
        "import sys; from pathlib import Path; from pbkd import artifact; artifact.load(Path(sys.argv[1]))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program, stages["recovered"]["artifact"]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{folder}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert loaded.returncode == 1 and "imported only if you say so" in loaded.stderr


MISTAKES = {
    "own_net:branching": "Branching.forward cannot be traced",
    "own_net:two": "Two.forward takes 2 inputs (x, y)",
    "own_net:pair": "gives a tuple of 2 (from 'classify'), expected the logits",
    "own_net:shared": "run in more than one block",
    "own_net:unfinished": "ends in softmax, 'softmax', expected logits (N, 10)",
    "own_net:seven": "gives logits (N, 7), but the data have 10 classes",
    "own_net:nothing": "gives a NoneType, expected a torch.nn.Module",
    "own_net:smal": "its module has no function 'smal'",
    "own_net:forgetful": "own_net.py, line LINE: KeyError: 'late'",
    "own_net:mismatched": "own_net.py, line LINE: RuntimeError: ",
    "own_nett:small": "own_nett cannot be imported: ModuleNotFoundError",
    "unclosed:small": "unclosed.py, line 1: SyntaxError: '(' was never closed",
    "needy:small": "needy.py, line 2: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    "raising:small": "raising.py, line 3: RuntimeError: not today",
    "own_net:fixed": "the forward works with no other number of them",
    "timm/resnet18.a1_in1": "timm has no network 'resnet18.a1_in1'; did you mean 'timm/resnet18.a1_in1k'?",
    "timm/resnet18.nonesuch": "timm has no network 'resnet18.nonesuch'",
    "torchvision/resnet19": "did you mean 'torchvision/resnet18'?",
    "torchvison/resnet18": "unknown library 'torchvison'",
}
LINES = {
    f"own_net:{name}": str(1 + MODULE.splitlines().index(line))
    for name, line in (
        ("forgetful", '    return Net(widths["late"])'),
        ("mismatched", "    nn.Linear(3, 4)(torch.ones(2, 5))"),
    )
}


def test_what_is_wrong_with_a_network_is_said_in_two_lines(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from pipelines.cli import main

    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PBKD_ALLOW_IMPORT", "1")
    for arch, words in MISTAKES.items():
        code = main(["plan", "own.yaml", f"stages.teacher.network.arch={arch}"])
        out, err = capfd.readouterr()
        assert code == 2 and out == "", arch
        words = words.replace("LINE", LINES.get(arch, ""))
        assert words in err and len(err.splitlines()) <= 2 and "Traceback" not in err, err


def test_weights_come_from_safetensors_or_a_state_dict_and_never_from_a_pickle(tmp_path: Path) -> None:
    settings = settings_of("torchvision/mobilenet_v3_small")
    spec = architecture(settings, (3, 64, 64), 10)
    torch.manual_seed(1)
    original = import_torchvision().models.mobilenet_v3_small(num_classes=10).eval()
    save_file(original.state_dict(), tmp_path / "weights.safetensors")
    torch.save(original.state_dict(), tmp_path / "weights.pt")
    torch.save({"state_dict": original.state_dict(), "epoch": 3}, tmp_path / "weights.pth")
    images = torch.randn(2, 3, 64, 64)
    for name in ("weights.safetensors", "weights.pt", "weights.pth"):
        network = empty(spec).eval()
        load_weights(network, read_tensors(tmp_path / name), name)
        with torch.inference_mode():
            assert torch.equal(network(images), original(images))

    torch.save(original, tmp_path / "whole.pt")
    with pytest.raises(UserError, match=r"a whole network.*\n.*torch.save\(model.state_dict\(\), FILE\)"):
        read_tensors(tmp_path / "whole.pt")
    other = empty(architecture(settings, (3, 64, 64), 7))
    with pytest.raises(UserError, match=r"'classifier.3.weight' has .*\ncheck the recipe's network"):
        load_weights(other, read_tensors(tmp_path / "weights.pt"), "weights.pt")


def test_inspect_counts_every_part_once() -> None:
    from pipelines.inspection import inspect_network

    found = inspect_network("torchvision/resnet18", input_size=64, classes=10, cuts=["layer2", "layer4"])
    assert [(part.name, part.output_shape) for part in found.blocks] == [
        ("layer2", (128, 8, 8)),
        ("layer4", (512, 2, 2)),
    ]
    assert sum(part.cost.macs for part in found.parts) == found.cost.macs
    assert sum(part.cost.params for part in found.parts) == found.cost.params
    ours = inspect_network("resnet56")
    assert [part.output_shape for part in ours.blocks] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
