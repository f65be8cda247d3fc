"""What holds for all tests: those that need FFCV are skipped without it, and the summary says so."""

from importlib.util import find_spec

import pytest

HAS_FFCV = find_spec("ffcv") is not None
REASON = "FFCV is not installed: make ffcv"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not HAS_FFCV and item.get_closest_marker("ffcv"):
            item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.getreports("skipped") if REASON in str(report.longrepr)]
    if skipped:
        terminalreporter.section("FFCV", red=True)
        terminalreporter.line(f"{len(skipped)} tests SKIPPED. {REASON}", red=True)
