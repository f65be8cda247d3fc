"""Which modules of the user's a network's builder runs; stage keys hold their content."""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import pkgutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import SOURCE_SUFFIXES, ModuleSpec, PathFinder
from importlib.metadata import distributions
from importlib.util import find_spec, resolve_name
from pathlib import Path
from types import FunctionType, ModuleType

from pbkd.errors import UserError

_PROJECT = Path(__file__).parents[2]
_OURS = ("pbkd", "pipelines", "slurm", "tune_spaces", "benchmarks")
_IMPORTERS = ("import_module", "__import__")
_INSTALLED = {"site-packages", "dist-packages"}


def digest_of_code(root: ModuleType) -> str | None:
    """sha256 (hex) of `root` and of every module of the user's that it imports, directly or not.

    A module counts by its name and its bytes, wherever its folder is. If `root` imports no other module of
    the user's, the digest is the sha256 of its file. The standard library, installed packages and pbkd do
    not count. None: `root` has no file.

    Raises:
        UserError: a module's file cannot be read.
    """
    contents = _contents(root)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    if set(digests) <= {root.__name__}:
        return digests.get(root.__name__)
    listing = "".join(f"{name} {digest}\n" for name, digest in sorted(digests.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def is_library_file(path: str) -> bool:
    """Whether the file at `path` belongs to the standard library, an installed package or pbkd."""
    return not _INSTALLED.isdisjoint(Path(path).parts) or path.startswith(_libraries(tuple(sys.path)))


@lru_cache
def _libraries(search_path: tuple[str, ...]) -> tuple[str, ...]:
    """Folders and files of libraries outside `site-packages`; `pip install --target` writes some too."""
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders += [str(_PROJECT / name) for name in _OURS]
    targets = [
        entry for entry in search_path if Path(entry).parts and _INSTALLED.isdisjoint(Path(entry).parts)
    ]
    installed = {
        str(Path(entry) / file.parts[0])
        for entry in targets
        if next(Path(entry).glob("*.dist-info"), None) is not None
        for distribution in distributions(path=[entry])
        for file in distribution.files or ()
    }
    files = tuple(path for path in installed if Path(path).is_file())
    return files + tuple(f"{path}{os.sep}" for path in {*folders, *installed})


def _contents(root: ModuleType) -> dict[str, bytes]:
    """Name of every module that counts -> its file's bytes."""
    importlib.invalidate_caches()
    specs = _specs_by_globals(root)
    waiting = list(specs)
    seen: set[str] = set()
    contents: dict[str, bytes] = {}
    while waiting:
        if (name := waiting.pop()) in seen:
            continue
        seen.add(name)
        spec = specs.get(name) or _find(name)
        if spec is None or (_is_library(spec) and name != root.__name__):
            continue
        if parent := name.rpartition(".")[0]:  # importing a module runs the __init__.py of its packages first
            waiting.append(parent)
        if spec.origin is None or not spec.has_location:  # a package without __init__.py
            continue
        content = _read(spec.origin, root.__name__)
        statements = (
            _statements(content, _package(spec)) if spec.origin.endswith(tuple(SOURCE_SUFFIXES)) else _NONE
        )
        waiting += statements.modules
        waiting += [module for package in statements.packages for module in _modules_in(package)]
        if not statements.are_empty or name == root.__name__:
            contents[name] = content
    return contents


def _read(path: str, root: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"network code: {path}, which '{root}' imports, cannot be read ({error.strerror})\n"
            "a stage is known by the content of its network's code; make the file readable"
        ) from error


def _specs_by_globals(root: ModuleType) -> dict[str, ModuleSpec]:
    """`root`, and the user's modules that its globals refer to, and those that theirs do, and so on.

    They show what no import statement names, such as a module loaded from a path that was computed.
    """
    specs: dict[str, ModuleSpec] = {}
    waiting = [root]
    while waiting:
        module = waiting.pop()
        spec = module.__spec__
        if spec is None or module.__name__ in specs or (_is_library(spec) and module is not root):
            continue
        specs[module.__name__] = spec
        if not _is_library(spec):
            waiting += _referred(module)
    return specs


def _referred(module: ModuleType) -> Iterator[ModuleType]:
    for name, value in list(vars(module).items()):
        if isinstance(value, ModuleType):
            # A submodule is an attribute of its package as soon as anybody imports it.
            if value.__name__ != f"{module.__name__}.{name}":
                yield value
            continue
        owner = value if isinstance(value, type | FunctionType) else type(value)
        found = sys.modules.get(str(owner.__module__))
        if isinstance(found, ModuleType):
            yield found


def _is_library(spec: ModuleSpec) -> bool:
    """Whether a module is none of the user's; a package without `__init__.py` may have parts that are."""
    if spec.origin is None or not spec.has_location:
        return spec.submodule_search_locations is None  # built in or frozen
    return is_library_file(str(Path(spec.origin).absolute()))


def _find(name: str) -> ModuleSpec | None:
    """Where a module is; neither it nor its packages are imported."""
    parent = name.rpartition(".")[0]
    if parent and name not in sys.modules:
        above = _find(parent)
        if above is None or above.submodule_search_locations is None:
            return None
        return PathFinder.find_spec(name, above.submodule_search_locations)
    try:
        return find_spec(name)
    except (ImportError, ValueError):  # ValueError: a module that no import made, such as __main__
        return None


def _package(spec: ModuleSpec) -> str:
    """The package that a module's relative imports start from."""
    return spec.name.rpartition(".")[0] if spec.submodule_search_locations is None else spec.name


def _modules_in(package: str) -> Iterator[str]:
    """The names of all modules below `package`."""
    spec = _find(package) if package else None
    if spec is None or spec.submodule_search_locations is None or _is_library(spec):
        return
    for found in pkgutil.iter_modules(list(spec.submodule_search_locations), f"{package}."):
        yield found.name
        if found.ispkg:
            yield from _modules_in(found.name)


@dataclass(frozen=True)
class _Statements:
    """What a file imports, by what its text says.

    Attributes:
        modules: names that may be modules.
        packages: of which any module may be imported, by a name that the file computes.
        are_empty: it has no statement besides a docstring, like many an `__init__.py`.
    """

    modules: frozenset[str] = frozenset()
    packages: frozenset[str] = frozenset()
    are_empty: bool = False


_NONE = _Statements()


@lru_cache(maxsize=1024)
def _statements(content: bytes, package: str) -> _Statements:
    """Of all import statements of a file, those in functions too, and calls of `import_module`."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # it cannot be imported, so it imports nothing
        return _NONE
    modules: set[str] = set()
    packages: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.update(_names_from(node, package))
        elif isinstance(node, ast.Call) and node.args and _name(node.func) in _IMPORTERS:
            text, is_whole = _leading_text(node.args[0])
            if is_whole:
                modules.update(_absolute(text, package))
            else:
                packages.update(_absolute(text.rpartition(".")[0] or ".", package))
    body = tree.body[1:] if ast.get_docstring(tree, clean=False) is not None else tree.body
    return _Statements(frozenset(modules), frozenset(packages), not body)


def _names_from(node: ast.ImportFrom, package: str) -> Iterable[str]:
    """`from a import b` may mean the modules a and a.b."""
    for base in _absolute("." * node.level + (node.module or ""), package):
        yield base
        yield from (f"{base}.{alias.name}" for alias in node.names)


def _absolute(name: str, package: str) -> list[str]:
    try:
        return [resolve_name(name, package)]
    except ImportError:  # relative to a package that there is not
        return []


def _name(function: ast.expr) -> str | None:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)


def _leading_text(node: ast.expr) -> tuple[str, bool]:
    """The text that an expression certainly begins with, and whether that is all of it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value, True
    if isinstance(node, ast.JoinedStr) and node.values:
        return _leading_text(node.values[0])[0], False
    if isinstance(node, ast.BinOp):
        return _leading_text(node.left)[0], False
    return "", False
