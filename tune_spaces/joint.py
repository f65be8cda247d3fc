"""Widths, pruning ratios and stabilization lengths together: of these three, what a recipe has."""

from collections.abc import Iterator

from pbkd.errors import UserError
from tune_spaces import pruning_ratios, stabilization_lengths, student_widths
from tune_spaces.space import Parameter
from tune_spaces.subject import Subject


def parameters(subject: Subject) -> Iterator[Parameter]:
    """All parameters of the other three spaces."""
    if not any(subject.stages(kind) for kind in ("progressive", "block", "prune", "stabilize")):
        raise UserError(
            f"space joint: the student of {subject.path} has no progressive, block, prune or stabilize stage"
        )
    if subject.stages("progressive") or subject.stages("block"):
        yield from student_widths.parameters(subject)
    if subject.stages("prune"):
        yield from pruning_ratios.parameters(subject)
    if subject.stages("stabilize"):
        yield from stabilization_lengths.parameters(subject)
