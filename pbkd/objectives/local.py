"""The local loss of blockwise distillation: the student block's feature against the teacher block's."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Reduction = Literal["frobenius", "mean", "relative"]


def local_feature(student: Tensor, teacher: Tensor, reduction: Reduction) -> Tensor:
    """1/2 ||s - t||_F^2 of each sample (Wang et al., IJCAI 2018, L_local), or the same in another unit.

    Args:
        student: the student block's feature, (N, C, H, W), after its last layer and before any pooling.
        teacher: the teacher block's feature, same shape.
        reduction: `frobenius` as published; `mean`: divided by the number of elements of a sample's feature;
            `relative`: divided by the sample's target energy ||t||_F^2.

    Returns:
        (N,), float32.
    """
    student, teacher = student.float().flatten(1), teacher.float().flatten(1)
    frobenius = 0.5 * (student - teacher).square().sum(1)
    if reduction == "mean":
        return frobenius / student.shape[1]
    if reduction == "relative":
        return frobenius / teacher.square().sum(1).clamp_min(1e-12)
    return frobenius
