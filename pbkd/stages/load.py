"""`load`: a network from given weights; the usual teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator

from pbkd.data import AbsolutePath, DataInfo
from pbkd.errors import UserError
from pbkd.networks import (
    AnyNetworkSettings,
    AnySpec,
    BlockNetwork,
    ForeignSettings,
    TracedSpec,
    architecture,
    load_weights,
)
from pbkd.networks.builders import pretrained_arguments, pretrained_name, pretrained_tensors
from pbkd.networks.equality import BATCHES, require_equal
from pbkd.networks.weights import empty
from pbkd.stages.base import Context, Role, Stage
from pbkd.storage import open_file
from pbkd.weight_files import PART, read_tensors, split_part


class Load(Stage):
    """Build `network` and give it its weights.

    Attributes:
        weights: a safetensors file, or one that torch.save wrote, with pbkd's names, those of public VGGs
            and ResNets, or a foreign network's own. `FILE::key` names one of several sets of weights in it.
        pretrained: instead of a file, the weights that torchvision or timm have for `network`.
    """

    kind: Literal["load"] = "load"
    network: AnyNetworkSettings
    weights: AbsolutePath | None = None
    pretrained: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.pretrained == (self.weights is not None):
            raise ValueError("give weights: FILE.safetensors, or pretrained: true for a library's own")
        return self

    def needs_from(self) -> bool:
        """It starts from a file."""
        return False

    def semantic(self) -> dict[str, Any]:
        """The weights file counts by its content, not by its path; so does the user's own code."""
        settings = super().semantic()
        del settings["pretrained"]
        network = self._network()
        if isinstance(network, ForeignSettings):
            settings["network"]["arguments"] = network.arguments
            if (code := network.code_digest()) is not None:
                settings["code"] = code
        return settings | {"weights": self._identity()}

    def _identity(self) -> str:
        if self.weights is None:
            return pretrained_name(self.network.arch)
        path, part = split_part(self.weights)
        try:
            with open_file(path) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(
                f"weights: {self.weights} cannot be read ({error.strerror}); give a weights file, "
                f"for example stages.teacher.weights=FILE"
            ) from error
        return digest if part is None else f"{digest}{PART}{part}"

    def _network(self) -> AnyNetworkSettings:
        """With the arguments that its pretrained weights need."""
        network = self.network
        if not self.pretrained or not isinstance(network, ForeignSettings):
            return network
        return network.model_copy(
            update={"arguments": pretrained_arguments(network.arch) | network.arguments}
        )

    def plan(self, inputs: Mapping[Role, AnySpec], info: DataInfo) -> AnySpec:
        """The named architecture."""
        return architecture(self._network(), info.input_shape, info.num_classes)

    def run(self, context: Context) -> BlockNetwork:
        """Load; what is made of a foreign network has to compute what the user's own does."""
        network = empty(self.plan({}, context.data.info))
        if self.weights is None:
            source, tensors = f"the weights of {self.network.arch}", pretrained_tensors(self.network.arch)
        else:
            source, tensors = str(self.weights), read_tensors(self.weights, network)
        unused = load_weights(network, tensors, source)
        if isinstance(network.spec, TracedSpec):
            require_equal(network, network.spec, context.images(max(BATCHES)).cpu(), unused)
        return network.eval().requires_grad_(False)
