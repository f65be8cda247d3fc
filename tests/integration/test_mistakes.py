"""What a user can get wrong: exit code 2, at most three lines with the cure, no stdout, no store made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipelines.cli import main
from tests.integration.pbkd_process import ROOT, SMALL

RECIPES = ROOT / "pipelines" / "recipes"
LOCAL = "compute.executor=local"


@pytest.fixture(autouse=True)
def _usual_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PBKD_STORE", "PBKD_DATA", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def complaint(
    capfd: pytest.CaptureFixture[str], store: Path, recipe: Path, *overrides: str, is_store_made: bool = False
) -> str:
    """What `pbkd run RECIPE OVERRIDES` says of a mistake."""
    code = main(["run", str(recipe), *overrides, "--store", str(store), "--json"])
    out, err = capfd.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and len(err.splitlines()) <= 3, err
    assert "Traceback" not in err
    if not is_store_made:
        assert not store.is_dir()
    return err


MISTAKES = [
    # unknown keys: the nearest one
    ("sed=1", "unknown key 'sed'; did you mean 'seed'?"),
    ("data.batchsize=3", "unknown key 'data.batchsize'; did you mean 'batch_size'?"),
    ("compute.worker=3", "unknown key 'compute.worker'; did you mean 'workers'?"),
    ("tracking.url=x", "unknown key 'tracking.url'; did you mean 'uri'?"),
    ("stages.teacher.stepz=3", "unknown key 'stages.teacher.stepz'; did you mean 'steps'?"),
    (
        "stages.teacher.network.base_with=3",
        "unknown key 'stages.teacher.network.base_with'; did you mean 'base_width'?",
    ),
    (
        "stages.blocks.optimizer.weight_decy=0",
        "unknown key 'stages.blocks.optimizer.weight_decy'; did you mean 'weight_decay'?",
    ),
    # a stage may be called what it likes, its kind included
    ("stages.train={kind: train, stepz: 3}", "unknown key 'stages.train.stepz'; did you mean 'steps'?"),
    # values
    ("seed=abc", "'seed': expected a valid integer"),
    ("seed=-1", "'seed': expected greater than or equal to 0, found -1"),
    ("compute.threads=0", "'compute.threads': expected greater than 0 or 'auto', found 0"),
    ("compute.executor=dask", "'compute.executor': expected 'ray' or 'local', found 'dask'"),
    ("data.name=mnist", "'data.name': expected 'digits', 'cifar10', 'cifar100' or 'folder', found 'mnist'"),
    ("data.mean=[1,2]", "'data': mean has 2 values; digits has 1 channels"),
    ("stages.teacher.optimizer=3", "'stages.teacher.optimizer': expected a valid dictionary"),
    ("stages.teacher.optimizer.lr=-1", "'stages.teacher.optimizer.lr': expected greater than 0, found -1"),
    ("stages.teacher.network.arch=resnet21", "unknown architecture 'resnet21'; did you mean 'resnet"),
    ("stages.teacher.network.head=[32]", "network.head: resnet20 has no such option; it has shortcut"),
    ("stages.teacher.epochs=1", "'stages.teacher': give the length either as epochs or as steps"),
    ("stages=3", "'stages': expected a valid dictionary, found 3"),
    ("stages.a b={kind: prune, ratio: 0.2}", "expected a name of letters, digits, '_' and '-', found 'a b'"),
    # kinds
    (
        "stages.teacher.kind=trian",
        "'stages.teacher.kind' is 'trian', which is no kind of stage; did you mean 'train'?",
    ),
    ("stages.new={steps: 3}", "'stages.new.kind' is missing; it is one of load, train,"),
    # who starts from whom
    ("stages.blocks.from=recovered", "depend on one another in a circle, blocks <- recovered <- pruned"),
    ("stages.pruned.from=pruned", "depend on one another in a circle, pruned <- pruned"),
    (
        "stages.pruned.from=stablized",
        "stages.pruned.from: there is no stage 'stablized'; did you mean 'stabilized'?",
    ),
    (
        "stages.pruned.from=blocks.9",
        "stages.pruned.from: there is no stage 'blocks.9'; did you mean 'blocks.",
    ),
    (
        "stages.recovered.teacher=techer",
        "stages.recovered.teacher: there is no stage 'techer'; did you mean 'teacher'?",
    ),
    ("teacher=techer", "teacher: there is no stage 'techer'; did you mean 'teacher'?"),
    ("student=recoverd", "student: there is no stage 'recoverd'; did you mean 'recovered'?"),
    ("baselines=[scrath]", "baselines: there is no stage 'scrath'; did you mean 'scratch'?"),
    (
        "teacher=recovered",
        "stages.blocks.teacher: is missing; the recipe's teacher, 'recovered', is made from this",
    ),
    (
        "stages.teacher.network=null",
        "stages.teacher.from: the first stage has none before it; begin with a teacher",
    ),
    # what does not fit the network
    ("stages.blocks.width=1.5", "'stages.blocks.width': expected less than or equal to 1"),
    ("stages.blocks.width=[0.5,2]", "'stages.blocks.width.1': expected less than or equal to 1, found 2"),
    (
        "stages.blocks.width=[0.5]",
        "stages.blocks.width: 1 widths for 2 blocks; give one number, or one per block",
    ),
    ("stages.blocks.blocks=[9]", "stages.blocks: block 9: resnet20 has blocks 1 to 3"),
    ("stages.blocks.blocks=[]", "stages.blocks.blocks: is empty"),
    ("stages.pruned.macs=0.01", "of the MACs; raise macs, or lower round_to"),
    ("stages.pruned.ratio=0.5", "'stages.pruned': give one of ratio"),
    # overrides
    ("seed", "override 'seed': expected key=value, such as stages.blocks.epochs=2"),
    ("=1", "override '=1': expected key=value"),
    ("seed=[1", "override 'seed=[1': cannot be applied"),
    ("name=${nope}", "'name': Interpolation key 'nope' not found"),
    # machines
    ("compute.workers=4096", "compute.workers=4096: this machine has"),
]


@pytest.mark.parametrize(("override", "message"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_a_mistake_in_a_key_or_value(
    override: str, message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert message in complaint(capfd, tmp_path / "runs", SMALL, override)


FILES = {
    "missing": (None, "cannot be read (No such file or directory)"),
    "empty": (b"", "is empty"),
    "binary": (bytes(range(256)), "not a text file in UTF-8"),
    "latin1": ("name: café".encode("latin-1"), "not a text file in UTF-8"),
    "no-yaml": (b"a: [1, 2\nb: }", "not a YAML mapping"),
    "control": (b"name: a\x00b\n", "not a YAML mapping"),
    "twice": (b"name: a\nname: b\n", "found duplicate key name"),
    "list": (b"- a\n- b\n", "a recipe is a mapping of keys to values, found a list"),
    "little": (b"name: a\n", "key 'data' is missing\n(and 3 more)"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_recipe(name: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    content, message = FILES[name]
    recipe = tmp_path / f"{name}.yaml"
    if content is not None:
        recipe.write_bytes(content)
    said = complaint(capfd, tmp_path / "runs", recipe)
    assert message in said and str(recipe) in said


def test_a_misspelt_recipe_file(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = complaint(capfd, tmp_path / "runs", RECIPES / "digts.yaml")
    assert f"did you mean {RECIPES / 'digits.yaml'}?" in said


def test_a_ray_cluster_that_is_not_there(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    said = complaint(capfd, tmp_path / "runs", SMALL, is_store_made=True)
    assert "RAY_ADDRESS=127.0.0.1:1: no Ray cluster to use there" in said
    assert not any((tmp_path / "runs" / "pipelines").iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be had")
@pytest.mark.parametrize("executor", ["ray", "local"])
def test_cuda_without_a_gpu(executor: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    overrides = ["compute.device=cuda", f"compute.executor={executor}"]
    assert "set compute.device=auto" in complaint(capfd, tmp_path / "runs", SMALL, *overrides)


@pytest.mark.parametrize(
    ("recipe", "cure"),
    [
        ("cifar10_vgg16", "data.download=true"),
        ("cifar100_vgg16", "data.download=true"),
        ("cifar10_resnet56", "data.download=true"),
        ("imagenet_vgg16_conv", "expected ROOT/train/CLASS"),
    ],
)
def test_missing_data_set(recipe: str, cure: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = complaint(capfd, tmp_path / "runs", RECIPES / f"{recipe}.yaml", f"data.root={tmp_path}")
    assert cure in said and str(tmp_path) in said


def test_missing_weights(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = _loading(tmp_path, tmp_path / "none.safetensors")
    said = complaint(capfd, tmp_path / "runs", recipe)
    assert "stages.teacher.weights: " in said and "none.safetensors cannot be read" in said


def test_weights_that_do_not_fit(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    weights, store = tmp_path / "weights.safetensors", tmp_path / "runs"
    save_file({"conv1.weight": torch.zeros(16, 3, 3, 3)}, weights)
    said = complaint(capfd, store, _loading(tmp_path, weights), LOCAL, is_store_made=True)
    assert "stages.teacher: " in said and str(weights) in said
    assert "'conv1.weight' has shape (16, 3, 3, 3), but resnet20 needs (16, 1, 3, 3)" in said
    assert not any((store / "manifests").iterdir())
    assert not any((store / "artifacts").iterdir())


def test_damaged_weights(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file({"conv1.weight": torch.zeros(16, 1, 3, 3)}, weights)
    weights.write_bytes(weights.read_bytes()[:-7])
    said = complaint(capfd, tmp_path / "runs", _loading(tmp_path, weights), LOCAL, is_store_made=True)
    assert f"{weights}: cannot be read as safetensors" in said


def test_a_store_that_is_a_file(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    store = tmp_path / "runs"
    store.write_text("mine")
    assert f"store {store}: cannot be used" in complaint(capfd, store, SMALL)
    assert store.read_text() == "mine"


def test_a_store_that_cannot_be_written(capfd: pytest.CaptureFixture[str]) -> None:
    store = Path("/proc/runs")  # refuses even root
    assert "choose a folder you may write to" in complaint(capfd, store, SMALL)


@pytest.mark.parametrize("command", ["lineage", "ui"])
def test_a_store_that_is_none(command: str, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [command, *(["abcdef"] if command == "lineage" else []), "--store", str(tmp_path / "runs")]
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and "there is none; run a recipe first" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument 'RECIPE'"),
        (["run", "x.yaml", "--stor", "y"], "No such option: --stor"),
        (["rnu", "x.yaml"], "No such command 'rnu'"),
        (["ui", "--port", "x"], "Invalid value for '--port'"),
    ],
)
def test_a_mistake_in_the_command(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err and len(err.splitlines()) <= 3


def test_a_mistake_through_the_console_script(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "run", SMALL, "sed=1", "--store", tmp_path / "runs"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"error: {SMALL}: unknown key 'sed'; did you mean 'seed'?\n"


def _loading(folder: Path, weights: Path) -> Path:
    """The small recipe with a teacher from `weights`."""
    lines = SMALL.read_text().split("  teacher:\n")
    after = lines[1][lines[1].index("  blocks:\n") :]
    stage = f"    kind: load\n    network: {{arch: resnet20}}\n    weights: {weights}\n"
    recipe = folder / "loading.yaml"
    recipe.write_text(f"{lines[0]}  teacher:\n{stage}{after}")
    return recipe
