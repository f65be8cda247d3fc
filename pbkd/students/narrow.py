"""Student blocks of foreign networks: the teacher's with fewer channels inside, and their first weights."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pbkd.errors import UserError
from pbkd.networks.channel_groups import ChannelGroup, Removed, removed_by, without
from pbkd.networks.channels import inner_groups, narrowed_by_count, part_name
from pbkd.networks.partition import narrow
from pbkd.networks.spec import TracedPart, TracedSpec
from pbkd.networks.weights import initialize_fresh
from pbkd.students.closed_form import MAX_ROWS, regression, set_affine
from pbkd.students.initialize import Init

_ADDITIONS = (torch.add, torch.Tensor.add)


def start_narrowed(
    student: nn.Module,
    teacher: nn.Module,
    groups: Sequence[ChannelGroup],
    init: Init,
    features: Callable[[], tuple[Tensor, Tensor]],
    seed: int,
) -> None:
    """Give the student block of a foreign network the weights it starts with, in place.

    Args:
        student, teacher: the blocks; the teacher's in eval mode.
        groups: the channels inside the teacher's (`inner_groups`).
        init: `kaiming`, `inherit` (the strongest channels), or `least_squares` (`solve`).
        features: gives what student and teacher block get, for `least_squares`.
        seed: of what is random.

    Raises:
        UserError: see `solve`.
    """
    if init == "kaiming":
        initialize_fresh(student.cpu(), seed)
        return
    removed = kept_filters(groups, teacher, student)
    inherit(student, teacher, removed)
    if init == "least_squares":
        assert isinstance(student, fx.GraphModule) and isinstance(teacher, fx.GraphModule)
        solve(student, teacher, removed, *features(), seed)


def narrow_block(spec: TracedSpec, index: int, width: float) -> TracedPart:
    """Block `index` (from 0) of `spec` with the share `width` of every group of channels inside it.

    Raises:
        UserError: there are none, or the block's forward works with no other number of channels.
    """
    groups = inner_groups(spec, index)
    if not groups:
        raise UserError(
            f"{part_name(spec, index)} has no channels inside that could be fewer; leave it out of blocks, "
            "or join it with another by network.cuts"
        )
    narrowed: TracedPart = narrowed_by_count(spec, groups, lambda size: width * size).blocks[index]
    return narrowed


def narrowable_blocks(spec: TracedSpec) -> list[int]:
    """The blocks, from 1, that have channels inside."""
    return [index + 1 for index in range(len(spec.blocks)) if inner_groups(spec, index)]


def narrowed_copy(block: nn.Module, part: TracedPart) -> nn.Module:
    """A copy of a foreign `block` with the shapes of `part`: the leading entries of its tensors."""
    block = copy.deepcopy(block)
    own = block.state_dict()
    narrow(block, {name: shape for name, shape in part.shapes if name in own and own[name].shape != shape})
    return block


def filter_strength(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> Tensor:
    """L1 norm of each filter of the group's root, times the gain of the norm behind it; (channels,)."""
    strength = tensors[group.root].abs().flatten(1).sum(1)
    norms = [
        member for member in group.members if member.role == "norm" and member.tensor.endswith(".weight")
    ]
    for norm in norms[:1]:
        gain = tensors[norm.tensor]
        if gain.dim() == 1 and len(norm.entries) == group.size:
            strength = strength.clone()
            strength[list(norm.channels)] *= gain[list(norm.entries)].abs()
    return strength


def kept_filters(groups: Sequence[ChannelGroup], teacher: nn.Module, student: nn.Module) -> Removed:
    """Which entries of the teacher block's tensors the narrower student does without: the weakest."""
    tensors, narrower = teacher.state_dict(), student.state_dict()
    kept = [
        group.strongest(filter_strength(group, tensors), narrower[group.root].shape[0]) for group in groups
    ]
    return removed_by(groups, kept, tensors)


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module, removed: Removed) -> None:
    """Copy into the student, in place, the teacher's tensors without what is `removed`."""
    tensors = teacher.state_dict()
    student.load_state_dict(tensors | without(tensors, removed))


@dataclass(frozen=True)
class _Chain:
    """A linear map of a block: a layer, perhaps a norm behind it, perhaps a sum that both lead to."""

    layer: fx.Node
    norm: fx.Node | None
    sum: fx.Node | None

    @property
    def end(self) -> fx.Node:
        """Where its output is compared with the teacher's."""
        return self.sum or self.norm or self.layer


@torch.no_grad()
def solve(
    student: fx.GraphModule,
    teacher: fx.GraphModule,
    removed: Removed,
    student_input: Tensor,
    teacher_input: Tensor,
    seed: int,
    ridge: float = 1e-3,
) -> None:
    """Solve the student's linear maps in closed form, in place, in the order in which they are computed.

    The student has inherited the teacher's weights without what is `removed`. Both blocks run side by side;
    each convolution without groups and each linear layer is regressed on the teacher's output, of the
    channels kept, given what the student really sees. Where it is added to something, that sum is the target,
    less what the student adds: so each solution corrects the drift of those before.

    Args:
        student_input, teacher_input: (N, C, H, W), what the blocks get for the same images.
        seed: of the positions that are used where there are more than enough.
        ridge: relative damping.

    Raises:
        UserError: nothing in the block can be solved.
    """
    student.eval()
    chains = {chain.end.name: chain for chain in _chains(student)}
    if not chains:
        raise UserError(
            "init=least_squares: the block has no linear map that could be solved; use init=inherit"
        )
    inputs_of = {chain.layer.name: chain.end.name for chain in chains.values()}
    mine, theirs = _Stepper(student, student_input), _Stepper(teacher, teacher_input)
    waiting: dict[str, Tensor] = {}
    for own, other in zip(student.graph.nodes, teacher.graph.nodes, strict=True):
        theirs.step(other)
        mine.step(own)
        if own.name in inputs_of:
            waiting[inputs_of[own.name]] = mine.values[own.args[0]]
        if (chain := chains.get(own.name)) is not None:
            target = theirs.values[other]
            _solve_chain(mine, chain, waiting.pop(own.name), target, removed, seed, ridge)
        mine.forget(own)
        theirs.forget(other)


