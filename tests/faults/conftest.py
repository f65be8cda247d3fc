"""The undisturbed run that all others are compared with."""

from typing import Any

import pytest

from tests.faults.long_run import LONG
from tests.integration.pbkd_process import LOCAL, SMALL, run_here, with_database


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_here(SMALL, LOCAL, *LONG, "--store", with_database(tmp_path_factory.mktemp("undisturbed")))
