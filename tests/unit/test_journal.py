"""The journal loses nothing but a line torn by a crash."""

import logging
from pathlib import Path

import pytest

from pbkd.storage import Folder
from pipelines.journal import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(Folder(tmp_path))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


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


def test_an_unfinished_last_line_is_left_for_later(journal: Journal, file: Path) -> None:
    journal.append({"a": 1, "time": 0})
    with file.open("ab") as torn:
        torn.write(b'{"b": ')
    records, offset = journal.read()
    assert records == [{"a": 1, "time": 0}]
    with file.open("ab") as torn:
        torn.write(b"2}\n")
    assert journal.read(offset)[0] == [{"b": 2}]


def test_a_line_torn_by_a_crash_does_not_take_the_next_one_with_it(
    journal: Journal, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal.append({"a": 1, "time": 0})
    with file.open("ab") as torn:
        torn.write(b'{"b": ')
    journal.append({"c": 3, "time": 0})
    with caplog.at_level(logging.WARNING):
        assert journal.read()[0] == [{"a": 1, "time": 0}, {"c": 3, "time": 0}]
    assert "torn" in caplog.text


def test_a_journal_that_another_process_has_removed_reads_as_empty(journal: Journal) -> None:
    assert journal.read(7) == ([], 7)
