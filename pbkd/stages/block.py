"""`block`: replace one block by a student block and train it (Wang et al. 2018); `progressive`: all."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from pbkd.data import DataInfo
from pbkd.engine import Task
from pbkd.errors import UserError
from pbkd.networks import AnySpec, BlockNetwork, BlockSpec, TracedPart, TracedSpec, build_block
from pbkd.networks.channels import inner_groups
from pbkd.objectives import Reduction, cross_entropy, local_feature
from pbkd.stages.assemble import Assemble, block_role
from pbkd.stages.base import Context, Role, Stage, TrainingStage, start_of
from pbkd.students import (
    Init,
    StudentSettings,
    initialize_inherit,
    initialize_kaiming,
    initialize_least_squares,
    narrow_block,
    narrowable_blocks,
    narrowed_copy,
    require_interchangeable,
    start_narrowed,
    student_block,
)

Width = Annotated[float, Field(gt=0.0, le=1.0)]
SMOKE_IMAGES = 32


class BlockTraining(TrainingStage):
    """How a student block starts and learns; shared by `block` and `progressive`.

    Attributes:
        projection_norm, projection_relu: what follows the restoring 1x1 convolution (`StudentSettings`); the
            blocks of a foreign network have none, they end as the teacher's do.
        init: where the student block's weights come from (`pbkd.students.initialize`).
        init_images: training images that `least_squares` solves on.
        local_weight: lambda of L = lambda * L_local + CE; the paper does not publish it. The default suits
            `relative` at the default rate: what matters is lambda * rate, about 0.3 (docs/method.md).
        reduction: unit of L_local (`pbkd.objectives.local_feature`).
        input: what the block gets, for training and for its start: the frozen `student` blocks' features (the
            paper), or the `teacher`'s own, which makes the blocks independent of one another; what is behind
            the block is then the teacher's too.
    """

    projection_norm: bool = False
    projection_relu: bool = True
    init: Init = "least_squares"
    init_images: PositiveInt = 512
    local_weight: float = Field(default=30.0, ge=0.0)
    reduction: Reduction = "relative"
    input: Literal["student", "teacher"] = "student"

    def smoke(self) -> Self:
        """A few steps, a few images."""
        return super().smoke().model_copy(update={"init_images": min(self.init_images, SMOKE_IMAGES)})


class Block(BlockTraining):
    """Swap block number `block` (from 1) of the auxiliary network for a student block; train that alone.

    Minimizes L = lambda L_local(s(h), t(h)) + CE(A(x), y): h, the output of the frozen prefix of the
    auxiliary network A (with `input: teacher`, of the teacher with s in the place of t), is the input of the
    student block s and the teacher block t alike.
    """

    kind: Literal["block"] = "block"
    block: PositiveInt
    width: Width = 0.5

    def plan(self, inputs: Mapping[Role, AnySpec], info: DataInfo) -> AnySpec:
        """The auxiliary network with one more student block.

        Raises:
            UserError: there is no such block, it is not the teacher's, or it has no student block with its
                interface and receptive field (`require_interchangeable`).
        """
        auxiliary = start_of(inputs, info, "the network that is to get a student block")
        if self.block > len(auxiliary.blocks):
            raise UserError(f"block {self.block}: {auxiliary.arch} has blocks 1 to {len(auxiliary.blocks)}")
        teacher = inputs.get("teacher", auxiliary)
        if auxiliary.blocks[self.block - 1 : self.block] != teacher.blocks[self.block - 1 : self.block]:
            raise UserError(
                f"block {self.block} is not the teacher's any more; name the teacher it was taken from"
            )
        return auxiliary.with_block(self.block - 1, self._student_of(auxiliary))

    def compares_features(self) -> bool:
        """The student block's with the teacher block's."""
        return True

    def run(self, context: Context) -> BlockNetwork:
        """Start the student block, then train it with everything else frozen."""
        index = self.block - 1
        network = copy.deepcopy(context.inputs["from"]).to(context.session.device)
        teacher = context.inputs.get("teacher", network).to(context.session.device)
        around = network if self.input == "student" else teacher
        prefix, target, suffix = around.prefix(index), around.blocks[index], around.suffix(index)
        spec = self._student_of(network.spec)

        def features() -> tuple[Tensor, Tensor]:
            images = context.images(self.init_images)
            return prefix(images), teacher.prefix(index)(images)

        student: nn.Module
        if isinstance(spec, TracedPart):
            assert isinstance(network.spec, TracedSpec)
            student = narrowed_copy(network.blocks[index], spec)
            groups = inner_groups(network.spec, index)
            start_narrowed(student, target, groups, self.init, features, context.seed)
        else:
            student = build_block(spec).to(context.session.device)
            match self.init:
                case "kaiming":
                    initialize_kaiming(student.cpu(), context.seed)
                case "inherit":
                    initialize_inherit(student.cpu(), target.cpu(), context.seed)
                case "least_squares":
                    initialize_least_squares(student, target, *features(), context.seed)
        network.replace_block(index, spec, student)
        task = Task(
            trained=student,
            objective=partial(_local_and_labels, weight=self.local_weight, reduction=self.reduction),
            prefix=prefix,
            suffix=suffix,
            teacher=target,
            teacher_input="prefix",
        )
        context.train(network, task, self)
        return network

    def _student_of(self, network: AnySpec) -> BlockSpec | TracedPart:
        index = self.block - 1
        student: BlockSpec | TracedPart
        if isinstance(network, TracedSpec):
            student = narrow_block(network, index, self.width)
        else:
            settings = StudentSettings(
                width=self.width, projection_norm=self.projection_norm, projection_relu=self.projection_relu
            )
            student = student_block(network.blocks[index], settings)
        require_interchangeable(network, index, student)
        return student


@dataclass(frozen=True)
class Member:
    """One of the stages that a `progressive` stage stands for.

    Attributes:
        name: within the group.
        stage: its settings.
        inputs: (role, name of another member) of what it takes from the group; None instead of a name: the
            network the whole group starts from.
    """

    name: str
    stage: Stage
    inputs: tuple[tuple[Role, str | None], ...]


class Progressive(BlockTraining):
    """One `block` stage after the other; with `input: teacher` all at once, and `assemble` behind them.

    Attributes:
        blocks: which, numbered from 1; null: all of them, of a foreign network those with channels inside.
        width: share of filters kept, one for all or one per block in the order of `blocks`.
        order: `bottom_up` (the paper's best), `top_down`, or `listed`: as `blocks` has them.
    """

    kind: Literal["progressive"] = "progressive"
    blocks: tuple[PositiveInt, ...] | None = None
    width: Width | tuple[Width, ...] = 0.5
    order: Literal["bottom_up", "top_down", "listed"] = "bottom_up"

    @model_validator(mode="after")
    def _no_block_twice(self) -> Self:
        if self.blocks is not None and len(set(self.blocks)) != len(self.blocks):
            raise ValueError(f"blocks: {list(self.blocks)} names a block twice")
        return self

    def members(self, network: AnySpec | None) -> list[Member]:
        """The stages it stands for and what each starts from; the last one gives the result. See `expand`."""
        blocks = self.expand(network)
        names = [str(block.block) for block in blocks]
        if self.input == "student" or not blocks:
            chain = zip(blocks, names, [None, *names], strict=False)
            return [Member(name, block, (("from", before),)) for block, name, before in chain]
        independent = [
            Member(name, block, (("from", None),)) for block, name in zip(blocks, names, strict=True)
        ]
        roles = ((block_role(block.block), name) for block, name in zip(blocks, names, strict=True))
        joined = Member("assembled", Assemble(teacher=self.teacher), (("from", None), *roles))
        return [*independent, joined]

    def expand(self, network: AnySpec | None) -> list[Block]:
        """The blocks it stands for, in order; `network` is the one they start with, if known.

        Raises:
            UserError: the blocks are not known, or the widths do not fit them.
        """
        blocks = self.blocks
        if blocks is None:
            if network is None:
                raise UserError(
                    "blocks: the network is not known before it was pruned; list the blocks, as [1, 2, 3]"
                )
            blocks = (
                tuple(narrowable_blocks(network))
                if isinstance(network, TracedSpec)
                else tuple(range(1, len(network.blocks) + 1))
            )
        widths = self.width if isinstance(self.width, tuple) else (self.width,) * len(blocks)
        if len(widths) != len(blocks):
            raise UserError(
                f"width: {len(widths)} widths for {len(blocks)} blocks; give one number, or one per block"
            )
        pairs = list(zip(blocks, widths, strict=True))
        if self.order != "listed":
            pairs.sort(reverse=self.order == "top_down")
        shared: dict[str, Any] = self.model_dump(
            by_alias=False, exclude={"kind", "from_", "blocks", "width", "order"}
        )
        return [Block(**shared, block=block, width=width) for block, width in pairs]


def _local_and_labels(
    output: Tensor, logits: Tensor, target: Tensor, labels: Tensor, weight: float, reduction: Reduction
) -> dict[str, Tensor]:
    local, label = local_feature(output, target, reduction), cross_entropy(logits, labels)
    return {"loss": weight * local + label, "local_loss": local, "label_loss": label}
