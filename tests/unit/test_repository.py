"""What holds for the repository as a whole: names, sizes, pins and texts."""

import ast
import re
import subprocess
import tomllib
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONGEST = 400
NAMES_THAT_SAY_NOTHING = {"utils.py", "helpers.py", "misc.py", "common.py", "manager.py"}
# Written apart, so that this file does not name them either.
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in [
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("download", "pytorch", "org"),
        ("deb", "debian", "org"),
        ("npmjs", "org"),
        ("anaconda", "org"),
    ]
]


def files_of_the_project() -> list[Path]:
    """What is committed or would be by `git add .`; asked as any user, whoever owns the checkout."""
    command = [
        "git",
        "-c",
        "safe.directory=*",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in listing.split("\0") if name]
    return [path for path in paths if path.is_file()]


FILES = files_of_the_project()
MODULES = [path for path in FILES if path.suffix == ".py"]
RECIPES = sorted((ROOT / "pipelines" / "recipes").glob("*.yaml"))
DOCUMENTS = [path for path in FILES if path.suffix == ".md"]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def test_no_text_names_a_package_registry() -> None:
    naming = [
        f"{relative(path)}: {host}"
        for path in FILES
        if (text := text_of(path)) is not None
        for host in REGISTRY_HOSTS
        if host in text
    ]
    assert naming == [], "whoever installs has their own index configured; the project names none"


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        relative(path)
        for path in MODULES
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == [], "a module opens with one or two lines saying what it is for"


def test_every_module_has_a_telling_name() -> None:
    assert [relative(path) for path in MODULES if path.name in NAMES_THAT_SAY_NOTHING] == []


def test_no_file_of_the_library_is_longer_than_a_reader_can_hold() -> None:
    lengths = {
        relative(path): len(path.read_text(encoding="utf-8").splitlines())
        for path in MODULES
        if path.relative_to(ROOT).parts[0] in ("pbkd", "pipelines")
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST} == {}


def test_there_is_a_recipe() -> None:
    assert "digits.yaml" in [recipe.name for recipe in RECIPES]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_recipe_opens_with_its_command(recipe: Path) -> None:
    lines = recipe.read_text(encoding="utf-8").splitlines()
    opening = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    assert any(f"pbkd run {relative(recipe)}" in line for line in opening)


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    unclear = [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin)]
    assert unclear == [], "one exact public version a line: no URL, hash or local build"
    pinned = {re.sub(r"[._]", "-", pin.split("==")[0]).lower() for pin in pins}
    assert {re.split(r"[\[><=]", requirement)[0] for requirement in wanted} - pinned == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_between_files_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith(("http://", "https://", "mailto:"))]
    assert [target for target in local if not (document.parent / target).exists()] == []
