"""An append-only record: what happened, in order; what MLflow is filled from, and how workers report."""

import json
import logging
import time
from typing import Any

from pbkd.errors import UserError
from pbkd.storage import Storage, stays_below

log = logging.getLogger(__name__)

Record = dict[str, Any]


class Journal:
    """JSON objects, one a line, that are only appended to, by any number of processes."""

    def __init__(self, storage: Storage, name: str = "journal.jsonl") -> None:
        """Name it; the first `append` makes it."""
        self._storage, self._name = storage, name

    def append(self, record: Record) -> None:
        """Add `record`, with the `time` if it has none, as one line.

        Everything but progress is made to survive a power cut.
        """
        line = json.dumps({"time": time.time()} | record, separators=(",", ":")).encode() + b"\n"
        self._storage.append(self._name, line, sync=record.get("type") != "progress")

    def read(self, after_offset: int = 0) -> tuple[list[Record], int]:
        """Return the complete records after `after_offset` and the offset to go on from.

        A last line without its end is left for the next call; a line torn by a crash is skipped, with a
        warning.
        """
        try:
            data = self._storage.read(self._name, after_offset)
        except FileNotFoundError:
            return [], after_offset  # not begun, or, of a stage's progress, removed with the finished work
        complete = data[: data.rfind(b"\n") + 1]
        records = []
        for line in complete.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                where = self._storage.location(self._name)
                log.warning("%s: skipped a line torn by a crash: %.60r", where, line)
                continue
            if isinstance(record, dict):
                records.append(record)
        return records, after_offset + len(complete)


def latest_report(journal: Journal, kind: str = "report") -> Record | None:
    """The record of the latest report that was made of the pipeline, if there is one; of a search, `page`."""
    records, _ = journal.read()
    return next((record for record in reversed(records) if record.get("type") == kind), None)


def report_files(report: Record) -> list[str]:
    """The files of a report by its record, the page first, below the folder of the journal.

    Raises:
        UserError: a name leads elsewhere, as in a journal that somebody has edited.
    """
    names = report.get("files")
    if not isinstance(names, list) or not names or not all(stays_below(name) for name in names):
        raise UserError(
            f"the journal names files of a report that are not in its folder: {str(names)[:200]}\n"
            "it was tampered with or damaged: look at it; pbkd report makes the report anew"
        )
    return names
