"""Which channels of a foreign network only go together, on Torch-Pruning's dependency graph."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pbkd.errors import UserError
from pbkd.networks.block_network import BlockNetwork, on_meta
from pbkd.networks.channel_groups import ChannelGroup, Member, removed_by, without
from pbkd.networks.channel_trial import Trial
from pbkd.networks.partition import is_depthwise, original_name
from pbkd.networks.spec import TracedPart, TracedSpec
from pbkd.networks.trace import detach_attributes

MOST_PER_NODE = 50
"""Members of a group, for each operation of a block."""
COMPUTED = "its weights are computed from other tensors, as by weight or spectral norm"
_Judged = tuple[tuple[ChannelGroup, ...], tuple[tuple[str, str], ...]]
"""The groups that can lose channels; layer and reason of those that cannot."""


def inner_groups(spec: TracedSpec, index: int | None) -> tuple[ChannelGroup, ...]:
    """The groups inside block `index` (from 0; None: the classifier), which do not touch its interface.

    Tensors are named as in the original network. Each is tried out: silenced to what reads them, half of its
    channels are removed, which may change nothing.

    Raises:
        UserError: none of the block's passes.
    """
    return _judged(spec, index)[0]


def left_alone(spec: TracedSpec, index: int | None) -> tuple[tuple[str, str], ...]:
    """The layers inside block `index`, as in `inner_groups`, that keep their channels, and why."""
    return _judged(spec, index)[1]


@lru_cache(maxsize=256)
def _judged(spec: TracedSpec, index: int | None) -> _Judged:
    network, inputs = skeleton(spec)
    x = inputs[-1 if index is None else index]
    part = network.classifier if index is None else network.blocks[index]
    where = "classifier" if index is None else f"blocks.{index}"
    names = {name: original_name(f"{where}.{name}") for name in part.state_dict()}
    last = network.classifier[-1] if index is None else None
    return _usable(
        part, x, _Interface.of(part, x, last), names, f"network {spec.arch}: {part_name(spec, index)}"
    )


@lru_cache(maxsize=64)
def all_groups(spec: TracedSpec) -> tuple[ChannelGroup, ...]:
    """The groups of the whole network, blocks' interfaces included, logits left out; see `inner_groups`."""
    network = on_meta(spec).eval()
    x = torch.empty(1, *spec.input_shape, device="meta")
    names = {name: original_name(name) for name in network.state_dict()}
    interface = _Interface(None, None, _layer_of(network.classifier[-1]))
    return _usable(network, x, interface, names, f"network {spec.arch}: it")[0]


def narrowed_spec(spec: TracedSpec, shapes: Mapping[str, tuple[int, ...]]) -> TracedSpec:
    """`spec` with tensors, by their original names, of these shapes."""
    owner = {original_name(name): _part_of(name) for name in skeleton(spec)[0].state_dict()}

    def narrowed(part: TracedPart, which: str) -> TracedPart:
        new = dict(part.shapes) | {name: shape for name, shape in shapes.items() if owner[name] == which}
        return part.model_copy(update={"shapes": tuple(sorted(new.items()))})

    return spec.model_copy(
        update={
            "stem": None if spec.stem is None else narrowed(spec.stem, "stem"),
            "blocks": tuple(narrowed(block, f"blocks.{i}") for i, block in enumerate(spec.blocks)),
            "classifier": narrowed(spec.classifier, "classifier"),
        }
    )


