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
    journal.append({"type": "started", "name": "größe", "time": 1.5})
    records, offset = journal.read()
    assert records == [{"type": "started", "name": "größe", "time": 1.5}]
    journal.append({"type": "progress", "row": {"step": 1}, "time": 2.5})
    assert journal.read(offset)[0] == [{"type": "progress", "row": {"step": 1}, "time": 2.5}]


def test_a_record_gets_the_time_it_does_not_have(journal: Journal) -> None:
    journal.append({"type": "ended"})
    assert isinstance(journal.read()[0][0]["time"], float)


def test_an_unfinished_last_line_is_left_for_later(journal: Journal) -> None:
    journal.append({"a": 1, "time": 0})
    with journal.path.open("ab") as file:
        file.write(b'{"b": ')
    records, offset = journal.read()
    assert records == [{"a": 1, "time": 0}]
    with journal.path.open("ab") as file:
        file.write(b"2}\n")
    assert journal.read(offset)[0] == [{"b": 2}]


def test_a_line_torn_by_a_crash_does_not_take_the_next_one_with_it(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.append({"a": 1, "time": 0})
    with journal.path.open("ab") as file:
        file.write(b'{"b": ')
    journal.append({"c": 3, "time": 0})
    with caplog.at_level(logging.WARNING):
        assert journal.read()[0] == [{"a": 1, "time": 0}, {"c": 3, "time": 0}]
    assert "torn" in caplog.text


def test_a_journal_removed_between_a_look_and_a_read_reads_as_empty(tmp_path: Path) -> None:
    class Vanishing(type(tmp_path)):  # type: ignore[misc]
        def exists(self) -> bool:  # as it was a moment before another process removed it
            return True

    assert Journal(Vanishing(tmp_path / "progress.jsonl")).read(7) == ([], 7)
