"""`pbkd data`: write betons, the files that FFCV reads, and check them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from pbkd.data.settings import DataSettings

STOPPED = 128 + signal.SIGINT
CIFAR = ("cifar10", "cifar100")
AS_OPTIONS = {
    "data.root=DIR": "--root DIR",
    "data.download=true": "--download",
    "data.root=ROOT": "pbkd data prepare ROOT",
}
"""What errors tell a recipe's author to write, and what is typed here."""

app = typer.Typer(help="Write and check betons: the files that FFCV reads at full speed.")

Machine = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Threads that decode; without it one for each processor.")
]


@app.command(epilog="Example: pbkd data prepare cifar10 --root data")
def prepare(
    name: Annotated[
        str,
        typer.Argument(
            metavar="cifar10|cifar100|FOLDER|RECIPE.yaml",
            help="FOLDER holds train/CLASS/* and val/CLASS/*; a recipe says where its data are, and how.",
        ),
    ],
    root: Annotated[Path | None, typer.Option(help="Folder that holds a CIFAR, unpacked.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; without it ROOT/beton/NAME, where recipes look.")
    ] = None,
    mode: Annotated[
        Literal["raw", "jpeg", "smart"] | None,
        typer.Option(help="How images are stored; without it raw for a CIFAR and jpeg for a folder."),
    ] = None,
    max_resolution: Annotated[
        int | None,
        typer.Option(min=8, max=65535, help="Scale larger images down to this longer side, in pixels."),
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(
            min=1, max=100, help="Encode every JPEG anew with this; without it JPEG files are kept."
        ),
    ] = None,
    workers: Workers = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out images that cannot be read, and list them.")
    ] = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch a missing CIFAR into --root.")] = False,
    json_: Machine = False,
) -> None:
    """Write train.beton and test.beton of a data set, after every image has been checked.

    What is there and intact is kept; an interrupted split starts over when the same command is typed again.
    """
    from rich.console import Console

    from pbkd.data.beton import BetonSettings, default_folder
    from pbkd.data.beton_write import prepare as write

    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, _interrupt)
    with _cures_as_options():
        data = _data(name, root, download)
        settings = BetonSettings(
            mode=mode or ("raw" if data.name in CIFAR else "jpeg"),
            max_resolution=max_resolution,
            quality=quality,
            orientation=data.orientation,
        )
        place = out or data.beton or default_folder(data.data_root(), data.name)
        try:
            with _progress(console) as progress:
                made = write(
                    data,
                    place,
                    settings,
                    workers=workers or _processors(),
                    skip_broken=skip_broken,
                    progress=progress,
                )
        except KeyboardInterrupt:
            console.print("stopped; the same command starts the unfinished split over")
            raise typer.Exit(STOPPED) from None
    if json_:
        rows = [
            {
                "path": str(beton.path),
                "state": "written" if beton.written else "kept",
                "seconds": beton.seconds,
                "manifest": beton.manifest.model_dump(mode="json"),
            }
            for beton in made
        ]
        typer.echo(json.dumps({"out": str(place), "betons": rows}))
        return
    for beton in made:
        state = f"written in {beton.seconds:.0f} s" if beton.written else "kept, it is intact"
        typer.echo(
            f"{beton.path}: {beton.manifest.samples} samples, {beton.manifest.bytes / 1e6:.0f} MB, {state}"
        )
    broken = made[0].manifest.broken
    if broken:
        typer.echo(
            f"left out {len(broken)} broken images, listed in the manifests: {broken[0]}, …\n"
            "remove them from the data set before training: until then these betons are not of the same data"
        )


@app.command(epilog="Example: pbkd data verify data/beton/cifar10 --full")
def verify(
    path: Annotated[Path, typer.Argument(metavar="FILE|FOLDER", help="A beton, or a folder of betons.")],
    full: Annotated[
        bool, typer.Option("--full", help="Compare the checksum and decode every image as well.")
    ] = False,
    workers: Workers = None,
    json_: Machine = False,
) -> None:
    """Check betons: manifest, size, header and tables within a second; --full reads all of the file."""
    from rich.console import Console

    from pbkd.data.beton import verify as check

    rows: list[dict[str, Any]] = []
    with _progress(Console(stderr=True)) as progress:
        for file in _betons(path):

            def shown(done: int, count: int, split: str = file.stem) -> None:
                progress(split, done, count)

            manifest = check(file, full, workers or _processors(), shown)
            rows.append({"path": str(file), "full": full, "manifest": manifest.model_dump(mode="json")})
    if json_:
        typer.echo(json.dumps({"betons": rows}))
        return
    for row in rows:
        extent = "sound, checksum and every image too" if full else "sound; --full checks the images too"
        typer.echo(f"{row['path']}: {row['manifest']['samples']} samples, {extent}")


def _data(name: str, root: Path | None, download: bool) -> DataSettings:
    from pbkd.data.settings import DataSettings
    from pbkd.errors import UserError

    if name in CIFAR:
        if root is None:
            raise UserError(f"{name}: --root is missing\ncure: --root DIR with the folder that holds it")
        return DataSettings.model_validate({"name": name, "root": root, "download": download})
    if name.endswith((".yaml", ".yml")):
        if root is not None or download:
            raise UserError(f"{name}: says where its data are; leave --root and --download out")
        from pipelines.recipe_file import load_recipe

        return load_recipe(Path(name)).data
    if root is not None or download:
        raise UserError(
            f"{name}: --root and --download are for cifar10 and cifar100\ncure: pbkd data prepare FOLDER"
        )
    if not Path(name).is_dir():
        raise UserError(f"{name}: there is no such folder\nexpected cifar10, cifar100 or FOLDER")
    return DataSettings(name="folder", root=Path(name))


def _betons(path: Path) -> list[Path]:
    from pbkd.errors import UserError

    if not path.is_dir():
        return [path]
    found = sorted({*path.glob("*.beton"), *(place.with_suffix("") for place in path.glob("*.beton.json"))})
    if not found:
        raise UserError(f"{path}: holds no beton\ncure: pbkd data prepare, or name the folder it wrote to")
    return found


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A function to be told (split, images done, of all): bars, or without a terminal a line a tenth."""
    from rich.progress import MofNCompleteColumn, Progress

    if not console.is_terminal:

        def print_tenths(split: str, done: int, count: int) -> None:
            if done * 10 // count > (done - 1) * 10 // count:
                console.print(f"{split}: {done} of {count} images", highlight=False)

        yield print_tenths
        return
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as bars:
        tasks: dict[str, Any] = {}

        def show(split: str, done: int, count: int) -> None:
            if split not in tasks:
                tasks[split] = bars.add_task(split, total=count)
            bars.update(tasks[split], completed=done)

        yield show


@contextmanager
def _cures_as_options() -> Iterator[None]:
    from pbkd.errors import UserError

    try:
        yield
    except UserError as error:
        text = str(error)
        for key, option in AS_OPTIONS.items():
            text = text.replace(key, option)
        raise UserError(text) from error


def _processors() -> int:
    return len(os.sched_getaffinity(0))


def _interrupt(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: what follows is the orderly end
    raise KeyboardInterrupt