def original_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a partitioned network under the names they have in the original."""
    return {original_name(name): tensor for name, tensor in network.state_dict().items()}


def narrowed_by_count(
    spec: TracedSpec, groups: Sequence[ChannelGroup], left: Callable[[int], float]
) -> TracedSpec:
    """`spec` with, of each group of n channels, the possible number nearest to `left(n)`."""
    tensors = original_tensors(skeleton(spec)[0])
    kept = [group.strongest(torch.zeros(group.size), group.left(left(group.size))) for group in groups]
    narrower = without(tensors, removed_by(groups, kept, tensors))
    return narrowed_spec(spec, {name: tuple(tensor.shape) for name, tensor in narrower.items()})


@lru_cache(maxsize=32)
def skeleton(spec: TracedSpec) -> tuple[BlockNetwork, tuple[Tensor, ...]]:
    """The network on the meta device, not to be changed; what each block and the classifier get."""
    network = on_meta(spec).eval()
    with torch.no_grad():
        inputs = [network.stem(torch.empty(1, *spec.input_shape, device="meta"))]
        for block in network.blocks:
            inputs.append(block(inputs[-1]))
    return network, tuple(inputs)


def _part_of(name: str) -> str:
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "blocks" else first


def part_name(spec: TracedSpec, index: int | None) -> str:
    """Block `index` (from 0; None: the classifier) as users know it, with the module that it ends with."""
    return (
        "its classifier" if index is None else f"block {index + 1}, which ends at '{spec.blocks[index].end}',"
    )


def _layer_of(last: nn.Module) -> nn.Conv2d | nn.Linear:
    (layer,) = (module for module in last.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    return layer


@dataclass(frozen=True)
class _Interface:
    """What stands for the outside of a part: layers around it whose channels are fixed.

    `logits` is the layer inside it whose outputs are.
    """

    entry: nn.Conv2d | None
    exit: nn.Conv2d | None
    logits: nn.Conv2d | nn.Linear | None

    @classmethod
    def of(cls, part: nn.Module, x: Tensor, last: nn.Module | None) -> _Interface:
        """For a part that gets `x`, and ends in the network's `last` layer or in a map."""
        with torch.no_grad():
            outputs = part(x)
        entry = nn.Conv2d(x.shape[1], x.shape[1], 1, bias=False, device="meta")
        if last is not None:
            return cls(entry, None, _layer_of(last))
        return cls(entry, nn.Conv2d(outputs.shape[1], outputs.shape[1], 1, device="meta"), None)


def _usable(
    part: nn.Module, x: Tensor, interface: _Interface, names: Mapping[str, str], what: str
) -> _Judged:
    """The groups of `part` that can be fewer, and what cannot; `names`: of its tensors in the original."""
    try:
        found = list(_found(part, x, interface))
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{what} keeps its channels: it divides, joins or mixes them in a way that cannot be followed\n"
            "it can teach, but not be narrowed; choose network.cuts so that this is in a block of its own"
        ) from error
    trial = Trial(part, x)
    reasons = {
        group.root: None if all(member.tensor in names for member in group.members) else COMPUTED
        for group in found
    }
    stored = [group for group in found if reasons[group.root] is None]
    if stored and trial.objection(stored) is not None:
        reasons |= {group.root: trial.objection([group]) for group in stored}
    usable = [group for group in stored if reasons[group.root] is None]
    if len(usable) < len(stored) and usable and (reason := trial.objection(usable)) is not None:
        reasons, usable = dict.fromkeys(reasons, reason), []
    alone = tuple((_layer(root, names), reason) for root, reason in reasons.items() if reason is not None)
    if found and not usable:
        places = ", ".join(sorted({layer for layer, _ in alone})[:3])
        raise UserError(
            f"{what} keeps its channels: of {places}, {alone[0][1]}\n"
            "it can teach, but not be narrowed; choose network.cuts so that this is in a block of its own"
        )
    return tuple(group.renamed(names) for group in usable), alone


def _layer(tensor: str, names: Mapping[str, str]) -> str:
    """The layer of a tensor of a part, by its name in the original; the tensor may be a computed one."""
    path = tensor.rpartition(".")[0]
    return next(names[name].rpartition(".")[0] for name in names if name.startswith(f"{path}."))


