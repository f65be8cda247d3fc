"""What holds for all tests: those that lack FFCV, a Slurm or a browser are skipped; the summary says why."""

import shutil
from importlib.util import find_spec

import pytest

HAS_FFCV = find_spec("ffcv") is not None
REASON = "FFCV is not installed: make ffcv"
NO_SLURM = "no Slurm could be started: "
HAS_BROWSER = shutil.which("chromium") is not None
NO_BROWSER = "Chromium is not installed: make browser"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not HAS_FFCV and item.get_closest_marker("ffcv"):
            item.add_marker(pytest.mark.skip(reason=REASON))
        if not HAS_BROWSER and item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason=NO_BROWSER))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [str(report.longrepr) for report in terminalreporter.getreports("skipped")]
    for title, reason in (("FFCV", REASON), ("SLURM", NO_SLURM), ("BROWSER", NO_BROWSER)):
        if found := [text for text in skipped if reason in text]:
            why = found[0][found[0].index(reason) :].rstrip("')")
            terminalreporter.section(title, red=True)
            terminalreporter.line(f"{len(found)} tests SKIPPED. {why}", red=True)
