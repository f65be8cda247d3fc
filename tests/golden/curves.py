"""Short seeded trainings of every kind of stage, and their recorded losses.

Whoever changes numbers on purpose raises the version of the stage or engine and records again:

    python -m tests.golden.curves
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pbkd.data import DataSettings, open_data
from pbkd.engine import LocalSession, Precision
from pbkd.networks import BlockNetwork
from pbkd.stages import Assemble, Block, Context, Distill, Prune, Stabilize, Stage, Train, run_stage

RECORDED = Path(__file__).parent / "losses.json"
TRAINING: dict[str, Any] = {"epochs": 3, "optimizer": {"lr": 0.05, "clip": 5.0}}
NETWORK = {"arch": "resnet20", "base_width": 8}

Curves = dict[str, list[float]]


# Which kernels run depends on the processor, and a few steps make a percent of a last bit. All have these.
SAME_KERNELS = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}


def curves() -> dict[str, Curves]:
    """Stage -> quantity -> its values, one per epoch (one in all for what is measured at the end).

    Computed in a process of its own, in which every processor gives the same.
    """
    command = [sys.executable, "-m", "tests.golden.curves", "--print"]
    done = subprocess.run(command, env=os.environ | SAME_KERNELS, stdout=subprocess.PIPE, check=True)
    found: dict[str, Curves] = json.loads(done.stdout)
    return found


@torch.backends.mkldnn.flags(enabled=False)  # the two share work by the size of the caches
@torch.backends.nnpack.flags(enabled=False)
def _curves() -> dict[str, Curves]:
    data = open_data(DataSettings(name="digits", batch_size=50, limit=200))
    found: dict[str, Curves] = {}

    def run(name: str, stage: Stage, **inputs: BlockNetwork) -> BlockNetwork:
        roles = {role.removesuffix("_"): network for role, network in inputs.items()}
        result = run_stage(stage, Context(LocalSession(), roles, data, 7, Precision()))
        found[name] = {"test_loss": [result.metrics["test_loss"]]}
        for quantity in ("train_loss", "train_local_loss", "val_loss"):
            if values := [row[quantity] for row in result.history if quantity in row]:
                found[name][quantity] = values
        return result.network

    teacher = run("train", Train.model_validate({"network": NETWORK, **TRAINING}))

    def block(number: int, init: str, start: BlockNetwork) -> BlockNetwork:
        settings = {"block": number, "init": init, "init_images": 64, **TRAINING}
        return run(f"block_{init}", Block.model_validate(settings), from_=start, teacher=teacher)

    student = block(1, "inherit", teacher)
    block(2, "least_squares", student)  # nothing begins with it: a solution's last bits are the processor's
    student = block(3, "kaiming", student)
    student = run("stabilize", Stabilize(epochs=3), from_=student, teacher=teacher)
    student = run("distill", Distill.model_validate(TRAINING), from_=student, teacher=teacher)
    student = run("prune", Prune(macs=0.7, round_to=2, recalibrate_images=64), from_=student, teacher=teacher)
    fresh = Distill.model_validate({"weights": "fresh", **TRAINING})
    run("distill_fresh", fresh, from_=student, teacher=teacher)
    run("fine_tune", Train.model_validate({"weights": "keep", **TRAINING}), from_=student, teacher=teacher)

    terms = {"alpha": 0.5, "attention_weight": 60, "distance_weight": 25, "angle_weight": 50}
    features = Distill.model_validate({**terms, **TRAINING})
    run("distill_features", features, from_=student, teacher=teacher)
    settings = {"block": 2, "input": "teacher", "init": "inherit", **TRAINING}
    apart = run("block_apart", Block.model_validate(settings), from_=teacher, teacher=teacher)
    run("assemble", Assemble(), from_=teacher, teacher=teacher, **{"block.2": apart})
    sparse = run("sparse", Prune(sparsity=0.5, recalibrate_images=64), from_=teacher, teacher=teacher)
    run("ticket", Train.model_validate({"rewind": 4, **TRAINING}), from_=sparse, teacher=teacher)
    return found


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(json.dumps(_curves()))
    else:
        RECORDED.write_text(json.dumps(curves(), indent=1) + "\n")
