"""Proves on a machine with GPUs what the tests cannot, which run without; says what it had to leave out.

    python -m benchmarks.gpu_smoke            # one GPU; with two or more, NCCL and synchronized BatchNorm too

Exit code 0: all that was run holds; 1: something does not; 3: there is no GPU, so nothing was shown.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults import ROOT

NO_GPU = 3
SMALL = ("smoke=true", "compute.device=cuda")
RECIPE = ROOT / "pipelines" / "recipes" / "digits.yaml"


class Untested(Exception):  # noqa: N818 - not an error
    """The machine has not what it takes."""


def run(*overrides: str) -> dict[str, Any]:
    """The report of a smoke run of the digits recipe."""
    with tempfile.TemporaryDirectory(prefix="pbkd-gpu-") as folder:
        found = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", "run", RECIPE, *SMALL, *overrides,
             "--store", folder, "--json"],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
    report: dict[str, Any] = json.loads(found.stdout)
    return report


def accuracies(report: dict[str, Any]) -> list[float]:
    """Of every stage's network."""
    return [stage["test_accuracy"] for stage in report["stages"]]


def trains() -> None:
    """A pipeline runs on the GPU, by Ray Train and without."""
    for executor in ("local", "ray"):
        assert all(value is not None for value in accuracies(run(f"compute.executor={executor}")))


def precisions() -> None:
    """bf16 trains, and is evaluated in fp32: no accuracy is missing."""
    found = accuracies(run("compute.precision=bf16", "compute.executor=local"))
    assert all(0.0 <= accuracy <= 100.0 for accuracy in found)  # not NaN


def nccl() -> None:
    """Two workers train together: NCCL, a GPU each, BatchNorm synchronized."""
    if torch.cuda.device_count() < 2:
        raise Untested("it needs two GPUs")
    for executor in ("local", "ray"):
        run("compute.workers=2", f"compute.executor={executor}")


def normalization() -> None:
    """What is normalized on the device equals what is normalized on the CPU."""
    from pbkd.data import DataSettings, data_digest, open_data

    settings = DataSettings(name="digits", batch_size=64)
    with tempfile.TemporaryDirectory() as cache:
        data = open_data(settings, data_digest(settings, cache=Path(cache)), Path(cache))
        batches = {}
        for device in ("cpu", "cuda"):
            reader = data.reader("train", batch_size=64, seed=1, rank=0, world=1, device=torch.device(device))
            batches[device] = [images.cpu() for images, _ in reader]
            reader.close()
    for here, there in zip(batches["cpu"], batches["cuda"], strict=True):
        torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-5)


CHECKS: tuple[Callable[[], None], ...] = (normalization, trains, precisions, nccl)


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
            check()
            said = "holds"
        except Untested as reason:
            said = f"NOT TESTED: {reason}"
        except (AssertionError, subprocess.CalledProcessError, RuntimeError) as error:
            said, failed = f"FAILED: {error}", True
        sys.stdout.write(f"{check.__name__}: {said}\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
