"""Code that every Python process of a command runs as it starts: found by Python, through PYTHONPATH."""

import os
from pathlib import Path

WHEN_IMPORTED = '''
import importlib.abc, sys

class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, name, change):
        self.name, self.change = name, change

    def find_spec(self, name, path, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec
        spec = find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            self.change(module)
        spec.loader.exec_module = exec_module
        return spec

def when_imported(name, change):
    """Call `change` with the module `name` when a process has imported it."""
    sys.meta_path.insert(0, _Finder(name, change))
'''


def injected(code: str, folder: Path) -> dict[str, str]:
    """The environment in which processes run `code`, kept in `folder`; it may use `when_imported`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(WHEN_IMPORTED + code)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths)}
