"""A refactor reproduces the recorded losses of every kind of stage."""

import json

import pytest

from tests.golden.curves import RECORDED, Curves, curves

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4  # relative
OF_SOLVED = 1e-3  # what is solved in closed form depends on the processor, by some 1e-5

EXPECTED: dict[str, Curves] = json.loads(RECORDED.read_text())


@pytest.fixture(scope="module")
def found() -> dict[str, Curves]:
    return curves()


def test_the_same_stages_are_recorded(found: dict[str, Curves]) -> None:
    assert found.keys() == EXPECTED.keys()


@pytest.mark.parametrize("stage", EXPECTED)
def test_losses_are_the_recorded_ones(stage: str, found: dict[str, Curves]) -> None:
    assert found[stage].keys() == EXPECTED[stage].keys()
    for quantity, values in EXPECTED[stage].items():
        tolerance = OF_SOLVED if stage == "block_least_squares" else TOLERANCE
        assert found[stage][quantity] == pytest.approx(values, rel=tolerance), (
            f"{quantity} of {stage} changed; if on purpose, raise the version and record: "
            "python -m tests.golden.curves"
        )
