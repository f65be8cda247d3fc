"""The two kinds of failure a person sees: their mistake (exit code 2) and a stage that went wrong (exit code 1)."""


class UserError(ValueError):
    """A mistake of the user: one to three lines naming the place, what was found, what was expected, and the cure."""


class StageError(RuntimeError):
    """A stage could not be completed for a reason that is not the user's mistake."""
