"""Ray's trainer without Ray Datasets: pbkd reads data itself, and their process costs each job seconds."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer


class Trainer(TorchTrainer):
    """One whose jobs start no process for datasets; of Ray Train V2, which is not typed."""

    def _create_default_callbacks(self) -> list[Any]:
        return [
            callback
            for callback in super()._create_default_callbacks()  # type: ignore[misc]
            if type(callback).__name__ != "DatasetsCallback"
        ]
