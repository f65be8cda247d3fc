"""How long each `stabilize` stage lasts: not at all, and around what its recipe says."""

from collections.abc import Iterator

from pbkd.errors import UserError
from pbkd.stages import Stabilize
from tune_spaces.space import Parameter
from tune_spaces.subject import Subject

TIMES = (0, 0.5, 1, 2, 4)
SMOKE = (1, 4)
"""Steps: a smoke run cuts every training to four."""


def parameters(subject: Subject) -> Iterator[Parameter]:
    """`stages.STAGE.epochs` or `.steps` of every stabilization, whichever its recipe has."""
    names = subject.stages("stabilize")
    if not names:
        raise UserError(f"space stabilization_lengths: the student of {subject.path} has no stabilize stage")
    for name in names:
        stage = subject.recipe.stages[name]
        assert isinstance(stage, Stabilize)
        if subject.recipe.smoke:
            yield Parameter(key=f"stages.{name}.steps", choices=SMOKE)
            continue
        unit, length = ("epochs", stage.epochs) if stage.steps is None else ("steps", stage.steps)
        lengths = sorted({round(times * max(1, length or 0)) for times in TIMES})
        yield Parameter(key=f"stages.{name}.{unit}", choices=tuple(lengths))
