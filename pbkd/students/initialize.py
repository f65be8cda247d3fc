"""The weights a student block starts with: fresh, inherited from the teacher, or solved in closed form.

`least_squares` is pbkd's own: layer by layer, the student's filters are regressed on the teacher's
activations, given what the student really sees, so that each layer corrects the drift of those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pbkd.networks.block_network import ConvLayer, Residual, path_of
from pbkd.networks.weights import initialize_fresh
from pbkd.students.closed_form import MAX_ROWS, explaining_channels, regression, set_affine

Init = Literal["kaiming", "inherit", "least_squares"]


def initialize_kaiming(student: nn.Module, seed: int) -> None:
    """Fresh weights (He et al. 2015), in place; numbers depend on `seed` and shapes alone."""
    initialize_fresh(student, seed)


def initialize_inherit(student: nn.Module, teacher: nn.Module, seed: int) -> None:
    """Copy into the student, in place, the teacher's filters of largest L1 norm times BatchNorm gain.

    The restoring 1x1 convolution passes the kept channels through and leaves the others zero.
    """
    initialize_fresh(student, seed)
    for student_unit, teacher_unit in zip(student.children(), teacher.children(), strict=True):
        _inherit_shortcut(student_unit, teacher_unit)
        given, (*inner, projection) = path_of(teacher_unit), path_of(student_unit)
        kept: Tensor | None = None
        for old, new in zip(given, inner, strict=False):
            kept = _inherit_layer(new, old, kept)
        if len(given) > len(inner):  # a bottleneck's own last 1x1 convolution restores the channels
            _inherit_layer(projection, given[-1], kept)
        elif kept is not None:
            with torch.no_grad():
                projection.conv.weight.zero_()
                projection.conv.weight[kept, torch.arange(len(kept)), 0, 0] = 1.0


@torch.no_grad()
def initialize_least_squares(
    student: nn.Module,
    teacher: nn.Module,
    student_input: Tensor,
    teacher_input: Tensor,
    seed: int,
    ridge: float = 1e-3,
) -> None:
    """Solve the student block's weights in closed form, in place, so that it gives the teacher's feature.

    Args:
        student: the student block, or the teacher's block with fewer channels inside; what is not solved (its
            shortcuts) is copied from the teacher.
        teacher: the block it replaces, in eval mode.
        student_input: (N, C, H, W), what the student block gets from the student prefix.
        teacher_input: (N, C, H, W), what the block gets in the original teacher, for the same images.
        seed: of the positions that are used where there are more than enough.
        ridge: relative damping of each regression.
    """
    student.eval()
    for number, (student_unit, teacher_unit) in enumerate(
        zip(student.children(), teacher.children(), strict=True)
    ):
        _inherit_shortcut(student_unit, teacher_unit)
        if isinstance(teacher_unit, Residual):
            sums = teacher_unit.branch(teacher_input) + teacher_unit.shortcut(teacher_input)
            target = sums - cast(Residual, student_unit).shortcut(student_input)
        elif len(path_of(student_unit)) > len(path_of(teacher_unit)):  # behind a 1x1 convolution of its own
            target = teacher_unit(teacher_input)
        else:
            *before, last = path_of(teacher_unit)
            target = _without_relu(last, nn.Sequential(*before)(teacher_input))
        _solve_path(
            path_of(student_unit),
            path_of(teacher_unit),
            student_input,
            teacher_input,
            target,
            seed + number,
            ridge,
        )
        student_input, teacher_input = student_unit(student_input), teacher_unit(teacher_input)


def _solve_path(
    student: Sequence[ConvLayer],
    teacher: Sequence[ConvLayer],
    student_input: Tensor,
    teacher_input: Tensor,
    target: Tensor,
    seed: int,
    ridge: float,
) -> None:
    """Solve the layers of one path; the last one, which restores the channels, against `target`."""
    *layers, projection = student
    for position, (new, old) in enumerate(zip(layers, teacher, strict=False)):
        if new is layers[-1] and not hasattr(new, "relu"):
            _solve_last_two(new, projection, student_input, target, seed, ridge)
            return
        teacher_input = _without_relu(old, teacher_input)
        following = teacher[position + 1] if position + 1 < len(teacher) else None
        activation = teacher_input.relu() if hasattr(old, "relu") else teacher_input
        importance = (
            torch.ones(old.conv.out_channels, device=activation.device)
            if following is None
            else following.conv.weight.pow(2).sum((0, 2, 3)).sqrt()
        )
        kept = explaining_channels(activation, importance, new.conv.out_channels)
        fitted = regression(student_input, teacher_input[:, kept], new.conv, MAX_ROWS, seed)
        weights, bias = fitted.solve(ridge)
        _set_layer(new, weights, bias, student_input)
        student_input, teacher_input = new(student_input), activation
    weights, bias = regression(student_input, target, projection.conv, MAX_ROWS, seed).solve(ridge)
    _set_layer(projection, weights, bias, student_input)


def _solve_last_two(
    layer: ConvLayer, projection: ConvLayer, inputs: Tensor, target: Tensor, seed: int, ridge: float
) -> None:
    """A convolution and the 1x1 behind it, no ReLU between, are one low-rank map: solve them together."""
    rank = layer.conv.out_channels
    inner, outer, bias = regression(inputs, target, layer.conv, MAX_ROWS, seed).solve_low_rank(rank, ridge)
    _set_layer(layer, inner, bias.new_zeros(rank), inputs)
    _set_layer(projection, outer, bias, layer(inputs))


def _set_layer(layer: ConvLayer, weights: Tensor, bias: Tensor, inputs: Tensor) -> None:
    """Make `layer` compute conv(x) + bias; its BatchNorm takes the statistics of `inputs`."""
    set_affine(layer.conv, layer.norm if hasattr(layer, "norm") else None, weights, bias, inputs)


def _without_relu(layer: ConvLayer, x: Tensor) -> Tensor:
    x = layer.conv(x)
    return layer.norm(x) if hasattr(layer, "norm") else x


@torch.no_grad()
def _inherit_shortcut(student: nn.Module, teacher: nn.Module) -> None:
    if isinstance(student, Residual) and isinstance(teacher, Residual):
        student.shortcut.load_state_dict(teacher.shortcut.state_dict())


@torch.no_grad()
def _inherit_layer(new: ConvLayer, old: ConvLayer, inputs: Tensor | None) -> Tensor:
    """Copy the strongest filters of `old`, cut to the input channels `inputs`; their indices, ascending."""
    strength = old.conv.weight.abs().sum((1, 2, 3))
    if hasattr(old, "norm"):
        strength = strength * old.norm.weight.abs()
    kept = strength.topk(new.conv.out_channels).indices.sort().values
    folded = hasattr(old, "norm") and not hasattr(new, "norm")  # a bias where the teacher has a BatchNorm
    conv = fuse_conv_bn_eval(old.conv, old.norm) if folded else old.conv
    weight = conv.weight[kept]
    new.conv.weight.copy_(weight if inputs is None else weight[:, inputs])
    if new.conv.bias is not None and conv.bias is not None:
        new.conv.bias.copy_(conv.bias[kept])
    if hasattr(new, "norm"):
        state = old.norm.state_dict()
        new.norm.load_state_dict(
            {name: value[kept] if value.dim() else value for name, value in state.items()}
        )
    return kept
