"""`pbkd bench`: measurements against other tools. Each command imports what it needs when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Case = Literal["cifar", "photographs"]

app = typer.Typer(help="Measure pbkd against other tools, side by side.")


@app.callback()
def bench() -> None:
    """Measure pbkd against other tools, side by side."""


@app.command(epilog="Example: PBKD_DATA=data pbkd bench loader --json")
def loader(
    data: Annotated[
        Path, typer.Option(envvar="PBKD_DATA", help="Folder with cifar-10-batches-py and imagenette.")
    ],
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each loader; the median counts.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="Length of a turn.")] = 5.0,
    epochs: Annotated[int, typer.Option(min=2, help="For the measurement of memory.")] = 50,
    case: Annotated[Case | None, typer.Option(help="Only this one; both when it is not given.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")] = False,
) -> None:
    """Loaders: pbkd's FFCV reader, FFCV itself, torchvision's ImageFolder with DataLoader; two workers each.

    Appends its rows to benchmarks/results/loader.csv. Exit code 1 if a floor does not hold.
    """
    import json

    from benchmarks.loader import BATCH, measure, text

    report = measure(data, [case] if case else list(BATCH), rounds=rounds, seconds=seconds, epochs=epochs)
    typer.echo(json.dumps(report) if json_ else text(report))
    if not all(floor["holds"] for floor in report["floors"]):
        raise typer.Exit(1)
