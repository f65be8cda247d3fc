"""How many filters each student block keeps: one width a block, for every stage that makes student blocks."""

from collections.abc import Iterator

from pbkd.errors import UserError
from tune_spaces.space import Parameter
from tune_spaces.subject import Subject

WIDTHS = (0.25, 0.375, 0.5, 0.625, 0.75)
SMOKE = (0.5, 0.75)


def parameters(subject: Subject) -> Iterator[Parameter]:
    """`stages.STAGE.width.BLOCK` of progressive stages, `stages.STAGE.width` of single blocks."""
    keys = [
        f"{name}.width.{block}" for name in subject.stages("progressive") for block in subject.blocks(name)
    ]
    keys += [f"{name}.width" for name in subject.stages("block")]
    if not keys:
        raise UserError(
            f"space student_widths: the student of {subject.path} has no progressive or block stage"
        )
    for key in keys:
        yield Parameter(key=f"stages.{key}", choices=SMOKE if subject.recipe.smoke else WIDTHS)
