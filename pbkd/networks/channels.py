"""Which channels of a foreign network only go together, on Torch-Pruning's dependency graph."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pbkd.errors import UserError
from pbkd.networks.block_network import BlockNetwork, on_meta
from pbkd.networks.partition import (
    count_channels,
    is_depthwise,
    original_name,
    replace_tensor,
    with_memory,
)
from pbkd.networks.spec import TracedPart, TracedSpec

ROUNDING = 1e-9
SMALL_SIDES = (8, 16, 32)
"""Of maps on which it is tried out what goes together."""
Removed = Mapping[tuple[str, int], Tensor]
"""By (tensor, dimension): which of its entries go, bool."""


_Judged = tuple[tuple["ChannelGroup", ...], tuple[tuple[str, str], ...]]
"""What can be fewer, and of what cannot the layer and the reason."""


@dataclass(frozen=True)
class Member:
    """A dimension of a tensor that loses entries with a group: entry `entries[i]` with channel `channels[i]`.

    `role` tells a layer's `filter` (its output channels), its `input` channels and a `norm`'s gains apart.
    """

    tensor: str
    dimension: int
    entries: tuple[int, ...]
    channels: tuple[int, ...]
    role: str


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that only go together with what is coupled to them.

    Attributes:
        root: the tensor whose filters they are.
        size: how many there are.
        sections: so many equal sections, each of which must keep as many as the others, at the same places
            (grouped convolutions and norms).
        members: everything that is coupled, the root first.
    """

    root: str
    size: int
    sections: int
    members: tuple[Member, ...]

    def strongest(self, scores: Tensor, left: int) -> Tensor:
        """The indices, ascending, of the `left` channels of highest score, `sections` regarded."""
        summed = scores.view(self.sections, -1).sum(0)
        places = summed.argsort(descending=True, stable=True)[: left // self.sections].sort().values
        return torch.cat([places + start for start in range(0, self.size, self.size // self.sections)])

    def renamed(self, names: Mapping[str, str]) -> ChannelGroup:
        """The same with tensors under other names."""
        members = tuple(replace(member, tensor=names[member.tensor]) for member in self.members)
        return replace(self, root=names[self.root], members=members)

    def left(self, wanted: float) -> int:
        """The nearest number of channels to `wanted` that can be left."""
        return min(self.size, max(self.sections, round(wanted / self.sections) * self.sections))


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


def removed_by(
    groups: Sequence[ChannelGroup], kept: Sequence[Tensor], tensors: Mapping[str, Tensor]
) -> Removed:
    """What goes if of each of `groups` only the channels `kept` (indices) stay; `tensors`: their shapes."""
    removed: dict[tuple[str, int], Tensor] = {}
    for group, indices in zip(groups, kept, strict=True):
        goes = torch.ones(group.size, dtype=torch.bool)
        goes[indices.cpu()] = False
        for member in group.members:
            key = member.tensor, member.dimension
            size = tensors[member.tensor].shape[member.dimension]
            entries = removed.setdefault(key, torch.zeros(size, dtype=torch.bool))
            entries[list(member.entries)] |= goes[list(member.channels)]
    return {key: entries for key, entries in removed.items() if bool(entries.any())}


def without(tensors: Mapping[str, Tensor], removed: Removed) -> dict[str, Tensor]:
    """Those of `tensors` that lose entries, without them."""
    narrower: dict[str, Tensor] = {}
    for (name, dimension), entries in removed.items():
        tensor = narrower.get(name, tensors[name])
        stay = (~entries).nonzero()[:, 0].to(tensor.device)
        narrower[name] = tensor.index_select(dimension, stay)
    return narrower


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
            f"{what} mixes its channels in a way that Torch-Pruning cannot follow ({error}); "
            "it can teach, but not be narrowed"
        ) from error
    trial = _Trial(part, x)
    reason = trial.objection(found) if found else None
    reasons = {} if reason is None else {group.root: trial.objection([group]) for group in found}
    usable = [group for group in found if reasons.get(group.root) is None]
    alone = tuple(
        (names[root].rpartition(".")[0], reason) for root, reason in reasons.items() if reason is not None
    )
    if found and (not usable or (alone and trial.objection(usable) is not None)):
        places = ", ".join(sorted({names[group.root].rpartition(".")[0] for group in found})[:3])
        raise UserError(
            f"{what} keeps its channels: of {places}, {reason}\n"
            "it can teach, but not be narrowed; choose network.cuts so that this is in a block of its own"
        )
    return tuple(group.renamed(names) for group in usable), alone


class _Trial:
    """A part with random values in float64: what reads channels no more must not miss them either."""

    def __init__(self, part: nn.Module, x: Tensor) -> None:
        """`part` is on the meta device, and so is its input `x`; neither is changed."""
        generator = torch.Generator().manual_seed(0)
        self._part = with_memory(copy.deepcopy(part).double()).eval().requires_grad_(False)
        for tensor in (*self._part.parameters(), *self._part.buffers()):
            if tensor.is_floating_point():
                fan_in = tensor[0].numel() if tensor.dim() > 1 else 0
                values = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.copy_((2 * values - 1) * (3.0 / fan_in) ** 0.5 if fan_in else values + 0.5)
        for name, module in list(self._part.named_modules()):
            if isinstance(module, nn.GroupNorm | nn.LayerNorm) and module.weight is not None:
                self._part.set_submodule(name, _Affine(module))  # its statistics are of all channels
        self._x = torch.randn(2, *_small(part, x), generator=generator, dtype=torch.float64)

    def objection(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Why half of each of `groups` cannot go; None: removed they change no more than silenced."""
        tensors, indices = self._part.state_dict(), torch.Generator().manual_seed(1)
        kept = [
            group.strongest(torch.rand(group.size, generator=indices), group.left(group.size / 2))
            for group in groups
        ]
        silent = copy.deepcopy(self._part)
        for group, stay in zip(groups, kept, strict=True):
            readers = replace(group, members=tuple(m for m in group.members if m.role == "input"))
            for (name, dimension), entries in removed_by([readers], [stay], tensors).items():
                silent.get_parameter(name).movedim(dimension, 0)[entries] = 0.0
        expected = silent(self._x)
        try:
            with redirect_stderr(io.StringIO()):  # where torch.fx explains what failed
                found = _narrowed(self._part, groups, kept)(self._x)
        except Exception:  # noqa: BLE001  # the user's forward may raise anything
            return "its forward counts on their number: let it read that from its input's shape"
        if found.shape != expected.shape:
            return "its forward counts on their number: let it read that from its input's shape"
        if not bool((found - expected).abs().max() <= ROUNDING * expected.abs().max()):
            return (
                "others change when some are removed, as behind a shuffle, a padding or a norm over channels"
            )
        return None


class _Affine(nn.Module):
    """A norm without its statistics, so that each channel depends on itself alone."""

    def __init__(self, norm: nn.GroupNorm | nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)
        self.is_last = type(norm) is nn.LayerNorm  # timm's own are of maps, or of both

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        shape = [1] * x.dim()
        shape[-1 if self.is_last or x.shape[1] != len(self.weight) else 1] = -1
        x = x * self.weight.view(shape)
        return x if self.bias is None else x + self.bias.view(shape)


def _small(part: nn.Module, x: Tensor) -> tuple[int, ...]:
    """The shape (C, H, W) of a smaller map on which `part` works too, if there is one."""
    channels, *sides = x.shape[1:]
    for most in SMALL_SIDES:
        shape = (channels, *(min(side, most) for side in sides))
        with suppress(Exception), torch.no_grad(), redirect_stderr(io.StringIO()):
            part(torch.empty(2, *shape, device="meta"))
            return shape
    return tuple(x.shape[1:])


def _narrowed(part: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[Tensor]) -> nn.Module:
    part = copy.deepcopy(part)
    tensors = part.state_dict()
    owners = []
    for name, tensor in without(tensors, removed_by(groups, kept, tensors)).items():
        path, _, leaf = name.rpartition(".")
        owners.append(part.get_submodule(path))
        replace_tensor(owners[-1], leaf, tensor)
    for owner in dict.fromkeys(owners):
        count_channels(owner)
    return part


def _found(part: nn.Module, x: Tensor, interface: _Interface) -> Iterator[ChannelGroup]:
    from torch_pruning import DependencyGraph

    around = [("entry", interface.entry), ("part", part), ("exit", interface.exit)]
    whole = nn.Sequential(OrderedDict((name, module) for name, module in around if module is not None))
    whole.requires_grad_(True)  # the graph is traced through autograd
    graph = DependencyGraph()
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # of operations it does not know, which `_usable` tries out
        graph.build_dependency(whole, [x], verbose=False)
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
