"""A report in files: the page, and each figure as a PNG beside it; what it takes for MLflow to get them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pbkd.errors import UserError
from pbkd.storage import Folder, Storage
from pipelines.journal import Journal, latest_report
from pipelines.reporting.facts import gather
from pipelines.reporting.page import Report, compose, headline
from pipelines.reporting.search_facts import gather_search
from pipelines.reporting.search_page import compose_search, headline_of
from pipelines.store import Store

PAGE = "report.html"
SEARCH_FILES = ("trials.csv", "pareto.png", "importance.png")


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


def leave_report(
    store: Store, pipeline_id: str, command: str | None = None, out: Path | None = None
) -> Written:
    """Write the report of a pipeline into its folder in the store; the journal gets to know a new one.

    With `out`, it is written there alone; of a store that may only be read, where the command is typed.

    Raises:
        UserError: there is no such pipeline, or the page cannot be written.
    """
    facts = gather(store, pipeline_id)
    if (elsewhere := out or _outside(store, pipeline_id)) is not None:
        return write(compose(facts, command), elsewhere)
    written = write(compose(facts, command), store.pipeline(pipeline_id) / PAGE)
    _record(written, "report", headline(facts), store.records(pipeline_id))
    return written


def leave_search_report(store: Store, name: str, out: Path | None = None) -> Written:
    """Write the report of a search into its folder in the store; its journal gets to know a new one.

    What `pbkd tune` left there, its table and its figures, goes with it. `out`: see `leave_report`. Raises
    UserError if the page cannot be written.
    """
    facts = gather_search(store, name)
    if (elsewhere := out or _outside(store, name)) is not None:
        return write(compose_search(facts), elsewhere)
    here = store.search(name)
    written = write(compose_search(facts), here / PAGE)
    beside = [path for path in (here / file for file in SEARCH_FILES) if path.is_file()]
    _record(written, "page", headline_of(facts), store.search_records(name), beside)
    return written


def _outside(store: Store, name: str) -> Path | None:
    return Path(f"report-{name}.html") if store.is_write_protected else None


def _record(written: Written, kind: str, summary: str, records: Storage, beside: Sequence[Path] = ()) -> None:
    """Have the journal say that there is this report, unless it does; `beside` it are files of the folder."""
    here, journal = written.page.parent, Journal(records)
    digest = hashlib.sha256(written.digest.encode())
    for path in beside:
        digest.update(path.read_bytes())
    known = digest.hexdigest() if beside else written.digest
    names = [str(path.relative_to(here)) for path in (written.page, *written.figures, *beside)]
    latest = latest_report(journal, kind)
    if latest is not None and (latest["digest"], latest.get("files")) == (known, names):
        return
    if records.location() != Folder(here).location():  # of a folder both are one
        for name in names:
            records.replace(name, (here / name).read_bytes(), sync=False)
    journal.append({"type": kind, "digest": known, "files": names, "summary": summary})
