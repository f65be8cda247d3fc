"""The journal loses nothing but a line torn by a crash."""

import logging
from pathlib import Path

import pytest

from pipelines.journal import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl")


def test_reads_what_was_appended_and_goes_on_from_the_offset(journal: Journal) -> None:
    assert journal.read() == ([], 0)
    journal.append({"type": "started", "name": "größe"})
    records, offset = journal.read()
    assert records == [{"type": "started", "name": "größe"}]
    journal.append({"type": "progress", "row": {"step": 1}})
    assert journal.read(offset)[0] == [{"type": "progress", "row": {"step": 1}}]


def test_an_unfinished_last_line_is_left_for_later(journal: Journal) -> None:
    journal.append({"a": 1})
    with journal.path.open("ab") as file:
        file.write(b'{"b": ')
    records, offset = journal.read()
    assert records == [{"a": 1}]
    with journal.path.open("ab") as file:
        file.write(b"2}\n")
    assert journal.read(offset)[0] == [{"b": 2}]


def test_a_line_torn_by_a_crash_does_not_take_the_next_one_with_it(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.append({"a": 1})
    with journal.path.open("ab") as file:
        file.write(b'{"b": ')
    journal.append({"c": 3})
    with caplog.at_level(logging.WARNING):
        assert journal.read()[0] == [{"a": 1}, {"c": 3}]
    assert "torn" in caplog.text
