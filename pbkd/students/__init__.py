"""Student blocks: their structure, their receptive field, and the weights they start with."""

from pbkd.students.criterion import StudentSettings, student_block
from pbkd.students.initialize import (
    Init,
    initialize_inherit,
    initialize_kaiming,
    initialize_least_squares,
)
from pbkd.students.interface import require_interchangeable
from pbkd.students.narrow import narrow_block, narrowable_blocks, narrowed_copy, solve, start_narrowed
from pbkd.students.receptive_field import ReceptiveField, receptive_field
from pbkd.students.traced_field import traced_receptive_field

__all__ = [
    "Init",
    "ReceptiveField",
    "StudentSettings",
    "initialize_inherit",
    "initialize_kaiming",
    "initialize_least_squares",
    "narrow_block",
    "narrowable_blocks",
    "narrowed_copy",
    "receptive_field",
    "require_interchangeable",
    "solve",
    "start_narrowed",
    "student_block",
    "traced_receptive_field",
]
