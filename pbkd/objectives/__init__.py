"""What a stage minimizes: pure functions of tensors that give one value per sample, shape (N,)."""

from pbkd.objectives.attention import attention
from pbkd.objectives.hinton import cross_entropy, hinton
from pbkd.objectives.local import Reduction, local_feature
from pbkd.objectives.relational import angle_relation, distance_relation

__all__ = [
    "Reduction",
    "angle_relation",
    "attention",
    "cross_entropy",
    "distance_relation",
    "hinton",
    "local_feature",
]
