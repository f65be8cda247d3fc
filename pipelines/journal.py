"""The append-only journal of one pipeline: what happened, in order; what MLflow is filled from."""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Record = dict[str, Any]


class Journal:
    """JSON objects, one a line, in a file that is only appended to, by any number of processes."""

    def __init__(self, path: Path) -> None:
        """Name the file; the first `append` makes it."""
        self.path = path

    def append(self, record: Record) -> None:
        """Add `record`, with the `time` if it has none, as one line by one write.

        Everything but progress is made to survive a power cut.
        """
        line = json.dumps({"time": time.time()} | record, separators=(",", ":")).encode() + b"\n"
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            if _is_torn(descriptor):
                line = b"\n" + line  # else this record would be lost in the torn one
            if os.write(descriptor, line) != len(line):
                raise OSError(f"{self.path}: the disk took only a part of a line; is it full?")
            if record.get("type") != "progress":
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def read(self, after_offset: int = 0) -> tuple[list[Record], int]:
        """Return the complete records after `after_offset` and the offset to go on from.

        A last line without its end is left for the next call; a line torn by a crash is skipped, with a
        warning.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return [], after_offset  # not begun, or, of a stage's progress, removed with the finished work
        with file:
            file.seek(after_offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        records = []
        for line in complete.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                log.warning("%s: skipped a line torn by a crash: %.60r", self.path, line)
                continue
            if isinstance(record, dict):
                records.append(record)
        return records, after_offset + len(complete)


def _is_torn(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
