"""A refactoring leaves the keys of all recipes as they were: nobody's finished stages are trained again."""

from pathlib import Path

import pytest

from tests.golden.keys import RECIPES, is_in_changelog, keys_of, recorded


def test_every_recipe_is_recorded_and_the_changelog_says_why_its_keys_are_as_they_are() -> None:
    assert sorted(recorded()["keys"]) == sorted(recipe.stem for recipe in RECIPES)
    assert is_in_changelog(recorded()["why"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_keys_are_the_recorded_ones(recipe: Path) -> None:
    assert keys_of(recipe) == recorded()["keys"][recipe.stem], (
        "keys changed, so finished stages would be trained again; if that must be, say why in CHANGELOG.md "
        "and record: python -m tests.golden.keys PHRASE"
    )
