"""The report of a search: every trial, the winners, what is missing; it shows what its journal has."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from pipelines.journal import Journal
from pipelines.reporting.search_facts import gather_search
from pipelines.reporting.search_page import compose_search, headline_of
from pipelines.store import Store
from tests.unit.test_report import Page

NAME = "digits-widths"
# number, outcome, validation accuracy, multiply-accumulates
TRIALS = [
    (0, "finished", 98.0, 1000.0),
    (1, "finished", 97.0, 500.0),
    (2, "finished", 96.5, 800.0),
    (3, "stopped", 50.0, 700.0),
    (4, "failed", None, None),
    (5, "running", None, None),
]


def begin(store: Store, goals: tuple[str, ...] = ("accuracy", "macs")) -> Journal:
    journal = Journal(store.search_records(NAME))
    described: dict[str, Any] = {"space": "widths", "parameters": {"stages.blocks.width": [0.25, 0.5, 0.75]}}
    described |= {"objective": {"goals": goals, "max_macs": 900.0}, "sampler": "tpe", "seed": 3}
    described |= {"recipe": {"name": "digits", "teacher": "teacher"}}
    journal.append({"type": "search", "name": NAME, "description": described})
    return journal


def record(journal: Journal) -> None:
    for number, outcome, accuracy, macs in TRIALS:
        width = {"stages.blocks.width": 0.25 * (number % 3 + 1)}
        journal.append({"type": "trial", "number": number, "params": width, "overrides": []})
        if outcome != "running":
            values = {"val_accuracy": accuracy, "macs": macs, "params": macs, "latency_ms": None}
            result = {"type": "result", "number": number, "outcome": outcome, "values": values}
            result |= {"stages": {"teacher": "ab" * 32, "student": f"{number:064x}"}, "ran": ["student"]}
            journal.append(
                result | {"seconds": 3.0, "message": "<b>no memory</b>" if accuracy is None else None}
            )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "runs")
    record(begin(store))
    return store


def test_every_trial_is_there_and_those_that_none_beats_win(store: Store) -> None:
    facts = gather_search(store, NAME)
    assert [trial.number for trial in facts.winners] == [0, 1]
    assert "3 of 6 trials finished; 2 of them are on the front of accuracy, macs" in headline_of(facts)
    page = Page(compose_search(facts).html)
    placed = ["trial 0", "trial 1", "trial 2", "trial 3"]
    assert (
        sorted(page.points["search_macs", "wide"]) == sorted(page.points["search_macs", "narrow"]) == placed
    )
    assert ("search_latency_ms", "wide") not in page.points, "it was not measured"
    assert "This search is not finished." in page.text
    assert "<b>no memory</b>" in page.text and "b" not in page.tags[page.tags.index("table") :]
    for text in ("\n98.00\n", "\n0.75\n", "of 10 that trials asked for, 6 distinct", "max_macs 900"):
        assert text in page.text
    assert f"pbkd report {NAME}.0001 --store {store.location}" in page.text


def test_one_goal_has_one_winner(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    record(begin(store, goals=("macs",)))
    assert [trial.number for trial in gather_search(store, NAME).winners] == [1]


def test_a_search_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    begin(store)
    page = Page(compose_search(gather_search(store, NAME)).html)
    assert "there is no winner yet" in page.text and "there is nothing to draw" in page.text


def test_the_command_knows_searches_by_name(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["report", NAME, "--store", str(store.root), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["search"], said["path"]) == (NAME, str(store.root / "searches" / NAME / "report.html"))
    assert [Path(path).name for path in said["figures"]] == ["search_macs.png", "search_values.png"]
    assert all(Path(path).is_file() for path in (said["path"], *said["figures"]))
