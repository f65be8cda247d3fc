"""A recipe's file: read, overridden by `key=value`, typed. It imports what is heavy only for the last."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pbkd.errors import UserError
from pbkd.storage import open_file

if TYPE_CHECKING:
    from pipelines.recipe import Recipe


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `stages.blocks.epochs=2`.

    Raises:
        UserError: names the file, the key, what was found, what was expected.
    """
    return _typed(_read(path), overrides, path)


def revise(recipe: Recipe, overrides: Sequence[str], path: Path) -> Recipe:
    """A recipe with further overrides; `path` is what errors name it by. Raises UserError."""
    from pipelines.recipe import as_written

    return _typed(OmegaConf.create(as_written(recipe)), overrides, path)


def _typed(given: DictConfig, overrides: Sequence[str], path: Path) -> Recipe:
    for override in overrides:
        given = _override(given, override)
    try:
        content = OmegaConf.to_container(given, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: '{error.full_key}': {reason}") from error
    from pipelines.recipe import recipe_of

    return recipe_of(content, path)


def _read(path: Path) -> DictConfig:
    try:
        with open_file(path) as file:
            text = file.read().decode()
    except OSError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UserError(f"{path}: cannot be read ({error.strerror}){hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise UserError(f"{path}: is empty; see pipelines/recipes/digits.yaml for what a recipe holds")
    try:
        given = OmegaConf.load(StringIO(text))
    except (YAMLError, OmegaConfBaseException, ValueError, OSError, AssertionError) as error:
        # OmegaConf asserts that a lone string, read once more as YAML, is still one: 'true' is not.
        raise UserError(f"{path}: not a YAML mapping: {_one_line(error)}") from error
    if not isinstance(given, DictConfig):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, found a list")
    return given


def _override(given: DictConfig, override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override '{override}': expected key=value, such as stages.blocks.epochs=2")
    try:
        merged = OmegaConf.merge(given, OmegaConf.from_dotlist([override]))
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"override '{override}': cannot be applied: {_one_line(error)}") from error
    assert isinstance(merged, DictConfig), "a mapping merged with a mapping"
    return merged


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
