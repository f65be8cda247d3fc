"""All processes that come of a command, wherever they were reparented, by a mark in their environment."""

from pathlib import Path

MARK = "PBKD_MARK"


def marked_processes(mark: str, words: str = "") -> list[int]:
    """Ids of living processes with `mark` as `MARK` in the environment, and `words` in their command line or
    as the beginning of their name."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = f"{MARK}={mark}".encode() in (path / "environ").read_bytes()
            line = (path / "cmdline").read_bytes().decode(errors="replace")
            name = (path / "comm").read_text(errors="replace")
        except OSError:
            continue  # it has ended, or is another user's
        if is_ours and (words in line or name.startswith(words)):
            found.append(int(path.name))
    return found
