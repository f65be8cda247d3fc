"""What a stage minimizes: pure functions of tensors that give one value per sample, shape (N,)."""

from pbkd.objectives.hinton import cross_entropy, hinton
from pbkd.objectives.local import Reduction, local_feature

__all__ = ["Reduction", "cross_entropy", "hinton", "local_feature"]
