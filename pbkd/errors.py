"""The two kinds of failure a user sees: their mistake (exit code 2) and a failed stage (exit code 1)."""


class UserError(ValueError):
    """A mistake of the user, in at most three lines: the place, what was found and expected, the cure."""


class AbsentDataError(UserError):
    """A data set that is not on this machine; what needs only its shape goes on without it."""


class StageError(RuntimeError):
    """A stage could not be completed for a reason that is not the user's mistake."""


def first_line(error: BaseException) -> str:
    """What it says, in one line of at most 200 characters; its type, if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()[:200]
