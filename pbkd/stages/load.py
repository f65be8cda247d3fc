"""`load`: a network from given weights; the usual teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pbkd.artifact import read_tensors
from pbkd.data import DataInfo
from pbkd.errors import UserError
from pbkd.networks import BlockNetwork, NetworkSettings, NetworkSpec, architecture, load_weights
from pbkd.networks.weights import empty
from pbkd.stages.base import Context, Role, Stage


class Load(Stage):
    """Build `network` and load `weights`, a .safetensors file with pbkd's or public VGG and ResNet names."""

    kind: Literal["load"] = "load"
    network: NetworkSettings
    weights: Path

    def needs_from(self) -> bool:
        """It starts from a file."""
        return False

    def semantic(self) -> dict[str, Any]:
        """The weights file counts by its content, not by its path."""
        try:
            with self.weights.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(
                f"weights: {self.weights} cannot be read ({error.strerror}); give a .safetensors file, "
                f"for example stages.teacher.weights=FILE"
            ) from error
        return super().semantic() | {"weights": content}

    def plan(self, inputs: Mapping[Role, NetworkSpec], info: DataInfo) -> NetworkSpec:
        """The named architecture."""
        return architecture(self.network, info.input_shape, info.num_classes)

    def run(self, context: Context) -> BlockNetwork:
        """Load, nothing else."""
        network = empty(self.plan({}, context.data.info))
        load_weights(network, read_tensors(self.weights), str(self.weights))
        return network.eval().requires_grad_(False)