@contextmanager
def _no_endless_groups(most: int) -> Iterator[None]:
    """Raise LookupError from a group without end, as where a tensor is joined with a part of itself."""
    from torch_pruning.dependency import graph

    class Limited(graph.Group):  # type: ignore[misc]  # it declares nothing
        def add_dep(self, *given: Any, **named: Any) -> None:
            if len(self) > most:
                raise LookupError("the group has no end")
            super().add_dep(*given, **named)

    with patch.object(graph, "Group", Limited):
        yield


def _found(part: nn.Module, x: Tensor, interface: _Interface) -> Iterator[ChannelGroup]:
    from torch_pruning import DependencyGraph

    around = [("entry", interface.entry), ("part", part), ("exit", interface.exit)]
    whole = nn.Sequential(OrderedDict((name, module) for name, module in around if module is not None))
    whole.requires_grad_(True)  # the graph is traced through autograd
    graph = DependencyGraph()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # of operations it does not know, which `_usable` tries out
        graph.build_dependency(whole, [x], verbose=False)
    detach_attributes(part)
    outside = {interface.entry, interface.exit} - {None}
    layers = [
        layer
        for layer in part.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer in graph.module2node
    ]
    layers.sort(key=lambda layer: isinstance(layer, nn.Conv2d) and is_depthwise(layer))
    visited: set[Any] = set()
    for layer in layers:
        if layer in visited:
            continue
        size = layer.weight.shape[0]
        pruner = graph.get_pruner_of_module(layer)
        with _no_endless_groups(MOST_PER_NODE * len(graph.module2node)):
            items = list(graph.get_pruning_group(layer, pruner.prune_out_channels, list(range(size))).items)
        outputs = {
            item.dep.target.module for item in items if graph.is_out_channel_pruning_fn(item.dep.handler)
        }
        visited |= outputs
        is_interface = any(item.dep.target.module in outside for item in items) or interface.logits in outputs
        if not is_interface and (group := _group(graph, size, items)) is not None:
            yield group


def _group(graph: Any, size: int, items: Sequence[Any]) -> ChannelGroup | None:
    """Torch-Pruning's group as ours; None if something in it is of a kind that cannot be narrowed here."""
    members: list[Member] = []
    sections = 1
    for item in items:
        module, entries, channels = item.dep.target.module, tuple(item.idxs), tuple(item.root_idxs)
        if isinstance(module, nn.Parameter):
            name = graph._param_to_name[module].removeprefix("part.")  # it tells it nowhere else
            members.append(Member(name, item.dep.target.pruning_dim, entries, channels, "other"))
            continue
        path = graph._module2name.get(module)
        if path is None or not list(module.state_dict()):  # an operation
            continue
        is_output = graph.is_out_channel_pruning_fn(item.dep.handler)
        in_order = entries == channels == tuple(range(size))
        dimension, role = 0, "filter"
        match module:
            case nn.Conv2d(groups=1) | nn.Linear():
                dimension, role = (0, "filter") if is_output else (1, "input")
            case nn.Conv2d() if is_depthwise(module):
                pass
            case nn.Conv2d(groups=groups) if in_order and groups not in (
                module.in_channels,
                module.out_channels,
            ):
                sections = math.lcm(sections, groups)
                if not is_output:
                    each = module.in_channels // groups
                    entries, channels, dimension, role = entries[:each], channels[:each], 1, "input"
            case _NormBase() | nn.PReLU():
                role = "norm"
            case nn.LayerNorm(normalized_shape=(_,), elementwise_affine=True):
                role = "norm"
            case nn.GroupNorm(affine=True, num_groups=groups) if in_order:
                sections, role = math.lcm(sections, groups), "norm"
            case _:
                return None
        whole = ("weight",) if role == "input" else ("weight", "bias", "running_mean", "running_var")
        path = path.removeprefix("part").removeprefix(".")
        members += [
            Member(f"{path}.{tensor}", dimension, entries, channels, role)
            for tensor in whole
            if getattr(module, tensor, None) is not None
        ]
    if size % sections or not members:
        return None
    return ChannelGroup(members[0].tensor, size, sections, tuple(members))
