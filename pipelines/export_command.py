"""`pbkd export`: a network of the store as a file for other tools. Imports what is heavy only when called."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipelines.inspect_command import AllowImport
from pipelines.store_commands import DEFAULT_STORE, Machine, StoreOption


class Form(StrEnum):
    """The formats of `pbkd.export`."""

    onnx = "onnx"
    pt2 = "pt2"
    safetensors = "safetensors"


def export(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="ARTIFACT",
            help="Artifact or stage key (6+ digits), artifact folder, or MLflow run id.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[data.KEY=VALUE]...", help="Where the data are now, such as data.root=DIR."),
    ] = None,
    form: Annotated[Form, typer.Option("--format", help="What to write.")] = Form.onnx,
    dynamic_batch: Annotated[
        bool, typer.Option("--dynamic-batch", help="Take any number of images at once; without it, one.")
    ] = False,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Half precision inside; images and logits stay float32.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Default: exports/RECIPE-STAGE-DIGEST-FORMAT.", show_default=False
        ),
    ] = None,
    without_data: Annotated[
        bool, typer.Option("--without-data", help="Compare on noise: the data are not at hand.")
    ] = False,
    licence: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Licence of the data, for the model card.")
    ] = None,
    with_preprocessing: Annotated[
        bool,
        typer.Option(
            "--with-preprocessing", help="Take uint8 pixels (N, H, W, C), and normalize them inside."
        ),
    ] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0, help="What logits may differ by; without it, what float32 rounds by.", show_default=False
        ),
    ] = None,
    store: StoreOption = DEFAULT_STORE,
    allow_import: AllowImport = False,
    json_: Machine = False,
) -> None:
    """Write a network as a file that other tools run, compared with PyTorch on the test images, and its card.

    The folder it goes to holds the file, README.md (the model card) and export.json; with ONNX it is an
    MLflow model, too: mlflow models serve -m FOLDER --env-manager local.
    """
    from pipelines.exported import Wishes, export_artifact
    from pipelines.store import Store

    wishes = Wishes(form.value, dynamic_batch, fp16, without_data, licence, with_preprocessing, tolerance)
    facts = export_artifact(Store.existing(store), reference, overrides or [], wishes, out)
    if json_:
        typer.echo(json.dumps(facts))
        return
    typer.echo(f"file     {facts['path']} ({facts['bytes'] / 1e6:.2f} MB)")
    typer.echo(
        f"parity   logits differ by at most {facts['max_abs_diff']:.2g} (allowed {facts['tolerance']:.2g}, "
        f"its own rounding {facts['rounding']:.2g}); "
        f"{facts['agreement']:.2f} % of {facts['images']} {facts['compared_on']} get the same class"
    )
    if (latency := facts["latency_ms"]) is not None:
        typer.echo(
            f"latency  {latency['file']:.2f} ms, by PyTorch {latency['pytorch']:.2f} ms "
            f"(one image, CPU threads: {facts['threads']})"
        )
    typer.echo(f"card     {facts['card']}")
    if facts["serve"] is not None:
        typer.echo(f"serve    {facts['serve']}")
