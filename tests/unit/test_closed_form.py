"""Least squares for convolutions: exact where an exact answer exists, and no worse than numpy's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pbkd.errors import StageError
from pbkd.students.closed_form import Regression, explaining_channels, regression

TINY = 1e-9  # relative ridge too small to be seen in float32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    st.sampled_from((1, 3, 5)),
    st.sampled_from((1, 2)),
    st.integers(0, 2),
    st.sampled_from((1, 2)),
    st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_the_convolution_that_made_the_targets_is_found(
    kernel: int, stride: int, padding: int, dilation: int, seed: int
) -> None:
    conv = nn.Conv2d(2, 3, kernel, stride, padding, dilation)
    nn.init.normal_(conv.weight, generator=torch.Generator().manual_seed(seed))
    inputs = normal(24, 2, 11, 11, seed=seed)
    with torch.no_grad():
        targets = conv(inputs)
    weights, bias = regression(inputs, targets, conv, 1 << 20, seed).solve(TINY)
    torch.testing.assert_close(
        weights.T.reshape(conv.weight.shape).float(), conv.weight.data, rtol=1e-3, atol=1e-3
    )
    torch.testing.assert_close(
        bias.float(), conv.bias.data if conv.bias is not None else bias, rtol=1e-3, atol=1e-3
    )


def test_solution_is_numpys_where_no_exact_one_exists() -> None:
    inputs, targets = normal(40, 3, 5, 5), normal(40, 4, 5, 5, seed=1)
    conv = nn.Conv2d(3, 4, 1)
    weights, bias = regression(inputs, targets, conv, 1 << 20, 0).solve(TINY)
    rows = inputs.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
    values = targets.permute(0, 2, 3, 1).reshape(-1, 4).double().numpy()
    expected = np.linalg.lstsq(np.c_[rows, np.ones(len(rows))], values)[0]
    np.testing.assert_allclose(torch.cat([weights, bias[None]]).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_low_rank_solution_is_the_best_of_its_rank(rank: int) -> None:
    """Reduced-rank regression has the truncated SVD of the fitted values as its optimum."""
    inputs, targets = normal(60, 5, 4, 4), normal(60, 4, 4, 4, seed=1) + normal(60, 4, 4, 4)[:, :1]
    statistics = regression(inputs, targets, nn.Conv2d(5, 4, 1), 1 << 20, 0)
    inner, outer, bias = statistics.solve_low_rank(rank, TINY)
    assert (inner.shape, outer.shape) == ((5, rank), (rank, 4))
    rows = inputs.permute(0, 2, 3, 1).reshape(-1, 5).double()
    values = targets.permute(0, 2, 3, 1).reshape(-1, 4).double()
    found = (values - rows @ inner @ outer - bias).square().sum()
    full_weights, full_bias = statistics.solve(TINY)
    fitted = rows @ full_weights
    fitted = fitted - fitted.mean(0)
    lost = torch.linalg.svdvals(fitted)[rank:].square().sum()
    best = (values - rows @ full_weights - full_bias).square().sum() + lost
    assert found.item() == pytest.approx(best.item(), rel=1e-6)


def test_fewer_rows_than_positions_are_drawn_from_the_seed() -> None:
    inputs, targets, conv = normal(8, 2, 9, 9), normal(8, 3, 9, 9, seed=1), nn.Conv2d(2, 3, 3, padding=1)
    first, again, other = (regression(inputs, targets, conv, 80, seed).cross for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_dead_inputs_do_not_break_the_solution() -> None:
    inputs, targets = torch.zeros(6, 2, 5, 5), normal(6, 3, 5, 5)
    weights, bias = regression(inputs, targets, nn.Conv2d(2, 3, 3, padding=1), 1 << 20, 0).solve(1e-3)
    assert weights.abs().max() == 0.0
    torch.testing.assert_close(bias, targets.double().mean((0, 2, 3)))


def test_constant_inputs_whose_variance_is_rounded_below_zero_are_solved() -> None:
    one = torch.ones(1, dtype=torch.float64)
    constant = Regression(
        gram=-4e-7 * one[None], cross=-4e-7 * one[None], input_mean=one, target_mean=2 * one
    )
    weights, bias = constant.solve(1e-3)
    torch.testing.assert_close(weights[0] + bias, 2 * one)  # what it gives for that constant
    with pytest.raises(StageError, match="not finite"):
        Regression(gram=torch.nan * one[None], cross=one[None], input_mean=one, target_mean=one).solve(1e-3)


def test_explaining_channels_pass_over_copies() -> None:
    signal = normal(30, 3, 4, 4)
    activations = torch.stack(
        [signal[:, 0], signal[:, 0] * 2, signal[:, 1], signal[:, 0] + 1e-3, signal[:, 2]], 1
    )
    chosen = explaining_channels(activations, torch.ones(5), 3).tolist()
    assert chosen == sorted(chosen)
    assert {2, 4} < set(chosen), "of the three alike, one is enough"
    assert explaining_channels(activations, torch.ones(5), 5).tolist() == [0, 1, 2, 3, 4]


def test_explaining_channels_prefer_what_the_next_layer_uses() -> None:
    activations = normal(50, 3, 4, 4)
    assert explaining_channels(activations, torch.tensor([0.1, 5.0, 0.1]), 1).tolist() == [1]
    assert explaining_channels(torch.zeros(4, 3, 2, 2), torch.ones(3), 2).unique().numel() == 2
