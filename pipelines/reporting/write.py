"""A report in files: the page, and each figure as a PNG beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pbkd.errors import UserError
from pbkd.storage import Folder
from pipelines.reporting.page import Report


@dataclass(frozen=True)
class Written:
    """Where a report is.

    Attributes:
        page: the HTML file.
        figures: the PNG files.
    """

    page: Path
    figures: tuple[Path, ...]


def figures_folder(page: Path) -> Path:
    """Where the figures of a page lie: beside it."""
    return page.with_name(f"{page.stem}_figures")


def write(report: Report, path: Path) -> Written:
    """Write page and figures; absolute paths. Raises UserError if that cannot be."""
    path = path.expanduser().absolute()
    folder = figures_folder(path)
    try:
        folder.mkdir(exist_ok=True)  # first: it makes no folder above
        Folder(path.parent).replace(path.name, report.html.encode(), sync=False)
        written = []
        for drawing in report.drawings:
            figure = folder / f"{drawing.name}.png"
            Folder(folder).replace(figure.name, drawing.png(), sync=False)
            written.append(figure)
        for stale in set(folder.glob("*.png")).difference(written):
            stale.unlink()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}\nname one in a folder that exists: --out FILE.html"
        ) from error
    return Written(path, tuple(written))
