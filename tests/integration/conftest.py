"""What several files of tests look at: one run of the demo, in small."""

from typing import Any

import pytest

from tests.integration.pbkd_process import ROOT, run, with_database


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `pbkd run --json` says of the demo's smoke run; who changes its store copies it before."""
    recipe = ROOT / "pipelines" / "recipes" / "digits.yaml"
    store = with_database(tmp_path_factory.mktemp("runs"))
    return run(recipe, "smoke=true", "compute.executor=local", "--store", store)
