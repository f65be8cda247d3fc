"""What a machine lacks skips tests, loudly; where PBKD_REQUIRE names it, they fail."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TESTS = """
import pytest

@pytest.fixture
def disk():
    pytest.skip("no file system can be mounted: must be superuser")

def test_that_needs_a_disk(disk):
    pass

@pytest.mark.browser
def test_that_needs_a_browser():
    pass

@pytest.mark.skip(reason="for another reason")
def test_of_something_else():
    pass
"""


@pytest.mark.parametrize(
    ("required", "skipped", "said"),
    [
        ("", 3, ["*MOUNT*", "1 tests SKIPPED. no file system can be mounted: must be superuser"]),
        ("mount,slurm", 2, ["PBKD_REQUIRE=mount: no file system can be mounted: must be superuser"]),
        ("browser", 2, ["PBKD_REQUIRE=browser: Chromium is not installed: make browser"]),
    ],
)
def test_what_is_lacking_skips_or_fails(
    required: str, skipped: int, said: list[str], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = 'shutil.which("chromium") is None'
    code = CONFTEST.read_text()
    assert without in code
    pytester.makeconftest(code.replace(without, "True"))
    pytester.makeini("[pytest]\nmarkers =\n    ffcv\n    browser\n")
    pytester.makepyfile(TESTS)
    monkeypatch.setenv("PBKD_REQUIRE", required)
    found = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    found.stdout.fnmatch_lines(said)
    outcomes = found.parseoutcomes()
    assert outcomes.pop("skipped") == skipped
    assert sum(outcomes.values()) == 3 - skipped and found.ret == (skipped < 3)


def test_a_requirement_that_is_none_is_refused(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makeconftest(CONFTEST.read_text())
    monkeypatch.setenv("PBKD_REQUIRE", "ffvc")
    found = pytester.runpytest_subprocess()
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(
        ["*PBKD_REQUIRE: expected some of ffcv, slurm, browser, mount, data; found ffvc"]
    )


SOME = """
import pytest

def test_that_fails():
    assert 1 == 2

@pytest.mark.proof
def test_that_takes_hours():
    pass
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            (),
            [
                "*test_that_fails failed, at call*",
                "*assert 1 == 2*",
                "*= FAILURES =*",
                "*1 failed, 1 deselected*",
            ],
        ),
        (("--proof",), ["*1 passed, 1 deselected*"]),
    ],
)
def test_a_failure_is_told_at_once_and_proofs_are_run_alone(
    options: tuple[str, ...], said: list[str], pytester: pytest.Pytester
) -> None:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makeini("[pytest]\nmarkers =\n    proof\n")
    pytester.makepyfile(SOME)
    found = pytester.runpytest_subprocess("-p", "no:cacheprovider", *options)
    found.stdout.fnmatch_lines(said)
