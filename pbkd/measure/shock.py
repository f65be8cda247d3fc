"""Gradient shock: how far a training moves the features from where they were when it began.

Kozynets & Demkiv (2026) name the phenomenon; pbkd measures it by the gradient's norm at every step (the
training loop's part) and by the similarity of features before and after (here).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pbkd.measure.modes import evaluating

_BATCH = 128


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear centered kernel alignment (Kornblith et al., ICML 2019); 1: alike up to rotation and scale.

    ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of centered X (N, D) and Y (N, D') with a row a sample; computed
    from the (N, N) Gram matrices, in float64. 0 where one of them is constant.
    """
    first, second = _gram(one), _gram(other)
    norms = first.norm() * second.norm()
    return float((first * second).sum() / norms) if norms else 0.0


class FeatureDrift:
    """Linear CKA of the features of `images` now with what they were when this was made.

    Args:
        network: whose modes are left as they are.
        features: what of it gives the features, (N, C, H, W) -> (N, ...).
        images: (N, C, H, W), on the network's device.
    """

    def __init__(self, network: nn.Module, features: Callable[[Tensor], Tensor], images: Tensor) -> None:
        self._network, self._features, self._images = network, features, images
        self._start = self._now()

    def __call__(self) -> dict[str, float]:
        """`feature_cka`."""
        return {"feature_cka": linear_cka(self._start, self._now())}

    def _now(self) -> Tensor:
        with evaluating(self._network), torch.no_grad():
            return torch.cat([self._features(batch).flatten(1) for batch in self._images.split(_BATCH)])


def _gram(features: Tensor) -> Tensor:
    features = features.double()
    features = features - features.mean(0)
    return features @ features.T