def _solve_chain(
    mine: _Stepper,
    chain: _Chain,
    inputs: Tensor,
    target: Tensor,
    removed: Removed,
    seed: int,
    ridge: float,
) -> None:
    layer = mine.module.get_submodule(str(chain.layer.target))
    norm = None if chain.norm is None else mine.module.get_submodule(str(chain.norm.target))
    assert isinstance(layer, nn.Conv2d | nn.Linear) and (norm is None or isinstance(norm, nn.BatchNorm2d))
    if (goes := removed.get((f"{chain.layer.target}.weight", 0))) is not None:
        axis = 1 if isinstance(layer, nn.Conv2d) else -1
        target = target.index_select(axis, (~goes).nonzero()[:, 0].to(target.device))
    target = target - mine.values[chain.end]
    conv, maps, wanted = layer, inputs, target
    if isinstance(layer, nn.Linear):
        conv = nn.Conv2d(layer.in_features, layer.out_features, 1, device="meta")
        maps, wanted = (tensor.movedim(-1, 1).flatten(2).unsqueeze(-1) for tensor in (inputs, target))
    assert isinstance(conv, nn.Conv2d)
    # The change is solved for: where the data leave a direction open, the teacher's weights stay.
    present, offset = _affine_of(layer, norm)
    fitted = regression(maps, wanted, conv, MAX_ROWS, seed)
    if layer.bias is None and norm is None:
        fitted = fitted.through_origin()
    weights, bias = fitted.solve(ridge)
    set_affine(layer, norm, weights + present, bias + offset, inputs)
    for node in (chain.layer, chain.norm, chain.sum):
        if node is chain.layer:
            mine.values[node] = layer(inputs)
        elif node is not None:
            mine.step(node)


def _affine_of(layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Weights (D, O) and bias (O,) of the map that a layer and the norm behind it are, in eval mode."""
    weights = layer.weight.flatten(1).T.double()
    bias = weights.new_zeros(weights.shape[1]) if layer.bias is None else layer.bias.double()
    if norm is None:
        return weights, bias
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return weights * scale, (bias - norm.running_mean.double()) * scale + norm.bias.double()


class _Stepper:
    """Runs a graph node by node and keeps the values that are still needed."""

    def __init__(self, module: fx.GraphModule, x: Tensor) -> None:
        self.module = module
        self.values: dict[Any, Any] = {}
        self._runner = fx.Interpreter(module)
        self._runner.args_iter = iter((x,))
        self._runner.env = self.values
        nodes = list(module.graph.nodes)
        position = {node: index for index, node in enumerate(nodes)}
        self._ends: dict[fx.Node, list[fx.Node]] = {}
        for node in nodes:
            last = max((position[user] for user in node.users), default=position[node])
            self._ends.setdefault(nodes[last], []).append(node)

    def step(self, node: fx.Node) -> None:
        """Compute the value of `node`."""
        if node.op != "output":
            self.values[node] = self._runner.run_node(node)

    def forget(self, node: fx.Node) -> None:
        """Drop what nothing behind `node` needs."""
        for ended in self._ends.get(node, []):
            self.values.pop(ended, None)


def _chains(module: fx.GraphModule) -> list[_Chain]:
    chains = []
    for node in module.graph.nodes:
        layer = _module_of(module, node)
        if not _is_plain(layer):
            continue
        norm = _sole_user(node)
        if norm is not None and not _is_solvable(_module_of(module, norm)):
            norm = None
        total = _sole_user(norm or node)
        if total is not None and not _is_sum(total):
            total = None
        chains.append(_Chain(node, norm, total))
    return chains


def _is_plain(layer: nn.Module | None) -> bool:
    """Whether it is a linear layer or a convolution without groups, and computes nothing but that."""
    if isinstance(layer, nn.Linear):
        return type(layer).forward is nn.Linear.forward
    return (
        isinstance(layer, nn.Conv2d)
        and type(layer).forward is nn.Conv2d.forward
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )


def _is_solvable(norm: nn.Module | None) -> bool:
    """Whether it is a BatchNorm with gains and statistics, and computes nothing but that."""
    return type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats


def _module_of(module: nn.Module, node: fx.Node) -> nn.Module | None:
    return module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _sole_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _is_sum(node: fx.Node) -> bool:
    """Whether it adds two tensors, and nothing else."""
    is_addition = (node.op == "call_function" and node.target in (operator.add, *_ADDITIONS)) or (
        node.op == "call_method" and node.target == "add"
    )
    return is_addition and len(node.all_input_nodes) == 2 and len(node.args) == 2 and not node.kwargs
