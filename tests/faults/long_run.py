"""What the tests of faults run: one stage, long enough to be hit in the middle."""

import json
from pathlib import Path
from typing import Any

LONG = ["stages.teacher.steps=120", "compute.checkpoint_steps=5", "--until", "teacher"]


def has_checkpoint(store: Path) -> bool:
    return any(store.glob("work/*/step-*"))


def leases(store: Path) -> list[dict[str, Any]]:
    """What the files of all leases say."""
    return [json.loads(path.read_text()) for path in store.glob("leases/*/[0-9]*.json")]


def newest(store: Path) -> str:
    """Of the checkpoints; those of the last steps are taken away with the finished stage's work."""
    return max((path.name for path in store.glob("work/*/step-*")), default="")
