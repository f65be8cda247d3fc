"""What a student block is: the structure criterion of blockwise distillation (Wang et al., IJCAI 2018).

Every convolution keeps its kernel, stride, padding and dilation and loses a share of its filters; a 1x1
convolution restores the block's output channels. The receptive field stays what it was, which
`pbkd.students.interface` checks before anything is trained.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from pbkd.errors import UserError
from pbkd.networks.spec import BlockSpec, ConvSpec, PlainUnit, ResidualUnit, Unit


class StudentSettings(BaseModel):
    """How a student block is derived from its teacher block.

    Attributes:
        width: share of the filters each convolution keeps, in (0, 1]; the paper's is 0.5.
        projection_norm: BatchNorm behind the restoring 1x1 convolution (the paper does not say; default no).
        projection_relu: ReLU behind it where the teacher's layer ends in one (default yes). In a residual
            unit the ReLU behind the addition is always kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: float = Field(default=0.5, gt=0.0, le=1.0)
    projection_norm: bool = False
    projection_relu: bool = True


def student_block(teacher: BlockSpec, settings: StudentSettings) -> BlockSpec:
    """The student block for a teacher block: same interface, same receptive field, fewer filters.

    Raises:
        UserError: the width leaves a convolution without filters.
    """
    return BlockSpec(units=tuple(_student_unit(unit, settings) for unit in teacher.units))


def _student_unit(unit: Unit, settings: StudentSettings) -> Unit:
    if isinstance(unit, ResidualUnit):
        return unit.model_copy(update={"branch": _student_branch(unit.branch, settings)})
    layers = _narrowed(unit.layers, settings.width)
    end = unit.layers[-1]
    relu = end.relu and settings.projection_relu
    return PlainUnit(layers=(*layers, _projection(layers[-1].out_channels, end.out_channels, relu, settings)))


def _student_branch(branch: tuple[ConvSpec, ...], settings: StudentSettings) -> tuple[ConvSpec, ...]:
    *before, end = branch
    restores = bool(before) and (end.kernel, end.stride, end.padding) == (1, 1, 0)
    # A bottleneck already ends in the 1x1 convolution that restores the channels.
    layers = _narrowed(tuple(before) if restores else branch, settings.width)
    return (*layers, _projection(layers[-1].out_channels, end.out_channels, False, settings))


def _narrowed(layers: tuple[ConvSpec, ...], width: float) -> tuple[ConvSpec, ...]:
    narrowed, channels = [], layers[0].in_channels
    for layer in layers:
        out = round(width * layer.out_channels)
        if out < 1:
            raise UserError(
                f"width={width:g} leaves a convolution of {layer.out_channels} filters without any; "
                f"take at least {1 / layer.out_channels:.3g}"
            )
        narrowed.append(layer.model_copy(update={"in_channels": channels, "out_channels": out}))
        channels = out
    return tuple(narrowed)


def _projection(channels: int, out: int, relu: bool, settings: StudentSettings) -> ConvSpec:
    norm = settings.projection_norm
    return ConvSpec(
        in_channels=channels, out_channels=out, kernel=1, padding=0, bias=not norm, norm=norm, relu=relu
    )
