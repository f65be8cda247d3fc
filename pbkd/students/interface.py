"""Whether a student block can take its teacher block's place: same interface, same receptive field."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from pbkd.errors import UserError
from pbkd.networks.channels import part_name, skeleton
from pbkd.networks.spec import AnySpec, BlockSpec, TracedPart, TracedSpec
from pbkd.students.narrow import narrowed_copy
from pbkd.students.receptive_field import ReceptiveField, receptive_field
from pbkd.students.traced_field import traced_receptive_field

_CURE = "use another width, or keep the teacher block"


class _Outside(NamedTuple):
    """What the rest of the network sees of a block.

    Attributes:
        interface: of our own block the channels it takes and gives; of a foreign one its output's shape.
        fields: receptive fields along height and width; None: not known.
    """

    interface: tuple[int, ...]
    fields: tuple[ReceptiveField, ReceptiveField] | None


def require_interchangeable(network: AnySpec, index: int, student: BlockSpec | TracedPart) -> None:
    """Check that `student` has the interface and receptive field of block `index` (from 0) of `network`.

    That is the structure design criterion of Wang et al., IJCAI 2018 (figure 2). Size, stride and offset of a
    receptive field are in positions of the block's input map. Our own fields follow from the specs; a foreign
    one is followed through the block on the meta device, once for each network, index and spec.

    Where the field of one of two foreign blocks is not known, only the interfaces are compared. A student
    block runs the same graph as its teacher block with fewer channels, and that changes kernels, strides,
    paddings and dilations only if the user's forward derives them from the number of channels.

    Raises:
        UserError: interface or receptive field differ, or the student block's forward fails.
    """
    teacher = _outside(network, index, network.blocks[index])
    found = _outside(network, index, student)
    where = f"network {network.arch}: {_block_name(network, index)} and its student block"
    if teacher.interface != found.interface:
        raise UserError(
            f"{where} have different interfaces: {teacher.interface} and {found.interface}; {_CURE}"
        )
    if teacher.fields and found.fields and teacher.fields != found.fields:
        raise UserError(
            f"{where} have different receptive fields; {_CURE}\n"
            f"teacher block: {_told(teacher.fields)}\n"
            f"student block: {_told(found.fields)}"
        )


def _block_name(network: AnySpec, index: int) -> str:
    return part_name(network, index) if isinstance(network, TracedSpec) else f"block {index + 1}"


def _outside(network: AnySpec, index: int, block: BlockSpec | TracedPart) -> _Outside:
    if isinstance(network, TracedSpec):
        assert isinstance(block, TracedPart)
        return _traced_outside(network, index, block)
    assert isinstance(block, BlockSpec)
    field = receptive_field(block)  # our kernels are square
    return _Outside((block.in_channels, block.out_channels), (field, field))


@lru_cache(maxsize=256)
def _traced_outside(network: TracedSpec, index: int, part: TracedPart) -> _Outside:
    modules, inputs = skeleton(network)
    block: nn.Module = modules.blocks[index]
    if part == network.blocks[index]:
        shape = tuple(inputs[index + 1].shape[1:])
    else:
        block = narrowed_copy(block, part)
        try:
            with torch.no_grad():
                shape = tuple(block(inputs[index]).shape[1:])
        except Exception as error:  # the user's forward may raise anything
            raise UserError(
                f"network {network.arch}: {_block_name(network, index)} fails with so few channels; {_CURE}\n"
                f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            ) from error
    return _Outside(shape, traced_receptive_field(block, inputs[index]))


def _told(fields: tuple[ReceptiveField, ReceptiveField]) -> str:
    return "; ".join(
        f"{along}: size {field.size}, stride {field.stride}, offset {field.start}"
        for along, field in zip(("height", "width"), fields, strict=True)
    )
