"""`pbkd store`: find damage, remove what nothing refers to, fill MLflow from the journals."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_STORE = Path("runs")

app = typer.Typer(help="Look after the store of finished work.")

StoreOption = Annotated[
    Path, typer.Option("--store", envvar="PBKD_STORE", help="Folder of finished work.", show_default=True)
]
Machine = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]


@app.command(epilog="Example: pbkd store check --full")
def check(
    full: Annotated[bool, typer.Option("--full", help="Read all weights and compare their digests.")] = False,
    store: StoreOption = DEFAULT_STORE,
    json_: Machine = False,
) -> None:
    """Find what is damaged or left over, and say what mends it. Exit code 1 if something is damaged."""
    from pipelines.store import Store
    from pipelines.store_check import check as find

    opened = Store.existing(store)
    findings = find(opened, full)
    damaged = sum(finding.severity == "damage" for finding in findings)
    if json_:
        rows = [asdict(finding) | {"path": str(finding.path)} for finding in findings]
        typer.echo(
            json.dumps({"store": str(opened.root), "full": full, "damaged": damaged, "findings": rows})
        )
    else:
        for finding in findings:
            typer.echo(f"{finding.severity}: {finding.path}: {finding.what}\n  cure: {finding.cure}")
        finished = sum(1 for _ in (opened.root / "manifests").glob("[0-9a-f]*.json"))
        extent = "weights too" if full else "weights unread, --full reads them"
        typer.echo(
            f"{finished} finished stages ({extent}): {damaged} damaged, {len(findings) - damaged} left over"
        )
    if damaged:
        raise typer.Exit(1)


@app.command(epilog="Example: pbkd store gc --apply")
def gc(
    apply: Annotated[
        bool, typer.Option("--apply", help="Remove it; without this it is only listed.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    json_: Machine = False,
) -> None:
    """Remove what nothing refers to: work of finished stages, artifacts of no stage, leftovers of crashes."""
    from pipelines.store import Store
    from pipelines.store_check import remove, size_of, unused

    opened = Store.existing(store)
    sizes = {path: size_of(path) for path in unused(opened)}
    if apply:
        for path in sizes:
            remove(opened, path)
    if json_:
        rows = [{"path": str(path), "bytes": size} for path, size in sizes.items()]
        typer.echo(json.dumps({"store": str(opened.root), "applied": apply, "unused": rows}))
        return
    for path, size in sizes.items():
        typer.echo(f"{size / 1e6:10.1f} MB  {path}")
    done = "removed" if apply else "to remove: pbkd store gc --apply"
    typer.echo(f"{sum(sizes.values()) / 1e6:10.1f} MB in {len(sizes)} places {done}")


@app.command(epilog="Example: pbkd store replay --uri http://127.0.0.1:5000")
def replay(
    uri: Annotated[str | None, typer.Option(help="MLflow server; without it the store's database.")] = None,
    store: StoreOption = DEFAULT_STORE,
    json_: Machine = False,
) -> None:
    """Write to MLflow what it lacks of the store's pipelines, from their journals; nothing twice."""
    from pipelines.store import Store
    from pipelines.tracking import default_uri
    from pipelines.tracking import replay as write

    opened = Store.existing(store)
    target = uri or default_uri(opened)
    written = write(target, opened)
    if json_:
        typer.echo(json.dumps({"store": str(opened.root), "uri": target, "pipelines": written}))
    else:
        typer.echo(f"{len(written)} of {len(opened.pipelines())} pipelines written to {target}")
