"""`pbkd inspect`: the blocks of a network, before anything is run. Imports what is heavy only when called."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pbkd.measure import Cost
    from pipelines.inspection import Inspection, Part

WIDTH_WITHOUT_TERMINAL = 160


def _allow(value: bool) -> bool:
    if value:  # read by pbkd.networks.builders, here and in the processes that this one starts
        os.environ["PBKD_ALLOW_IMPORT"] = "1"
    return value


AllowImport = Annotated[
    bool,
    typer.Option(
        "--allow-import",
        envvar="PBKD_ALLOW_IMPORT",
        callback=_allow,
        help="Import the modules that networks named package.module:function come from.",
    ),
]


def inspect(
    arch: Annotated[
        str,
        typer.Argument(
            metavar="ARCH", help="resnet56, torchvision/NAME, timm/NAME or package.module:function."
        ),
    ],
    input_size: Annotated[
        int | None, typer.Option(min=1, help="Height and width of the images; default 224, CIFAR ResNets 32.")
    ] = None,
    channels: Annotated[int, typer.Option(min=1, help="Of the images.")] = 3,
    classes: Annotated[int | None, typer.Option(min=1, help="Default 1000, CIFAR ResNets 10.")] = None,
    cuts: Annotated[
        str | None,
        typer.Option(metavar="MODULE[,MODULE]", help="Where blocks end, instead of automatically."),
    ] = None,
    width: Annotated[
        list[float] | None, typer.Option(min=0.01, max=1.0, help="Width of student blocks; may be repeated.")
    ] = None,
    latency: Annotated[bool, typer.Option("--latency", help="Measure each block on this machine.")] = False,
    allow_import: AllowImport = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")] = False,
) -> None:
    """Show the blocks a network is divided into, their cost, and that of student blocks of some width."""
    from pipelines.inspection import inspect_network

    widths = width or [0.5]
    named = None if cuts is None else [cut.strip() for cut in cuts.split(",") if cut.strip()]
    found = inspect_network(arch, input_size, classes, named, widths, latency, channels)
    if json_:
        typer.echo(json.dumps(found.as_json()))
    else:
        _print(found, widths, latency)


def _print(found: Inspection, widths: list[float], has_latency: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL)
    size = "x".join(map(str, found.spec.input_shape))
    title = f"{found.spec.arch}, images of {size}, {found.spec.num_classes} classes"
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column("block", no_wrap=True)
    columns = ["output", "sees", "params", "MACs", *(["latency"] if has_latency else [])]
    for column in [*columns, *(f"student {width:g}" for width in widths)]:
        table.add_column(column, justify="right", no_wrap=True)
    whole = sum(part.latency_ms or 0.0 for part in found.parts)
    reasons: dict[str, None] = {}
    for number, part in enumerate(found.parts):
        is_block = 0 < number <= len(found.blocks)
        name = f"{number} {part.name}" if is_block and not part.name.startswith("block") else part.name
        row = [name, "x".join(map(str, part.output_shape)), *_facts(part)]
        if part.latency_ms is not None:
            row.append(f"{part.latency_ms / whole:.0%}")
        for student in part.students.values():
            if isinstance(student, str):
                reasons[student] = None
                row.append("none")
            else:
                row.append(_student(student, part.cost))
        table.add_row(*row)
    console.print(table)
    console.print(
        f"{_short(found.cost.params)} parameters, {_short(found.cost.macs)} multiply-accumulates; "
        "stem, blocks and classifier compute exactly what the original does",
        soft_wrap=True,
    )
    layers: dict[str, list[str]] = {}
    for alone in found.left_alone:
        for layer, reason in alone:
            layers.setdefault(reason, []).append(layer)
    for reason, names in layers.items():
        kept = f"{', '.join(names)} keep" if len(names) > 1 else f"{names[0]} keeps"
        console.print(f"in a student, {kept} all channels: {reason}", soft_wrap=True, markup=False)
    for reason in reasons:
        console.print(f"no student: {reason}", soft_wrap=True, markup=False)


def _facts(part: Part) -> list[str]:
    seen = "" if part.receptive_field is None else str(part.receptive_field)
    return [seen, _short(part.cost.params), _short(part.cost.macs)]


def _student(student: Cost, teacher: Cost) -> str:
    return f"{_short(student.macs)} ({teacher.macs / max(1, student.macs):.2f}x)"


def _short(number: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
