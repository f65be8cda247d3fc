"""Relational knowledge distillation (Park, Kim, Lu, Cho; CVPR 2019): how samples lie to one another.

Relations are formed among the samples of one worker's share of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

EPSILON = 1e-12


def distance_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-D: smooth L1 between pairwise distances, each divided by its network's mean distance.

    Args:
        student: (N, D).
        teacher: (N, D'); the dimensions may differ.

    Returns:
        (N,), float32: for each sample the mean over its pairs; their mean is the published loss.
    """
    relations = _distances(student.float()), _distances(teacher.float())
    return functional.smooth_l1_loss(*relations, reduction="none").mean(1)


def angle_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD-A: smooth L1 between the cosines of the angles of all triplets of samples.

    Args:
        student: (N, D).
        teacher: (N, D'); the dimensions may differ.

    Returns:
        (N,), float32: for each sample the mean over the triplets it is the vertex of.
    """
    relations = _angles(student.float()), _angles(teacher.float())
    return functional.smooth_l1_loss(*relations, reduction="none").mean((1, 2))


def _distances(features: Tensor) -> Tensor:
    """Distances over their mean, which leaves out what does not lie apart: (N, D) -> (N, N)."""
    squares = (features[:, None] - features[None]).square().sum(2)
    apart = squares > EPSILON
    # The root is taken of what lies apart only: at zero its derivative is infinite.
    distances = torch.where(apart, squares.clamp_min(EPSILON).sqrt(), 0.0)
    return distances * apart.sum() / distances.sum().clamp_min(EPSILON)


def _angles(features: Tensor) -> Tensor:
    """cos(angle j-i-k) at [i, j, k]: (N, D) -> (N, N, N)."""
    directions = functional.normalize(features[None] - features[:, None], dim=2, eps=EPSILON)
    return directions @ directions.transpose(1, 2)
