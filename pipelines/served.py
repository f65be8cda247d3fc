"""How an MLflow model of pbkd answers: pixels in, logits and classes out.

A copy of this file and of `pbkd/preprocessing.py` lies in every such model; with ONNX it needs no pbkd.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

try:
    from pbkd_preprocessing import Preprocessing, decode  # type: ignore[import-not-found]  # the copy beside this one
except ImportError:
    from pbkd.preprocessing import Preprocessing, decode

if TYPE_CHECKING:
    from mlflow.exceptions import MlflowException

INTERFACE = "interface.json"
"""In the model's folder: the preprocessing, the classes, and what the file of the network takes."""
MOST = 255


class Served:
    """A network, asked with images as files have them."""

    def __init__(self, network: Callable[[Any], Any], interface: dict[str, Any]) -> None:
        self._network = network
        self._seen = Preprocessing.model_validate(interface["preprocessing"])
        self._classes = interface["classes"]
        self._takes_pixels = interface["input_type"] == "uint8"
        self._takes_one = not interface["dynamic_batch"]

    def predict(self, inputs: Any, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return `logits` (N, classes) and, where classes have names, the `class` of each image.

        One of `images` is numbers from 0 to 255 of shape (H, W, C), or an image file in base64. Others raise
        MlflowException, which a server answers with as a bad request.
        """
        images = inputs.get("images") if isinstance(inputs, dict) else inputs
        if images is None or len(images) == 0:
            raise _refused("found none")
        try:
            seen = np.stack([self._pixels(image) for image in images])
        except ValueError as error:  # what pixels or sizes are not
            raise _refused(str(error)) from None
        batch = seen if self._takes_pixels else self._normalized(seen)
        parts = np.split(batch, len(batch)) if self._takes_one else [batch]
        logits = np.concatenate([np.asarray(self._network(part)) for part in parts])
        answer: dict[str, Any] = {"logits": logits}
        if self._classes:
            answer["class"] = np.array([self._classes[index] for index in logits.argmax(1)])
        return answer

    def _pixels(self, image: Any) -> Any:
        """What the network sees of an image, uint8 (S, S, C)."""
        opened = _opened(image, self._seen) if isinstance(image, str) else _drawn(image, len(self._seen.mean))
        side = self._seen.image_size
        return self._seen.pixels(opened).reshape(side, side, -1)

    def _normalized(self, pixels: Any) -> Any:
        seen = self._seen
        images = (pixels / MOST - np.array(seen.mean)) / np.array(seen.std)
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)


def _opened(text: str, seen: Preprocessing) -> Image.Image:
    try:
        content = BytesIO(base64.b64decode(text, validate=True))
        image: Image.Image = decode(content, upright=seen.orientation == "exif")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"a text is no image file in base64: {error}") from None
    return image.convert("L") if seen.colours == "grey" else image


def _drawn(image: Any, channels: int) -> Image.Image:
    try:
        numbers = np.array(np.asarray(image).tolist(), np.float64)
    except (TypeError, ValueError):
        raise ValueError("an image is no array of numbers") from None
    if numbers.ndim != 3 or numbers.shape[2] != channels or not numbers.size:
        raise ValueError(f"an image has shape {numbers.shape}")
    if not (numbers.min() >= 0 and numbers.max() <= MOST and (numbers == numbers.round()).all()):
        raise ValueError(f"an image has numbers such as {numbers.min():g} and {numbers.max():g}")
    pixels = numbers.astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def _refused(found: str) -> MlflowException:
    from mlflow.exceptions import MlflowException  # seconds: commands of pbkd import this module for its name

    error: MlflowException = MlflowException.invalid_parameter_value(
        f"images: {found}\nexpected pixels as image files have them, whole numbers from 0 to 255 of shape "
        "(N, H, W, C), or image files in base64; they are normalized here"
    )
    return error


def _load_pyfunc(path: str) -> Served:
    """Load the model in the folder `path`; MLflow calls it, by this name."""
    folder = Path(path)
    interface = json.loads((folder / INTERFACE).read_text())
    return Served(_network(folder, interface), interface)


def _network(folder: Path, interface: dict[str, Any]) -> Callable[[Any], Iterable[Any]]:
    if (file := folder / "model.onnx").is_file():
        import onnxruntime  # type: ignore[import-untyped]

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {interface["input"]: images})[0]
    import torch

    from pbkd import artifact

    network = artifact.load(folder / "artifact").eval()

    def run(images: Any) -> Any:
        with torch.inference_mode():
            return network(torch.from_numpy(images)).numpy()

    return run
