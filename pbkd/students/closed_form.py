"""Closed-form least squares for convolutions: statistics of a regression, full and low-rank solution."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pbkd.errors import StageError

ROWS_PER_CHUNK = 1 << 15
MAX_ROWS = 1 << 17
DAMPINGS = 16
"""How often the ridge is made ten times as large: from the least one to more than any variance."""


@dataclass(frozen=True)
class Regression:
    """Ridge regression of targets (R, O) on inputs (R, D): centred second moments, in float64."""

    gram: Tensor  # (D, D)
    cross: Tensor  # (D, O)
    input_mean: Tensor  # (D,)
    target_mean: Tensor  # (O,)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Weights (D, O) and bias (O,); `ridge` is relative to the mean energy of the inputs."""
        weights = self._solve(ridge)
        return weights, self.target_mean - self.input_mean @ weights

    def solve_low_rank(self, rank: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
        """Reduced-rank regression (Izenman 1975): (D, r), (r, O) and bias (O,) of the best rank-r linear map.

        The full solution is projected on the r directions that carry most of the predicted targets' energy.
        """
        weights = self._solve(ridge)
        predicted = weights.T @ self.gram @ weights
        directions = torch.linalg.eigh(predicted).eigenvectors[:, -rank:]
        inner = weights @ directions
        return inner, directions.T, self.target_mean - self.input_mean @ inner @ directions.T

    def through_origin(self) -> Regression:
        """The same for a map without bias."""
        zero_input, zero_target = torch.zeros_like(self.input_mean), torch.zeros_like(self.target_mean)
        return Regression(
            gram=self.gram + torch.outer(self.input_mean, self.input_mean),
            cross=self.cross + torch.outer(self.input_mean, self.target_mean),
            input_mean=zero_input,
            target_mean=zero_target,
        )

    def _solve(self, ridge: float) -> Tensor:
        size = len(self.gram)
        damping = ridge * self.gram.diagonal().mean().clamp_min(1e-12)
        identity = torch.eye(size, dtype=torch.float64, device=self.gram.device)
        # Of an input that is constant, rounding leaves a variance of about nothing, which may be below zero.
        for _ in range(DAMPINGS):
            factor, failed = torch.linalg.cholesky_ex(self.gram + damping * identity)
            if not failed:
                break
            damping = 10 * damping
        else:
            raise StageError("a block cannot be solved for: the features it is given are not finite")
        return torch.cholesky_solve(self.cross, factor)


def regression(inputs: Tensor, targets: Tensor, conv: nn.Conv2d, max_rows: int, seed: int) -> Regression:
    """Statistics of fitting `conv(inputs)` to `targets`.

    Args:
        inputs: (N, C, H, W), what the convolution gets.
        targets: (N, O, H', W'), what it should give.
        conv: its kernel, stride, padding and dilation are used, not its weights.
        max_rows: at most so many output positions are used, evenly many of each image, chosen by `seed`.
        seed: of that choice.
    """
    images, positions = len(inputs), targets.shape[2] * targets.shape[3]
    dimension, outputs = inputs.shape[1] * conv.kernel_size[0] * conv.kernel_size[1], targets.shape[1]
    per_image = min(positions, max(1, max_rows // images))
    generator = torch.Generator().manual_seed(seed)
    gram = inputs.new_zeros(dimension, dimension, dtype=torch.float64)
    cross = inputs.new_zeros(dimension, outputs, dtype=torch.float64)
    input_sum = inputs.new_zeros(dimension, dtype=torch.float64)
    target_sum = inputs.new_zeros(outputs, dtype=torch.float64)
    chunk = max(1, ROWS_PER_CHUNK // positions)
    for start in range(0, images, chunk):
        patches = nn.functional.unfold(
            inputs[start : start + chunk].contiguous(),
            conv.kernel_size,
            conv.dilation,
            conv.padding,  # type: ignore[arg-type]  # our convolutions never pad by name
            conv.stride,
        )
        wanted = targets[start : start + chunk].flatten(2)
        if per_image < positions:
            chosen = torch.randperm(positions, generator=generator)[:per_image]
            patches, wanted = patches[:, :, chosen], wanted[:, :, chosen]
        rows = patches.transpose(1, 2).reshape(-1, dimension)
        values = wanted.transpose(1, 2).reshape(-1, outputs)
        gram += (rows.T @ rows).double()
        cross += (rows.T @ values).double()
        input_sum += rows.sum(0).double()
        target_sum += values.sum(0).double()
    count = images * per_image
    input_mean, target_mean = input_sum / count, target_sum / count
    return Regression(
        gram=gram / count - torch.outer(input_mean, input_mean),
        cross=cross / count - torch.outer(input_mean, target_mean),
        input_mean=input_mean,
        target_mean=target_mean,
    )


def set_affine(
    layer: nn.Conv2d | nn.Linear, norm: nn.BatchNorm2d | None, weights: Tensor, bias: Tensor, inputs: Tensor
) -> None:
    """Make `layer` and the `norm` behind it compute the map that was solved, in place.

    Args:
        layer: its weight becomes `weights` (D, O); without norm its bias, if it has one, becomes `bias` (O,).
        norm: takes the statistics that `layer` has on `inputs`, and undoes itself.
        weights, bias: as `Regression.solve` gives them.
        inputs: what the layer gets.
    """
    layer.weight.copy_(weights.T.reshape(layer.weight.shape))
    if norm is None:
        if layer.bias is not None:
            layer.bias.copy_(bias)
        return
    if layer.bias is not None:
        layer.bias.zero_()
    outputs = layer(inputs)
    assert norm.running_mean is not None and norm.running_var is not None
    variance, mean = torch.var_mean(outputs, (0, 2, 3), correction=0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.copy_((variance + norm.eps).sqrt())
    norm.bias.copy_(mean + bias)


def explaining_channels(activations: Tensor, importance: Tensor, count: int) -> Tensor:
    """The `count` channels that, chosen greedily, explain most of the weighted energy of all channels.

    Column subset selection by pivoted Cholesky: each step takes the channel whose direction accounts for most
    of what the channels chosen so far leave unexplained.

    Args:
        activations: (N, C, H, W), what the following layer sees.
        importance: (C,), weight of each channel's energy, such as the norm of the next layer's filters.
        count: how many channels to choose, at most C.

    Returns:
        Their indices, ascending, int64, shape (count,).
    """
    rows = activations.transpose(0, 1).flatten(1)
    residual = (rows @ rows.T).double() / rows.shape[1]
    weight = importance.double() ** 2
    floor = 1e-9 * residual.diagonal().max().clamp_min(1e-30)
    chosen: list[int] = []
    for _ in range(count):
        energy = residual.diagonal().clamp_min(floor)
        gain = (residual**2 @ weight) / energy
        gain[chosen] = -1.0
        best = int(gain.argmax())
        chosen.append(best)
        column = residual[:, best].clone()
        residual -= torch.outer(column, column) / energy[best]
    return torch.tensor(sorted(chosen))
