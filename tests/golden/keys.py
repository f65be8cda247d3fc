"""The stage keys of all recipes, as recorded: where a key changes, every store trains a finished stage again.

Data and weights are not in the repository, so fixed stand-ins take the place of
their digests. Whoever changes a key on purpose says why in CHANGELOG.md and records the keys again:

    python -m tests.golden.keys "a phrase of the new lines of CHANGELOG.md"
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pbkd.data import DataSettings, Identity, data_identity
from pbkd.networks.builders import pretrained_name
from pbkd.stages import Load
from pipelines.graph import build_graph
from pipelines.recipe_file import load_recipe

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).parent / "keys.json"
RECIPES = sorted((ROOT / "pipelines" / "recipes").glob("*.yaml"))
AS_ANYWHERE = ["compute.threads=1"]  # `auto` takes the cores of the machine


def keys_of(recipe: Path) -> dict[str, str]:
    """Stage -> key."""
    with (
        tempfile.TemporaryDirectory() as cache,
        patch("pbkd.data.loader.data_identity", _data_identity),
        patch.object(Load, "_identity", _weights_digest),
    ):
        graph = build_graph(load_recipe(recipe, AS_ANYWHERE), None, Path(cache))
    assert all(node.key for node in graph.nodes.values()), recipe
    return {name: str(node.key) for name, node in graph.nodes.items()}


def _data_identity(settings: DataSettings, cache: Path) -> Identity:
    if settings.name == "digits":
        return data_identity(settings, cache)
    return Identity(_stand_in(settings.name), ("",) * settings.describe().num_classes, settings.source())


def _weights_digest(stage: Load) -> str:
    return pretrained_name(stage.network.arch) if stage.weights is None else _stand_in(stage.weights.name)


def _stand_in(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def recorded() -> dict[str, Any]:
    """`why` they are as they are, and the `keys` by recipe and stage."""
    found: dict[str, Any] = json.loads(RECORDED.read_text())
    return found


def is_in_changelog(phrase: str) -> bool:
    """Whether CHANGELOG.md says so, however its lines are broken."""
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    return bool(phrase.strip()) and " ".join(phrase.split()) in " ".join(changelog.split())


def main(why: str) -> None:
    """Record the keys as they are now."""
    keys = {recipe.stem: keys_of(recipe) for recipe in RECIPES}
    before = recorded() if RECORDED.exists() else {"why": None, "keys": {}}
    is_new = any(keys.get(name) != stages for name, stages in before["keys"].items())
    if not is_in_changelog(why) or (is_new and why == before["why"]):
        sys.exit("give a phrase of CHANGELOG.md that says why keys are others than before")
    RECORDED.write_text(json.dumps({"why": why, "keys": keys}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
