"""What `pbkd inspect` shows: the blocks of a network, what they cost, and what students of them would."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from pbkd.errors import UserError
from pbkd.measure import Cost, count, measure_latency
from pbkd.networks import (
    AnySpec,
    BlockNetwork,
    BlockSpec,
    TracedSpec,
    architecture,
    build_block,
    cost_of,
    fresh,
    on_meta,
    settings_of,
)
from pbkd.networks.builders import is_foreign
from pbkd.networks.channels import left_alone
from pbkd.networks.equality import require_exact
from pbkd.networks.zoo import CIFAR_DEPTHS
from pbkd.students import (
    StudentSettings,
    narrow_block,
    narrowed_copy,
    receptive_field,
    require_interchangeable,
    student_block,
    traced_receptive_field,
)

WARM_UP, REPEATS = 2, 10


@dataclass
class Part:
    """A block, or what is before and behind the blocks.

    Attributes:
        name: where it ends in a foreign network; `block 1`, ... in ours.
        output_shape: without the batch.
        receptive_field: pixels of its input along a side that one output sees; None: not known.
        cost: of it alone.
        latency_ms: of it alone, batch of 1; None: not measured.
        students: the width -> the cost of the student block, or why there is none.
    """

    name: str
    output_shape: tuple[int, ...]
    receptive_field: int | None
    cost: Cost
    latency_ms: float | None = None
    students: dict[float, Cost | str] = field(default_factory=dict)


@dataclass
class Inspection:
    """A network as it is partitioned, which computes what the original does.

    Attributes:
        left_alone: of each block the layers that keep their channels in a student, and why.
    """

    spec: AnySpec
    cost: Cost
    stem: Part
    blocks: list[Part]
    classifier: Part
    left_alone: list[tuple[tuple[str, str], ...]]

    @property
    def parts(self) -> list[Part]:
        """All of them, in order."""
        return [self.stem, *self.blocks, self.classifier]

    def as_json(self) -> dict[str, Any]:
        """For machines."""

        def row(part: Part) -> dict[str, Any]:
            return {
                "name": part.name,
                "output_shape": list(part.output_shape),
                "receptive_field": part.receptive_field,
                "params": part.cost.params,
                "macs": part.cost.macs,
                "latency_ms": part.latency_ms,
                "students": [
                    {"width": width, "params": None, "macs": None, "reason": found}
                    if isinstance(found, str)
                    else {"width": width, "params": found.params, "macs": found.macs, "reason": None}
                    for width, found in part.students.items()
                ],
            }

        return {
            "arch": self.spec.arch,
            "exact": True,  # or it would have been refused
            "input_shape": list(self.spec.input_shape),
            "classes": self.spec.num_classes,
            "params": self.cost.params,
            "macs": self.cost.macs,
            "stem": row(self.stem),
            "blocks": [
                row(part) | {"left_alone": [{"layer": layer, "reason": reason} for layer, reason in alone]}
                for part, alone in zip(self.blocks, self.left_alone, strict=True)
            ],
            "classifier": row(self.classifier),
        }


def inspect_network(
    arch: str,
    input_size: int | None = None,
    classes: int | None = None,
    cuts: Sequence[str] | None = None,
    widths: Sequence[float] = (0.5,),
    latency: bool = False,
    channels: int = 3,
) -> Inspection:
    """Partition the network that `arch` names, and count its parts on the meta device.

    Args:
        arch: as in a recipe's `network.arch`.
        input_size: height and width of its images; default 224, for our CIFAR ResNets 32.
        classes: default 1000, for our CIFAR ResNets 10.
        cuts: where its blocks end; foreign networks only.
        widths: of student blocks to count.
        latency: measure each part, which allocates the network.
        channels: of its images.

    Raises:
        UserError: the network is unknown or cannot be partitioned, or computes something else then; or it is
            one of ours and cuts are given.
    """
    is_small = arch in {f"resnet{depth}" for depth in CIFAR_DEPTHS}
    size, number = input_size or (32 if is_small else 224), classes or (10 if is_small else 1000)
    if cuts is not None and not is_foreign(arch):
        raise UserError(f"--cuts: {arch} is one of ours, whose blocks are given; leave it out")
    settings = settings_of(arch, **({} if cuts is None else {"cuts": tuple(cuts)}))
    spec = architecture(settings, (channels, size, size), number)
    network = on_meta(spec).eval()
    inputs = _inputs(network)
    blocks = [_block(spec, network, index, inputs[index]) for index in range(len(network.blocks))]
    for index, part in enumerate(blocks):
        for width in widths:
            part.students[width] = _student_cost(network, index, width, inputs[index])
    image = torch.empty(1, *spec.input_shape, device="meta")
    stem = Part("stem", _shape(network.stem(image)), None, count(network.stem, spec.input_shape))
    cost = count(network.classifier, _shape(inputs[-1]))
    classifier = Part("classifier", (spec.num_classes,), None, cost)
    if isinstance(spec, TracedSpec):
        require_exact(spec)
    alone = [_left_alone(spec, index) for index in range(len(blocks))]
    found = Inspection(spec, cost_of(spec), stem, blocks, classifier, alone)
    if latency:
        _measure(found, [spec.input_shape, *map(_shape, inputs)])
    return found


def _left_alone(spec: AnySpec, index: int) -> tuple[tuple[str, str], ...]:
    if not isinstance(spec, TracedSpec):
        return ()
    with suppress(UserError):  # then there is no student, which says why
        return left_alone(spec, index)
    return ()


@torch.no_grad()
def _inputs(network: BlockNetwork) -> list[Tensor]:
    """What each block, and behind them the classifier, gets of one image; on meta."""
    image = torch.empty(1, *network.spec.input_shape, device="meta")
    inputs = [cast(Tensor, network.stem(image))]
    for block, pool in zip(network.blocks, network.poolings, strict=True):
        inputs.append(pool(block(inputs[-1])))
    return inputs


@torch.no_grad()
def _block(spec: AnySpec, network: BlockNetwork, index: int, x: Tensor) -> Part:
    given, block = spec.blocks[index], network.blocks[index]
    if isinstance(given, BlockSpec):
        name, seen = f"block {index + 1}", [receptive_field(given)]
    else:
        name = given.end
        seen = list(traced_receptive_field(block, x) or ())
    size = max((field.size for field in seen), default=None)
    return Part(name, _shape(block(x)), size, count(block, _shape(x)))


def _student_cost(network: BlockNetwork, index: int, width: float, x: Tensor) -> Cost | str:
    """That of the student block alone, or why there is none."""
    spec = network.spec
    try:
        if isinstance(spec, TracedSpec):
            part = narrow_block(spec, index, width)
            require_interchangeable(spec, index, part)
            student = narrowed_copy(network.blocks[index], part)
        else:
            block = student_block(spec.blocks[index], StudentSettings(width=width))
            require_interchangeable(spec, index, block)
            with torch.device("meta"):
                student = build_block(block)
    except UserError as error:
        return str(error)
    return count(student, _shape(x))


def _measure(found: Inspection, shapes: Sequence[tuple[int, ...]]) -> None:
    network = fresh(found.spec, 0).eval().requires_grad_(False)
    modules = [network.stem, *network.blocks, network.classifier]
    for part, module, shape in zip(found.parts, modules, shapes, strict=True):
        part.latency_ms = measure_latency(
            module, shape, warm_up=WARM_UP, repeats=REPEATS, seconds=0.1
        ).median_ms


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape[1:])
