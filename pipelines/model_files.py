"""What MLflow shows of a registered network: its signature, and an input with what comes out of it."""

from __future__ import annotations

import json
from pathlib import Path

from pbkd import artifact

FLAVOR = "pbkd"
DIGITS = 4  # of an example's numbers; the stored logits are compared less closely


def write_model_files(folder: Path, path: Path, model_id: str, run_id: str) -> None:
    """Write an MLmodel file and an example for the artifact at `path` into `folder`.

    The example is the input that every artifact is tried with when it is loaded. The weights stay in the
    store: the flavour `pbkd` tells where.

    Raises:
        UserError: there is no artifact at `path`, or it is damaged.
    """
    import numpy as np
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    spec = artifact.read(path).spec
    images = Schema([TensorSpec(np.dtype("float32"), (-1, *spec.input_shape), "images")])
    logits = Schema([TensorSpec(np.dtype("float32"), (-1, spec.num_classes), "logits")])
    example = {"images": artifact.probe_input(spec).numpy().round(DIGITS).astype(float).tolist()}
    Model(
        flavors={FLAVOR: {"artifact": str(path), "arch": spec.arch}},
        signature=ModelSignature(images, logits),
        saved_input_example_info={
            "artifact_path": "input_example.json",
            "type": "ndarray",
            "format": "tf-serving",
            "serving_input_path": "serving_input_example.json",
        },
        model_id=model_id,
        run_id=run_id,
    ).save(str(folder / "MLmodel"))
    text = json.dumps({"inputs": example}, separators=(",", ":"))
    for name in ("input_example.json", "serving_input_example.json"):
        (folder / name).write_text(text)
