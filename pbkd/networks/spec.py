"""An architecture as data: a `BlockNetwork` down to the channels of every convolution, as typed JSON.

The student criterion maps a `BlockSpec` to another one, and pruning reads channel counts back into a spec; so
teachers, students and pruned networks are all built by the same code, from the same kind of description.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, TypeAdapter, model_validator

Count = Annotated[int, Field(ge=0)]
Scalar = bool | int | float | str | None


class Spec(BaseModel):
    """Base of all specs: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ConvSpec(Spec):
    """A convolution with optional BatchNorm and ReLU behind it; square kernels."""

    in_channels: PositiveInt
    out_channels: PositiveInt
    kernel: PositiveInt = 3
    stride: PositiveInt = 1
    padding: Count = 1
    dilation: PositiveInt = 1
    bias: bool = False
    norm: bool = True
    relu: bool = True


class PadShortcut(Spec):
    """ResNet's parameter-free shortcut (option A): subsample, then pad channels with zeros on both sides."""

    in_channels: PositiveInt
    out_channels: PositiveInt
    stride: PositiveInt = 2


class PlainUnit(Spec):
    """Convolutions in a row."""

    kind: Literal["plain"] = "plain"
    layers: tuple[ConvSpec, ...] = Field(min_length=1)


class ResidualUnit(Spec):
    """ReLU(branch(x) + shortcut(x)); `shortcut: null` is the identity."""

    kind: Literal["residual"] = "residual"
    branch: tuple[ConvSpec, ...] = Field(min_length=1)
    shortcut: PadShortcut | ConvSpec | None = None


Unit = Annotated[PlainUnit | ResidualUnit, Field(discriminator="kind")]


class BlockSpec(Spec):
    """A block: units in a row. Its interface is the number of channels it takes and gives."""

    units: tuple[Unit, ...] = Field(min_length=1)

    @property
    def in_channels(self) -> int:
        """Channels of the block's input."""
        return layers_of(self.units[0])[0].in_channels

    @property
    def out_channels(self) -> int:
        """Channels of the block's output."""
        return layers_of(self.units[-1])[-1].out_channels


class PoolSpec(Spec):
    """Max pooling between blocks."""

    kernel: PositiveInt = 2
    stride: PositiveInt = 2
    padding: Count = 0


class StemSpec(Spec):
    """Layers before the first block; they are kept as they are."""

    layers: tuple[ConvSpec, ...] = ()
    pool: PoolSpec | None = None


class ClassifierSpec(Spec):
    """Adaptive average pooling to `pool` x `pool` (0: none), flatten, linear layers; ReLU, dropout between.

    `widths` holds the features from the flattened input to the classes, both included.
    """

    pool: Count = 1
    widths: tuple[PositiveInt, ...] = Field(min_length=2)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)


class WholeSpec(Spec):
    """What all specs of networks have in common. `input_shape` is (channels, height, width)."""

    arch: str
    input_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    blocks: tuple[Any, ...] = Field(min_length=1)

    @property
    def digest(self) -> str:
        """The architecture's sha256, in hex."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def with_block(self, index: int, block: BlockSpec | TracedPart) -> Self:
        """The same network with block `index` (from 0) replaced by another of its kind."""
        blocks = (*self.blocks[:index], block, *self.blocks[index + 1 :])
        return self.model_copy(update={"blocks": blocks})


class NetworkSpec(WholeSpec):
    """A whole network of ours, layer by layer; `poolings[i]` follows block i."""

    stem: StemSpec = StemSpec()
    blocks: tuple[BlockSpec, ...] = Field(min_length=1)
    poolings: tuple[PoolSpec | None, ...]
    classifier: ClassifierSpec

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len(self.poolings) != len(self.blocks):
            raise ValueError(f"{len(self.blocks)} blocks need as many poolings, found {len(self.poolings)}")
        channels = self.stem.layers[-1].out_channels if self.stem.layers else self.input_shape[0]
        for number, block in enumerate(self.blocks, 1):
            if block.in_channels != channels:
                raise ValueError(f"block {number} takes {block.in_channels} channels, but gets {channels}")
            channels = block.out_channels
        return self

    @property
    def num_classes(self) -> int:
        """Classes the classifier tells apart."""
        return self.classifier.widths[-1]


class TracedPart(Spec):
    """A part of a foreign network.

    Attributes:
        end: where it ends: the path of a module, or the name of an operation in the traced graph.
        shapes: (tensor, shape) of the tensors that are narrower than in the original, by their names there.
    """

    end: str
    shapes: tuple[tuple[str, tuple[PositiveInt, ...]], ...] = ()


class TracedSpec(WholeSpec):
    """A network of a library or of the user's: what builds it, where it is cut, what is narrower.

    Attributes:
        arch: `torchvision/NAME`, `timm/NAME` or `package.module:function`.
        arguments: of the builder, beside the classes and the input's shape.
        stem: what comes before the first block; None: nothing.
        blocks: one behind the other.
        classifier: everything behind them.
    """

    form: Literal["traced"] = "traced"
    arguments: tuple[tuple[str, Scalar], ...] = ()
    num_classes: PositiveInt
    stem: TracedPart | None
    blocks: tuple[TracedPart, ...] = Field(min_length=1)
    classifier: TracedPart


AnySpec = NetworkSpec | TracedSpec
_ANY: TypeAdapter[AnySpec] = TypeAdapter(AnySpec)


def read_spec(content: object) -> AnySpec:
    """The spec that a JSON object describes.

    Raises:
        ValidationError: it describes none.
    """
    return _ANY.validate_python(content)


def layers_of(unit: Unit) -> tuple[ConvSpec, ...]:
    """The convolutions of a unit's main path, in order."""
    return unit.branch if isinstance(unit, ResidualUnit) else unit.layers
