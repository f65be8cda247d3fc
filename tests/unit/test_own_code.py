"""A user's code belongs to a stage's key by its content: all of its modules, and nothing else."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pbkd.errors import UserError
from pbkd.networks import settings_of
from pbkd.networks.builders import ForeignSettings

BUILDER = "def small(num_classes):\n    return None\n"
NAMES = {"own", "alone", "some_tool"}
Digest = Callable[..., str]


def forget() -> None:
    """Have the modules of these tests imported again, as in a new process."""
    for name in [name for name in sys.modules if name.partition(".")[0] in NAMES]:
        del sys.modules[name]
    importlib.invalidate_caches()


def code_of(arch: str) -> str:
    settings = settings_of(arch)
    assert isinstance(settings, ForeignSettings)
    found = settings.code_digest()
    assert found is not None
    return found


@pytest.fixture
def digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Digest]:
    """Writes files (name -> text) and gives the digest of a network's code, as a new process would."""
    monkeypatch.setenv("PBKD_ALLOW_IMPORT", "1")
    monkeypatch.setattr(sys, "path", [*sys.path])
    # With a .pyc, a file changed within a second to another text of the same length is not read again.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def compute(files: dict[str, str], arch: str = "own.net:small", folder: Path = tmp_path) -> str:
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        forget()
        sys.path.insert(0, str(folder))
        found = code_of(arch)
        sys.path.remove(str(folder))
        return found

    yield compute
    forget()


LAYERS = {"own/layers.py": "SLOPE = 0.0\n"}
WAYS = {
    "from": {"own/net.py": f"from own.layers import SLOPE\n{BUILDER}"},
    "import": {"own/net.py": f"import own.layers\n{BUILDER}"},
    "from the package": {"own/net.py": f"from own import layers\n{BUILDER}"},
    "star": {"own/net.py": f"from own.layers import *\n{BUILDER}"},
    "relative": {"own/net.py": f"from .layers import SLOPE\n{BUILDER}"},
    "relative module": {"own/net.py": f"from . import layers\n{BUILDER}"},
    "in the builder": {"own/net.py": f"{BUILDER}    from own import layers\n"},
    "in a forward": {
        "own/net.py": f"class N:\n    def forward(self, x):\n        import own.layers\n{BUILDER}"
    },
    "by another module": {
        "own/net.py": f"from own import deep\n{BUILDER}",
        "own/deep/__init__.py": "from .. import layers\n",
    },
    "by its package": {"own/net.py": BUILDER, "own/__init__.py": "from own.layers import SLOPE\n"},
    "in a circle": {
        "own/net.py": f"import own.other\n{BUILDER}",
        "own/other.py": "import own.net\nimport own.layers\n",
    },
    "by name": {"own/net.py": f"import importlib\n{BUILDER}    importlib.import_module('own.layers')\n"},
    "by a computed name": {
        "own/net.py": f"from importlib import import_module\n{BUILDER}    import_module(f'own.{{kind}}')\n",
    },
    "every file of a folder": {
        "own/net.py": f"import own.all\n{BUILDER}",
        "own/all/__init__.py": "import pathlib, importlib\n"
        "for path in pathlib.Path(__path__[0]).glob('[a-z]*.py'):\n"
        "    importlib.import_module('own.all.' + path.stem)\n",
        "own/all/one.py": "import own.layers\n",
    },
    "from a path": {
        "own/net.py": "import importlib.util, pathlib\n"
        "path = pathlib.Path(__file__).with_name('layers.py')\n"
        "spec = importlib.util.spec_from_file_location('anything', path)\n"
        f"layers = importlib.util.module_from_spec(spec)\n{BUILDER}",
    },
    "a line that this Python cannot read": {
        "own/net.py": f"{BUILDER}    import own.layers\n    import own.newer\n",
        "own/newer.py": "def (:\n",
    },
}


@pytest.mark.parametrize("files", WAYS.values(), ids=WAYS)
def test_a_module_that_the_network_imports_counts(files: dict[str, str], digest: Digest) -> None:
    before = digest(files | LAYERS)
    assert digest({"own/layers.py": "SLOPE = 0.5\n"}) != before
    assert digest(LAYERS) == before


