"""A report in files: the page, and each figure as a PNG beside it; what it takes for MLflow to get them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pbkd.errors import UserError
from pbkd.storage import Folder
from pipelines.journal import latest_report
from pipelines.reporting.facts import gather
from pipelines.reporting.page import Report, compose, headline
from pipelines.store import Store

PAGE = "report.html"


@dataclass(frozen=True)
class Written:
    """Where a report is.

    Attributes:
        page: the HTML file.
        figures: the PNG files.
        digest: sha256 of them all.
    """

    page: Path
    figures: tuple[Path, ...]
    digest: str


def write(report: Report, path: Path) -> Written:
    """Write page and figures; absolute paths. Raises UserError if that cannot be."""
    path = path.expanduser().resolve()
    folder = path.with_name(f"{path.stem}_figures")
    content = report.html.encode()
    digest, figures = hashlib.sha256(content), []
    try:
        folder.mkdir(exist_ok=True)  # first: it makes no folder above
        Folder(path.parent).replace(path.name, content, sync=False)
        for drawing in report.drawings:
            figure, content = folder / f"{drawing.name}.png", drawing.png()
            Folder(folder).replace(figure.name, content, sync=False)
            digest.update(content)
            figures.append(figure)
        for stale in set(folder.glob("*.png")).difference(figures):
            stale.unlink()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}\nname one in a folder that exists: --out FILE.html"
        ) from error
    return Written(path, tuple(figures), digest.hexdigest())


def leave_report(store: Store, pipeline_id: str, command: str | None = None) -> Written:
    """Write the report of a pipeline into its folder in the store; the journal gets to know a new one.

    Raises:
        UserError: there is no such pipeline, or the store cannot be written.
    """
    facts, here = gather(store, pipeline_id), store.pipeline(pipeline_id)
    written = write(compose(facts, command), here / PAGE)
    names = [str(path.relative_to(written.page.parent)) for path in (written.page, *written.figures)]
    records, journal = store.records(pipeline_id), store.journal(pipeline_id)
    latest = latest_report(journal)
    if latest is None or latest["digest"] != written.digest:
        if records.location() != Folder(here).location():  # of a folder both are one
            for name in names:
                records.replace(name, (here / name).read_bytes(), sync=False)
        journal.append(
            {"type": "report", "digest": written.digest, "files": names, "summary": headline(facts)}
        )
    return written
