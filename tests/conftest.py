"""What holds for all tests: those that need FFCV or a Slurm are skipped without, and the summary says why."""

from importlib.util import find_spec

import pytest

HAS_FFCV = find_spec("ffcv") is not None
REASON = "FFCV is not installed: make ffcv"
NO_SLURM = "no Slurm could be started: "


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not HAS_FFCV and item.get_closest_marker("ffcv"):
            item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [str(report.longrepr) for report in terminalreporter.getreports("skipped")]
    for title, reason in (("FFCV", REASON), ("SLURM", NO_SLURM)):
        if found := [text for text in skipped if reason in text]:
            why = found[0][found[0].index(reason) :].rstrip("')")
            terminalreporter.section(title, red=True)
            terminalreporter.line(f"{len(found)} tests SKIPPED. {why}", red=True)
