"""`assemble`: put blocks that were trained independently of one another into one network."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Literal, TypeVar

from pbkd.data import DataInfo
from pbkd.networks import AnySpec, BlockNetwork
from pbkd.stages.base import Context, Role, Stage, start_of
from pbkd.students import require_interchangeable

Given = TypeVar("Given")


class Assemble(Stage):
    """Take block K of the input with role `block.K`, for each there is; everything else is that of `from`.

    What `progressive` with `input: teacher` ends in; recipes do not name it.
    """

    kind: Literal["assemble"] = "assemble"

    def plan(self, inputs: Mapping[Role, AnySpec], info: DataInfo) -> AnySpec:
        """`from` with the others' blocks.

        Raises:
            UserError: a block has another interface or receptive field than the one it replaces.
        """
        spec = start = start_of(inputs, info, "the network that is to get the blocks")
        for index, given in _givers(inputs):
            require_interchangeable(start, index, given.blocks[index])
            spec = spec.with_block(index, given.blocks[index])
        return spec

    def run(self, context: Context) -> BlockNetwork:
        """Copy; nothing is trained."""
        network = copy.deepcopy(context.inputs["from"])
        for index, given in _givers(context.inputs):
            network.replace_block(index, given.spec.blocks[index], copy.deepcopy(given.blocks[index]))
        return network


def block_role(block: int) -> Role:
    """The role of the input that gives block number `block` (from 1)."""
    return f"block.{block}"


def _givers(inputs: Mapping[Role, Given]) -> Iterator[tuple[int, Given]]:
    """(index from 0, input) of each input that gives a block."""
    for role, given in inputs.items():
        kind, _, number = role.partition(".")
        if kind == "block":
            yield int(number) - 1, given
