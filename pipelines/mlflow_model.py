"""An exported ONNX file as an MLflow model, which `mlflow models serve` answers requests with."""

from __future__ import annotations

import shlex
from importlib.metadata import version
from pathlib import Path

import numpy as np
from torch import Tensor

REQUIREMENTS = ("mlflow", "numpy", "onnx", "onnxruntime")


def make_servable(file: Path, example: Tensor, classes: int, dynamic_batch: bool) -> None:
    """Write MLflow's files beside `file`, which is written anew, under its name.

    `example` (1, C, H, W) becomes `serving_input_example.json`, a request to try.
    """
    import mlflow.onnx
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    batch, kind = -1 if dynamic_batch else 1, np.dtype(np.float32)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(kind, (batch, *example.shape[1:]))]),
        outputs=Schema([TensorSpec(kind, (batch, classes))]),
    )
    model = onnx.load(file)
    file.unlink()
    mlflow.onnx.save_model(
        model,
        file.parent,
        signature=signature,
        input_example=example.numpy(),
        pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
        onnx_execution_providers=["CPUExecutionProvider"],
        save_as_external_data=False,  # one file, that can be taken away
    )
    assert file.is_file(), "MLflow calls it model.onnx, too"


def serve_command(folder: Path) -> str:
    """What starts a server on this machine that answers POST /invocations."""
    return shlex.join(
        ["mlflow", "models", "serve", "-m", str(folder), "--env-manager", "local", "-p", "5001"]
    )
