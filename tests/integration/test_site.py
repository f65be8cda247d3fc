"""The documentation's site, and the README's figure: they can be made here, of what is committed."""

import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.readme_figure import PLACE, draw

ROOT = Path(__file__).parents[2]


def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    recipes = (tmp_path / "api" / "recipes" / "index.html").read_text("utf-8")
    assert "attention_weight" in recipes and "Hinton et al. 2015" in recipes, "settings, from the docstrings"
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))
    fetched = re.compile(r"<(?:script[^>]*src|link[^>]*stylesheet[^>]*href|img[^>]*src)=[\"']?https?://")
    assert [page.name for page in pages if fetched.search(page.read_text("utf-8"))] == []


def test_the_figure_of_the_readme_shows_the_committed_rows(tmp_path: Path) -> None:
    draw(tmp_path / "drawn.svg")
    drawn = (tmp_path / "drawn.svg").read_bytes()
    assert drawn == PLACE.read_bytes(), "the results have changed: python -m benchmarks.readme_figure"
