"""A real Slurm for a file of tests; where there can be none, the summary says why they are skipped."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.slurm_lab import SlurmLab, why_not
from tests.conftest import NO_SLURM


@pytest.fixture(scope="module")
def lab() -> Iterator[SlurmLab]:
    if (reason := why_not()) is not None:
        pytest.skip(NO_SLURM + reason)
    slurm = SlurmLab()
    slurm.start()  # one that is installed has to start
    with pytest.MonkeyPatch.context() as patch:
        for name, value in slurm.environment.items():
            patch.setenv(name, value)
        for name in [name for name in os.environ if name.startswith(("RAY_", "PBKD_S"))]:
            patch.delenv(name)
        try:
            yield slurm
        finally:
            slurm.stop()


@pytest.fixture
def store(lab: SlurmLab, tmp_path: Path) -> Iterator[Path]:
    """A store that all nodes see; after the test the queue is empty, whatever happened."""
    yield tmp_path / "runs"
    lab.ask("scancel", "--user=root")
