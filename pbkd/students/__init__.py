"""Student blocks: their structure, their receptive field, and the weights they start with."""

from pbkd.students.criterion import StudentSettings, student_block
from pbkd.students.initialize import (
    Init,
    initialize_inherit,
    initialize_kaiming,
    initialize_least_squares,
)
from pbkd.students.receptive_field import ReceptiveField, receptive_field

__all__ = [
    "Init",
    "ReceptiveField",
    "StudentSettings",
    "initialize_inherit",
    "initialize_kaiming",
    "initialize_least_squares",
    "receptive_field",
    "student_block",
]
