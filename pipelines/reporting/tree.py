"""A pipeline as a tree: which stage stands on which line of a page, and how far it is indented."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.reporting.facts import PipelineFacts


@dataclass(frozen=True)
class Branch:
    """A stage in the tree.

    Attributes:
        row: its line, from 0.
        lane: how often the pipeline forked on the way to it.
        source: the stage it hangs on; None for a root.
    """

    row: int
    lane: int
    source: str | None


def tree(facts: PipelineFacts) -> dict[str, Branch]:
    """Every stage by name, in the order of the lines.

    A stage hangs on the one it starts from. An only child stays in its parent's lane, several go one to the
    right; the one that leads to the student comes first, the others in the recipe's order.
    """
    children: dict[str | None, list[str]] = {}
    for stage in facts.stages.values():
        source = stage.source if stage.source in facts.stages else None
        children.setdefault(source, []).append(stage.name)
    to_student = set(facts.path(facts.student))

    def following(source: str | None) -> list[str]:
        return sorted(children.get(source, []), key=lambda name: name not in to_student)

    placed: dict[str, Branch] = {}
    waiting: list[tuple[str, int, str | None]] = [(name, 0, None) for name in reversed(following(None))]
    while waiting:
        name, lane, source = waiting.pop()
        placed[name] = Branch(len(placed), lane, source)
        below = following(name)
        lane += len(below) > 1
        waiting += [(child, lane, name) for child in reversed(below)]
    return placed
