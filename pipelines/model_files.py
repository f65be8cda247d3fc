"""What MLflow shows of a registered network, its signature and an input; and how it serves it by its name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pbkd import artifact

if TYPE_CHECKING:
    import numpy as np

    from pbkd.networks import BlockNetwork

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
        flavors={
            FLAVOR: {"artifact": str(path), "arch": spec.arch},
            "python_function": {"loader_module": __name__, "python_version": sys.version.split()[0]},
        },
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


class Served:
    """A network of the store, as `mlflow models serve` and `mlflow.pyfunc.load_model` ask it."""

    def __init__(self, network: BlockNetwork) -> None:
        self._network = network.eval()

    def predict(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return `logits` (N, classes) of `images`, float32 (N, C, H, W), normalized as in training."""
        import torch

        with torch.inference_mode():
            return {"logits": self._network(torch.from_numpy(inputs["images"])).numpy()}


def _load_pyfunc(folder: str) -> Served:
    """Load what the MLmodel file in `folder` names; MLflow calls it, by this name."""
    from mlflow.models import Model

    flavor = Model.load(folder).flavors[FLAVOR]
    return Served(artifact.load(Path(flavor["artifact"])))
