"""How much each `prune` stage removes, in its recipe's unit: MACs left, channels or weights gone."""

from collections.abc import Iterator

from pbkd.errors import UserError
from pbkd.stages import Prune
from tune_spaces.space import Parameter
from tune_spaces.subject import Subject

VALUES = {
    "macs": (0.5, 0.6, 0.7, 0.8, 0.9),
    "ratio": (0.1, 0.2, 0.3, 0.4, 0.5),
    "sparsity": (0.5, 0.7, 0.8, 0.9, 0.95),
}
SMOKE = {"macs": (0.8, 0.9), "ratio": (0.1, 0.3), "sparsity": (0.5, 0.9)}


def parameters(subject: Subject) -> Iterator[Parameter]:
    """`stages.STAGE.macs`, `.ratio` or `.sparsity` of every pruning."""
    names = subject.stages("prune")
    if not names:
        raise UserError(f"space pruning_ratios: the student of {subject.path} has no prune stage")
    for name in names:
        stage = subject.recipe.stages[name]
        assert isinstance(stage, Prune)
        unit = next(unit for unit in VALUES if getattr(stage, unit) is not None)
        values = SMOKE if subject.recipe.smoke else VALUES
        yield Parameter(key=f"stages.{name}.{unit}", choices=values[unit])
