"""Proves on a machine with GPUs what the tests cannot, which run without; says what it had to leave out.

    python -m benchmarks.gpu_smoke            # one GPU; with two or more, NCCL and synchronized BatchNorm too

Exit code 0: all that was run holds; 1: something does not; 3: there is no GPU, so nothing was shown.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.faults import ROOT

NO_GPU = 3
RECIPE = ROOT / "pipelines" / "recipes" / "digits.yaml"
SHORT = (
    "data.limit=256", "data.batch_size=32", "stages.teacher.epochs=3", "stages.teacher.optimizer={lr: 0.01}",
    "--until", "teacher",
)  # fmt: skip
SAME, SIMILAR = 0.01, 0.15
"""Relative differences of losses and statistics: by the order of summation, and TF32; by half precision."""


class Untested(Exception):  # noqa: N818 - not an error
    """The machine has not what it takes."""


@dataclass(frozen=True)
class Training:
    """A training of a few epochs.

    Attributes:
        losses: of every epoch.
        statistics: the running means and variances of every BatchNorm.
        precision: that it was recorded with.
    """

    losses: list[float]
    statistics: dict[str, torch.Tensor]
    precision: str


@cache
def trained(device: str, *overrides: str) -> Training:
    """A ResNet-20 with BatchNorm on digits, as `pbkd run` trains it."""
    with tempfile.TemporaryDirectory(prefix="pbkd-gpu-") as folder:
        subprocess.run(
            [sys.executable, "-m", "pipelines.cli", "run", RECIPE, *SHORT, f"compute.device={device}",
             *overrides, "--store", folder, "--json"],
            cwd=ROOT, stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        (path,) = Path(folder).glob("manifests/*.json")
        manifest = json.loads(path.read_bytes())
        weights = load_file(Path(folder) / "artifacts" / manifest["artifact"] / "weights.safetensors")
    return Training(
        [row["train_loss"] for row in manifest["history"] if "train_loss" in row],
        {name: tensor for name, tensor in weights.items() if "running_" in name},
        manifest["compute"]["precision"],
    )


def require_same(found: Training, expected: Training, tolerance: float) -> None:
    """Raise AssertionError if losses or statistics of BatchNorm differ by more than a share of their size."""
    assert found.losses and found.statistics.keys() == expected.statistics.keys() != set()
    for here, there in zip(expected.losses, found.losses, strict=True):
        assert math.isclose(here, there, rel_tol=tolerance), f"loss {there:.5f} instead of {here:.5f}"
    for name, tensor in expected.statistics.items():
        difference = float((found.statistics[name] - tensor).norm() / tensor.norm())
        assert difference <= tolerance, f"{name} differs by {difference:.4f} of its norm"


def trains(device: str) -> None:
    """Ray Train, also with two workers to a GPU, trains as a process of this machine does."""
    for overrides in ((), ("compute.gpus_per_worker=0.5",)):
        found = trained(device, "compute.executor=ray", *overrides)
        require_same(found, trained(device, "compute.executor=local"), SAME)


def precisions(device: str, names: tuple[str, ...] = ("bf16", "fp16")) -> None:
    """Half precision is in effect, and trains as fp32 does."""
    expected = trained(device, "compute.executor=local")
    for name in names:
        found = trained(device, "compute.executor=local", f"compute.precision={name}")
        assert found.precision == name
        assert found.losses != expected.losses, f"{name} changed no bit: it was not in effect"
        require_same(found, expected, SIMILAR)


def workers(device: str, executors: tuple[str, ...] = ("local", "ray")) -> None:
    """Two workers, which share BatchNorm's statistics, train as one does with the same global batches."""
    if device == "cuda" and torch.cuda.device_count() < 2:
        raise Untested("NCCL and synchronized BatchNorm take two GPUs")
    expected = trained(device, "compute.executor=local")
    for executor in executors:
        require_same(trained(device, f"compute.executor={executor}", "compute.workers=2"), expected, SAME)


def normalization(device: str) -> None:
    """What is normalized on the device equals what is normalized on the CPU."""
    from pbkd.data import DataSettings, data_digest, open_data

    settings = DataSettings(name="digits", batch_size=64)
    with tempfile.TemporaryDirectory() as cache_folder:
        place = Path(cache_folder)
        data = open_data(settings, data_digest(settings, cache=place), place)
        batches = {}
        for name in ("cpu", device):
            reader = data.reader("train", batch_size=64, seed=1, rank=0, world=1, device=torch.device(name))
            batches[name] = [images.cpu() for images, _ in reader]
            reader.close()
    for here, there in zip(batches["cpu"], batches[device], strict=True):
        torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-5)


CHECKS: tuple[Callable[[str], None], ...] = (normalization, trains, precisions, workers)


def main() -> int:
    """Run every check; say of each how it went."""
    if not torch.cuda.is_available():
        sys.stderr.write("NOTHING WAS TESTED: torch finds no GPU on this machine\n")
        return NO_GPU
    sys.stdout.write(
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, torch {torch.__version__}\n"
    )
    failed = False
    for check in CHECKS:
        try:
            check("cuda")
            said = "holds"
        except Untested as reason:
            said = f"NOT TESTED: {reason}"
        except (AssertionError, subprocess.CalledProcessError, RuntimeError) as error:
            said, failed = f"FAILED: {error}", True
        sys.stdout.write(f"{check.__name__}: {said}\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
