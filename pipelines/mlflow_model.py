"""A network as an MLflow model that stands alone: weights, preprocessing, class names, signature."""

from __future__ import annotations

import json
import platform
import shlex
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

import pbkd.preprocessing
from pipelines import served

CODE = {"pbkd_served.py": served, "pbkd_preprocessing.py": pbkd.preprocessing}
"""Files that are copied into a model, by their names there."""
SHARED = ("mlflow", "numpy", "pillow", "pydantic")


def write_model(
    folder: Path,
    described: Mapping[str, Any],
    needs: Sequence[str],
    model_id: str | None = None,
    run_id: str | None = None,
    pixels: NDArray[np.uint8] | None = None,
) -> None:
    """Write MLflow's files into `folder`, beside `model.onnx` or the folder `artifact`.

    Args:
        folder: of the model.
        described: what `served.Served` has to know, and how many logits there are as `outputs`.
        needs: the packages that it needs, beside those that all do.
        model_id, run_id: of a logged model, in MLflow.
        pixels: (1, S, S, C), of an image to try; without it, noise.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    seen = described["preprocessing"]
    # Of any type and shape: MLflow would cut 0.7 down to a pixel of 0, and `served` refuses it.
    takes = Schema([TensorSpec(np.dtype("O"), (-1,), "images")])
    gives: list[Any] = [TensorSpec(np.dtype("float32"), (-1, described["outputs"]), "logits")]
    if described["classes"]:
        gives.append(TensorSpec(np.dtype("str"), (-1,), "class"))
    python = platform.python_version()
    (folder / "code").mkdir()
    for name, module in CODE.items():
        shutil.copy(str(module.__file__), folder / "code" / name)
    wanted = [f"{name}=={version(name)}" for name in (*SHARED, *needs)]
    environment = {"python": python, "build_dependencies": ["pip"], "dependencies": ["-r requirements.txt"]}
    side, channels = seen["image_size"], len(seen["mean"])
    if pixels is None:
        pixels = np.random.default_rng(0).integers(0, 256, (1, side, side, channels), np.uint8)
    example = json.dumps({"inputs": {"images": pixels.tolist()}}, separators=(",", ":"))
    for name, text in {
        served.INTERFACE: json.dumps(described, indent=1),
        "requirements.txt": "\n".join(wanted),
        "python_env.yaml": yaml.safe_dump(environment, sort_keys=False),
        "input_example.json": example,
        "serving_input_example.json": example,
    }.items():
        (folder / name).write_text(f"{text}\n")
    Model(
        flavors={
            "python_function": {
                "loader_module": "pbkd_served",
                "code": "code",
                "python_version": python,
                "env": {"virtualenv": "python_env.yaml"},
            }
        },
        signature=ModelSignature(takes, Schema(gives)),
        saved_input_example_info={
            "artifact_path": "input_example.json",
            "type": "ndarray",
            "format": "tf-serving",
            "serving_input_path": "serving_input_example.json",
        },
        metadata={"preprocessing": seen, "classes": described["classes"]},
        model_id=model_id,
        run_id=run_id,
    ).save(str(folder / "MLmodel"))


def serve_command(folder: Path) -> str:
    """What starts a server on this machine that answers POST /invocations."""
    return shlex.join(
        ["mlflow", "models", "serve", "-m", str(folder), "--env-manager", "local", "-p", "5001"]
    )
