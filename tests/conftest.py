"""What holds for all tests: those that lack something of the machine are skipped, and the summary says why.

`PBKD_REQUIRE=ffcv,slurm,browser,mount,data`, or some of these, makes failures of such skips.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.integration.ray_cluster import Cluster
    from tests.reference_stores import Demo

# A developer's own MLflow and caches are not to have what tests write.
os.environ.pop("MLFLOW_TRACKING_URI", None)
if "PYTEST_XDIST_WORKER" not in os.environ:  # which has its parent's
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="pbkd-cache-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

LACKS = {
    "ffcv": "FFCV is not installed: make ffcv",
    "slurm": "no Slurm could be started: ",
    "browser": "Chromium is not installed: make browser",
    "mount": "no file system can be mounted: ",
    "data": "not below PBKD_DATA: ",
}
"""How the reason for a skip begins, by what is lacking."""

SLOW_FIRST = [
    "tune", "slurm", "run", "documentation", "recipes", "faults", "object_store", "ray_job",
    "foreign_networks", "mlflow_faults", "ffcv_reader", "mlflow_in_browser", "tracking", "exhaustion",
    "shared_store", "export", "own_module", "report", "export_command", "storage", "read_only_store",
    "paired_seeds", "compare_recipes", "report_in_browser", "traced_field", "pretrained", "init",
    "run_ray_cluster", "ray_nodes", "ui", "site",
]  # fmt: skip
"""Files that take longest, the longest first: begun last, one of them would keep one process busy alone."""

NO_SLURM, NO_MOUNT = LACKS["slurm"], LACKS["mount"]
MISSING = {
    "ffcv": find_spec("ffcv") is None,
    "browser": shutil.which("chromium") is None,
}
REQUIRED = set(os.environ.get("PBKD_REQUIRE", "").split(",")) - {""}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proof", action="store_true", help="run what is marked `proof`, and nothing else")


@pytest.hookimpl(trylast=True)  # the reporter is there
def pytest_configure(config: pytest.Config) -> None:
    if (terminal := config.pluginmanager.get_plugin("terminalreporter")) is not None:
        config.pluginmanager.register(_AtOnce(terminal))
    if unknown := REQUIRED - LACKS.keys():
        raise pytest.UsageError(
            f"PBKD_REQUIRE: expected some of {', '.join(LACKS)}; found {', '.join(sorted(unknown))}"
        )


class _AtOnce:
    """Tells of a failure when it happens, not after all tests."""

    def __init__(self, terminal: pytest.TerminalReporter) -> None:
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.ensure_newline()
            self._terminal.section(f"{report.nodeid} failed, at {report.when}", red=True)
            self._terminal.line(report.longreprtext)


def _select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out proofs, or all but them."""
    wanted, others = list[pytest.Item](), list[pytest.Item]()
    for item in items:
        is_proof = item.get_closest_marker("proof") is not None
        (wanted if is_proof == config.getoption("proof") else others).append(item)
    items[:] = wanted
    if others:
        config.hook.pytest_deselected(items=others)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _select(config, items)
    places = {name: place for place, name in enumerate(SLOW_FIRST)}
    items.sort(
        key=lambda item: places.get(item.path.stem.removeprefix("test_"), len(places))
    )  # the others as they were
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


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> "Demo":
    """The demo in small, as the whole test run shares it."""
    from tests import reference_stores

    made = reference_stores.made_once(tmp_path_factory, "demo", reference_stores.demo)
    return reference_stores.Demo(**made | {"store": Path(made["store"])})


@pytest.fixture(scope="session")
def small_demo(demo: "Demo") -> dict[str, Any]:
    """What `pbkd run --json` says of it."""
    return demo.report


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Cluster]":
    """A Ray cluster of two CPUs for all tests of this process that do not ask how a run starts its own."""
    from tests.integration.pbkd_process import until
    from tests.integration.ray_cluster import Cluster

    cluster = Cluster(tmp_path_factory.mktemp("ray"))
    try:
        until(cluster.answers, "the cluster to answer")
        yield cluster
    finally:
        cluster.end()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `pbkd run --json` says of the small recipe, undisturbed, as the whole test run shares it."""
    from tests import reference_stores

    found: dict[str, Any] = reference_stores.made_once(
        tmp_path_factory, "reference", reference_stores.reference
    )
    return found