def test_a_packages_own_file_counts_if_it_says_something(digest: Digest) -> None:
    alone = digest({"own/net.py": BUILDER})
    assert digest({"own/__init__.py": '"""A licence."""\n# and a comment\n'}) == alone
    changed = digest({"own/__init__.py": "import torch\ntorch.set_default_dtype(torch.float32)\n"})
    assert changed != alone
    assert digest({"own/__init__.py": BUILDER}, "own:small") == hashlib.sha256(BUILDER.encode()).hexdigest()


def test_a_single_file_counts_by_the_sha256_of_its_bytes(digest: Digest) -> None:
    text = f"import json\nimport torch\nfrom pbkd.networks import fresh\n{BUILDER}    import nowhere_at_all\n"
    assert digest({"alone.py": text}, "alone:small") == hashlib.sha256(text.encode()).hexdigest()


def test_what_the_network_does_not_import_does_not_count(digest: Digest, tmp_path: Path) -> None:
    before = digest({"own/net.py": f"import own.layers\n{BUILDER}"} | LAYERS)
    assert digest({"own/other.py": "A = 1\n", "own/widths.json": "[1]", "beside.py": BUILDER}) == before

    # Nor does it count when this process has imported it for another network.
    sys.path.insert(0, str(tmp_path))
    importlib.import_module("own.net")
    importlib.import_module("own.other")
    assert code_of("own.net:small") == before


@pytest.mark.parametrize("folder", ["lib/site-packages", "wheels"])
def test_libraries_are_not_followed(
    folder: str, digest: Digest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"import some_tool\n{BUILDER}"
    installed = {
        f"{folder}/some_tool.py": "A = 1\n",
        f"{folder}/some_tool-1.0.dist-info/METADATA": "Name: some_tool\nVersion: 1.0\n",
        f"{folder}/some_tool-1.0.dist-info/RECORD": "some_tool.py,,\n",  # as pip install --target leaves it
    }
    monkeypatch.syspath_prepend(str(tmp_path / folder))
    found = digest({"alone.py": text} | installed, "alone:small")
    assert found == hashlib.sha256(text.encode()).hexdigest()


def test_a_compiled_module_counts_by_its_bytes(digest: Digest) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    files = {"own/net.py": f"{BUILDER}    import own.fast\n", f"own/fast{suffix}": "some"}
    assert digest(files) != digest({f"own/fast{suffix}": "other"})


def test_the_folder_does_not_matter(digest: Digest, tmp_path: Path) -> None:
    files = WAYS["by another module"] | LAYERS
    assert digest(files, folder=tmp_path / "here") == digest(files, folder=tmp_path / "there")


def test_a_name_means_another_module_if_it_is_another(digest: Digest) -> None:
    one = digest(
        {"own/net.py": f"import own.a, own.b\n{BUILDER}", "own/a.py": "A = 1\n", "own/b.py": "A = 2\n"}
    )
    assert digest({"own/a.py": "A = 2\n", "own/b.py": "A = 1\n"}) != one


def test_nothing_is_imported_to_find_what_counts(digest: Digest) -> None:
    files = {
        "own/net.py": f"{BUILDER}    import own.heavy.part\n",
        "own/heavy/__init__.py": "raise RuntimeError('not asked for')\n",
        "own/heavy/part.py": "A = 1\n",
    }
    assert digest(files) != digest({"own/heavy/part.py": "A = 2\n"})


def test_a_file_that_cannot_be_read_is_named(digest: Digest, tmp_path: Path) -> None:
    digest({"own/net.py": f"import own.layers\n{BUILDER}"} | LAYERS)
    (tmp_path / "own" / "layers.py").unlink()
    with pytest.raises(UserError) as caught:
        code_of("own.net:small")
    lines = str(caught.value).splitlines()
    assert "own/layers.py, which 'own.net' imports, cannot be read (No such file" in lines[0]
    assert len(lines) == 2


@pytest.mark.parametrize("first", ["own.layers", "own.deep", "own.other"])
def test_what_was_imported_first_does_not_matter(first: str, digest: Digest, tmp_path: Path) -> None:
    files = WAYS["by another module"] | LAYERS | {"own/other.py": "import own.net\n"}
    expected = digest(files)
    forget()
    sys.path.insert(0, str(tmp_path))
    importlib.import_module(first)
    assert code_of("own.net:small") == expected
