"""What it takes to make a pipeline again: commands, the recipe, and what its stages were made with."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from pipelines.reporting.facts import PipelineFacts

UNKNOWN = "–"


def commands(facts: PipelineFacts, typed: str | None) -> list[tuple[str, str]]:
    """(what it does, the command). `typed` is what runs the recipe where it lies, if that is known."""
    recorded = shlex.join(["pbkd", "run", str(facts.recipe_path), "--store", facts.store])
    found = [("As it was typed", typed)] if typed else []
    found.append(("Here: what is finished is reused, what is missing is made", recorded))
    commits = dict.fromkeys(stage.manifest.git for stage in facts.finished if stage.manifest)
    if (commit := next(filter(None, reversed(commits)), None)) is not None:
        elsewhere = f"git checkout {commit}\nmake setup\n.venv/bin/pbkd run recipe.yaml"
        found.append(("Anywhere else, with the recipe below saved as recipe.yaml", elsewhere))
    student = facts.stages[facts.student]
    if student.manifest is not None:
        here = f"--store {shlex.quote(facts.store)}"
        looks = f"pbkd lineage {student.manifest.artifact[:12]} {here}\npbkd ui {here}"
        found.append(("The student's lineage, and the runs in MLflow", looks))
    return found


def provenance(facts: PipelineFacts) -> list[tuple[str, str]]:
    """What the stages were made with; more than one value where they were not all made alike."""
    manifests = [stage.manifest for stage in facts.finished if stage.manifest is not None]
    found: list[tuple[str, list[str | None]]] = [
        ("data digest", [manifest.data_digest for manifest in manifests]),
        ("git commit", [manifest.git for manifest in manifests]),
        ("machine", [_pairs(manifest.machine) for manifest in manifests]),
        ("compute", [_pairs(manifest.compute) for manifest in manifests]),
        ("versions", [_pairs(manifest.versions) for manifest in manifests]),
    ]
    return [(title, " / ".join(dict.fromkeys(text or UNKNOWN for text in texts))) for title, texts in found]


def recipe_of(facts: PipelineFacts) -> str:
    """The recipe as it ran; empty if the store has lost it."""
    path = facts.recipe_path
    return path.read_text("utf-8") if path.is_file() else ""


def _pairs(mapping: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in mapping.items())
