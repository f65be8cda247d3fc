"""Attention transfer (Zagoruyko, Komodakis; ICLR 2017): where the student looks, block by block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def attention_map(feature: Tensor) -> Tensor:
    """Q = normalize(vec(mean_c F^2)): (N, C, H, W) -> (N, H * W), float32, of length 1."""
    return functional.normalize(feature.float().square().mean(1).flatten(1), dim=1)


def attention(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Sum over blocks of mean (Q_s - Q_t)^2, the mean over positions, of each sample.

    Args:
        student: the feature of each block, (N, C, H, W).
        teacher: as many features, of the same heights and widths; channels may differ.

    Returns:
        (N,), float32.
    """
    pairs = zip(student, teacher, strict=True)
    losses = [(attention_map(s) - attention_map(t)).square().mean(1) for s, t in pairs]
    return sum(losses[1:], start=losses[0])
