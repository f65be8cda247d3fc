"""Stores that many tests look at, made once for all processes of a test run; who changes one copies it."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.integration.pbkd_process import LOCAL, ROOT, SECONDS, SMALL, SMOKE, pbkd, run_here, with_database


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> Any:
    """What `make` gives, as JSON, of the folder `name` that it fills: for the first process that asks."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    made = folder / "made.json"
    with FileLock(f"{folder}.lock"):
        if not made.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
            folder.mkdir()
            content = json.dumps(make(folder))
            made.write_text(content)
        return json.loads(made.read_text())


@dataclass(frozen=True)
class Demo:
    """What the demo's command leaves: its store, the last lines it prints, and what it says to machines."""

    store: Path
    said: list[str]
    report: dict[str, Any]

    @property
    def page(self) -> Path:
        """The report whose path the last lines give."""
        (path,) = (line.removeprefix("report:").strip() for line in self.said if line.startswith("report:"))
        return Path(path)

    @property
    def ui(self) -> list[str]:
        """The command the last line gives."""
        return self.said[-1].removeprefix("MLflow:").split()


def demo(folder: Path) -> dict[str, Any]:
    """`make demo` with a smaller recipe: every stage of it, of a few steps."""
    store = with_database(folder / "runs")
    typed = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True)
    (command,) = re.findall(r"^\.venv/bin/pbkd (run .*)$", typed.stdout, re.MULTILINE)
    words = [*command.split(), *SMOKE, LOCAL, "--store", str(store)]
    with pbkd(*words) as run:
        code, out, err = run.wait(4 * SECONDS)  # sixteen stages
    assert code == 0, err
    return {"store": str(store), "said": out.splitlines()[-4:], "report": run_here(*words[1:])}


def reference(folder: Path) -> dict[str, Any]:
    """The report of the small recipe, which nobody has disturbed."""
    return run_here(SMALL, LOCAL, "--store", with_database(folder / "runs"))
