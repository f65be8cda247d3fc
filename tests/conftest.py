"""What holds for all tests: those that lack something of the machine are skipped, and the summary says why.

`PBKD_REQUIRE=ffcv,slurm,browser,mount,data`, or some of these, makes failures of such skips.
"""

import os
import shutil
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.pop("MLFLOW_TRACKING_URI", None)  # a developer's own MLflow is not to have what tests write

LACKS = {
    "ffcv": "FFCV is not installed: make ffcv",
    "slurm": "no Slurm could be started: ",
    "browser": "Chromium is not installed: make browser",
    "mount": "no file system can be mounted: ",
    "data": "not below PBKD_DATA: ",
}
"""How the reason for a skip begins, by what is lacking."""

NO_SLURM, NO_MOUNT = LACKS["slurm"], LACKS["mount"]
MISSING = {
    "ffcv": find_spec("ffcv") is None,
    "browser": shutil.which("chromium") is None,
}
REQUIRED = set(os.environ.get("PBKD_REQUIRE", "").split(",")) - {""}


def pytest_configure() -> None:
    if unknown := REQUIRED - LACKS.keys():
        raise pytest.UsageError(
            f"PBKD_REQUIRE: expected some of {', '.join(LACKS)}; found {', '.join(sorted(unknown))}"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for name, is_missing in MISSING.items():
        for item in items:
            if is_missing and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=LACKS[name]))
    for item in items:
        wanted = [str(name) for marker in item.iter_markers("data") for name in marker.args]
        if absent := [name for name in wanted if not _is_there(name)]:
            item.add_marker(pytest.mark.skip(reason=LACKS["data"] + ", ".join(absent)))


def _is_there(name: str) -> bool:
    root = os.environ.get("PBKD_DATA")
    return root is not None and (Path(root) / name).exists()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and (lacking := REQUIRED.intersection(found_lacking(report))):
        report.outcome = "failed"
        report.longrepr = f"PBKD_REQUIRE={lacking.pop()}: {reason_of(report)}"
    return report


def reason_of(report: pytest.TestReport) -> str:
    """Why a test was skipped."""
    assert isinstance(report.longrepr, tuple)
    return report.longrepr[2].removeprefix("Skipped: ")


def found_lacking(report: pytest.TestReport) -> list[str]:
    """Which of `LACKS` is why a test was skipped."""
    if not isinstance(report.longrepr, tuple):  # an expected failure
        return []
    return [name for name, reason in LACKS.items() if reason_of(report).startswith(reason)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.getreports("skipped")
    for name in LACKS:
        if found := [report for report in skipped if name in found_lacking(report)]:
            reasons = dict.fromkeys(reason_of(report) for report in found)
            terminalreporter.section(name.upper(), red=True)
            terminalreporter.line(f"{len(found)} tests SKIPPED. {'; '.join(reasons)}", red=True)
