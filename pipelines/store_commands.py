"""`pbkd store`: find damage, remove what nothing refers to, fill MLflow from the journals."""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import asdict
from typing import Annotated

import typer

DEFAULT_STORE = "runs"

app = typer.Typer(help="Look after the store of finished work.")

StoreOption = Annotated[
    str,
    typer.Option("--store", envvar="PBKD_STORE", metavar="DIR|URL", help="Where finished work is."),
]
Machine = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]


def store_argument(store: str) -> str:
    """What a command that is shown needs at its end, to mean `store` when it is typed here."""
    is_default = store == os.environ.get("PBKD_STORE", DEFAULT_STORE)
    return "" if is_default else f" --store {shlex.quote(store)}"


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
        rows = [asdict(finding) for finding in findings]
        typer.echo(json.dumps({"store": opened.location, "full": full, "damaged": damaged, "findings": rows}))
    else:
        for finding in findings:
            typer.echo(f"{finding.severity}: {finding.path}: {finding.what}\n  cure: {finding.cure}")
        finished = len(opened.keys())
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
    from pipelines.store_check import location, remove, size_of, unused

    opened = Store.existing(store)
    if apply:
        opened.require_writable()
    names = unused(opened)
    sizes = {location(opened, name): size_of(opened, name) for name in names}
    if apply:
        kept = [name for name, lease in names.items() if not remove(opened, name, lease)]
        for name in kept:  # somebody has begun to use it meanwhile
            del sizes[location(opened, name)]
    if json_:
        rows = [{"path": path, "bytes": size} for path, size in sizes.items()]
        typer.echo(json.dumps({"store": opened.location, "applied": apply, "unused": rows}))
        return
    for path, size in sizes.items():
        typer.echo(f"{size / 1e6:10.1f} MB  {path}")
    done = "removed" if apply else "to remove: pbkd store gc --apply"
    typer.echo(f"{sum(sizes.values()) / 1e6:10.1f} MB in {len(sizes)} places {done}")


@app.command(epilog="Example: pbkd store drop 0123abcd4567")
def drop(
    keys: Annotated[list[str], typer.Argument(metavar="KEY...", help="Stage keys, or 6+ digits of them.")],
    store: StoreOption = DEFAULT_STORE,
) -> None:
    """Forget finished stages, so that they run again: what mends a damaged one."""
    from pipelines.store import Store

    opened = Store.existing(store)
    opened.require_writable()
    chosen = [opened.key(given) for given in keys]
    opened.drop(chosen)
    typer.echo(f"{len(set(chosen))} stages dropped; the next run that needs them repeats them")


@app.command(epilog="Example: pbkd store replay --uri http://127.0.0.1:5000")
def replay(
    uri: Annotated[
        str | None, typer.Option(help="MLflow server; MLFLOW_TRACKING_URI, or the store's database.")
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    json_: Machine = False,
) -> None:
    """Write to MLflow what it lacks of the store's pipelines, from their journals; nothing twice."""
    from pipelines.recipe import without_secrets
    from pipelines.store import Store
    from pipelines.tracking import default_uri
    from pipelines.tracking import replay as write

    if uri is not None:
        without_secrets(uri)

    opened = Store.existing(store)
    opened.require_writable()
    target = uri or default_uri(opened)
    written = write(target, opened)
    if json_:
        typer.echo(json.dumps({"store": opened.location, "uri": target, "pipelines": written}))
    else:
        typer.echo(f"{len(written)} of {len(opened.pipelines())} pipelines written to {target}")
