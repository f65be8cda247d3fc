"""Speed of loaders, `pbkd bench loader`: pbkd's FFCV reader, FFCV itself, and torchvision with a DataLoader.

All give float32 normalized images with two workers; CIFAR-10 is padded, cropped and mirrored, photographs (in
ImageNet's layout) get a RandomResizedCrop to 224 and are mirrored. Each loader has a process of its own; they
take turns, so that all see the same machine. Further processes measure time to the first batch and memory.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pbkd.data import DataSettings, open_data
from pbkd.data.beton import BetonSettings
from pbkd.data.beton_write import prepare
from pbkd.data.datasets import Arrays, load_splits
from pbkd.engine import keep_freed_memory
from pbkd.errors import UserError
from pbkd.torchvision_compat import import_torchvision
from pipelines.jobs import processor

WORKERS = 2
BATCH = {"cifar": 512, "photographs": 128}
PNG_FILES = 10_000  # of CIFAR's images, for ImageFolder
WARM_UP_BATCHES = 8  # more than any of the loaders has ready when its turn begins
SETTLED = 0.2  # of the epochs, after which memory should not grow
RESULTS = Path(__file__).parent / "results" / "loader.csv"
COLUMNS = (
    "what", "loader", "value", "unit", "low", "high", "rounds", "processor", "cores", "torch", "ffcv", "date",
)  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True)
class Places:
    """Where what is read lies: data sets with betons of theirs, and CIFAR's images as PNG files."""

    settings: dict[str, DataSettings]
    images: dict[str, Path]


def measure(
    data: Path, cases: Sequence[str] = tuple(BATCH), *, rounds: int, seconds: float, epochs: int
) -> dict[str, Any]:
    """All measurements of `cases` (keys of BATCH): `rows`, which are also appended to RESULTS, and `floors`.

    Raises UserError when the data or FFCV are missing.
    """
    with tempfile.TemporaryDirectory(prefix="pbkd-") as scratch:
        places = _prepared(data, cases, Path(scratch))
        rows = [row for case in cases for row in _speeds(case, places, rounds, seconds)]
        for case in cases:
            cold, later = _in_process(_start_up, case, places, time.time())
            rows += [
                _row(f"{case}: first batch, cold", "pbkd", [cold], "s"),
                _row(f"{case}: first batch, later", "pbkd", [later], "s"),
            ]
            used = _in_process(_memory, case, places, epochs)
            settled = round(SETTLED * epochs)
            growth = max(used[settled + 1 :]) - max(used[: settled + 1])
            rows.append(_row(f"{case}: memory grows, {epochs} epochs", "pbkd", [growth], "MB"))
    about = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "ffcv": version("ffcv"),
        "date": datetime.now(UTC).date().isoformat(),
    }
    rows = [row | about for row in rows]
    _append(rows)
    return {"benchmark": "loader", "rows": rows, "floors": _floors(rows, cases, epochs)}


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{row['what']:<40}{row['loader']:<14}{row['value']:>12,.2f} {row['unit']}" for row in report["rows"]
    ]
    for floor in report["floors"]:
        holds = "holds" if floor["holds"] else "DOES NOT HOLD"
        lines.append(f"{floor['name']:<54}{floor['value']:>12,.2f} ({floor['floor']:g}) {holds}")
    return "\n".join(lines)


def _floors(rows: list[Row], cases: Sequence[str], epochs: int) -> list[dict[str, Any]]:
    values = {(row["what"], row["loader"]): row["value"] for row in rows}
    at_least = [
        (
            f"{case}: speed / {name}",
            values[f"{case}: speed", "pbkd"] / values[f"{case}: speed", loader],
            floor,
        )
        for case, name, loader, floor in (
            ("cifar", "torchvision", "torchvision", 10.0),
            ("cifar", "bare FFCV", "ffcv", 0.9),
            ("photographs", "torchvision", "torchvision", 2.0),
        )
        if case in cases
    ]
    at_most = [
        (f"{case}: {what}, at most", values[f"{case}: {what}", "pbkd"], most)
        for case in cases
        for what, most in (
            ("first batch, cold", 15.0),
            ("first batch, later", 1.0),
            (f"memory grows, {epochs} epochs", 32.0),
        )
    ]
    return [
        *(
            {"name": name, "value": value, "floor": floor, "holds": value >= floor}
            for name, value, floor in at_least
        ),
        *(
            {"name": name, "value": value, "floor": most, "holds": value <= most}
            for name, value, most in at_most
        ),
    ]


def _prepared(data: Path, cases: Sequence[str], scratch: Path) -> Places:
    every = {
        "cifar": DataSettings(name="cifar10", root=data, loader="ffcv", beton=scratch / "cifar"),
        "photographs": DataSettings(
            name="folder", root=data / "imagenette", loader="ffcv", beton=scratch / "photographs"
        ),
    }
    settings = {case: every[case] for case in cases}
    for case in cases:
        stored = BetonSettings(mode="raw" if case == "cifar" else "jpeg")
        prepare(settings[case], scratch / case, stored, workers=WORKERS)
        open_data(settings[case])  # before minutes of measuring: is FFCV there?
    images = {"cifar": scratch / "png", "photographs": data / "imagenette" / "train"}
    if "cifar" in cases:
        _save_as_png(settings["cifar"], images["cifar"])
    return Places(settings, images)


def _save_as_png(settings: DataSettings, target: Path) -> None:
    source = load_splits(settings)["train"].source
    assert isinstance(source, Arrays)
    for index, (pixels, label) in enumerate(zip(source.images[:PNG_FILES], source.labels, strict=False)):
        folder = target / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{index}.png")


def _speeds(case: str, places: Places, rounds: int, seconds: float) -> list[Row]:
    """Images a second of each loader in turns."""
    spawn = multiprocessing.get_context("spawn")
    ends: dict[str, Connection] = {}
    processes: list[SpawnProcess] = []
    speeds: dict[str, list[float]] = {name: [] for name in LOADERS}
    try:
        for name in LOADERS:
            ends[name], other = spawn.Pipe()
            processes.append(spawn.Process(target=_take_turns, args=(name, case, places, other)))
            processes[-1].start()
            other.close()
        for round_ in range(rounds + 1):
            for name, end in ends.items():
                end.send(seconds)
                speed = _received(end, name)
                if round_:  # the first warms up, and compiles
                    speeds[name].append(speed)
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return [_row(f"{case}: speed", name, found, "images/s") for name, found in speeds.items()]


def _take_turns(name: str, case: str, places: Places, end: Connection) -> None:
    torch.set_num_threads(WORKERS)
    counts = LOADERS[name](case, places)
    while True:
        seconds = end.recv()
        for _ in range(WARM_UP_BATCHES):
            next(counts)
        images, began = 0, time.monotonic()
        while (took := time.monotonic() - began) < seconds or not images:
            images += next(counts)
        end.send(images / took if took else 0.0)


def _received(end: Connection, what: str) -> Any:
    try:
        return end.recv()
    except EOFError as error:
        raise UserError(f"bench loader: the process of {what} ended; what it printed is above") from error


def _pbkd(case: str, places: Places) -> Iterator[int]:
    keep_freed_memory()
    reader = open_data(places.settings[case]).reader("train", BATCH[case], augment=True, shuffle=True)
    epoch = 0
    while True:
        reader.set_epoch(epoch)
        for images, _ in reader:
            yield len(images)
        epoch += 1


def _ffcv(case: str, places: Places) -> Iterator[int]:
    from ffcv.fields.decoders import (
        IntDecoder,
        RandomResizedCropRGBImageDecoder,
        SimpleRGBImageDecoder,
    )
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import (
        Convert,
        RandomHorizontalFlip,
        RandomTranslate,
        Squeeze,
        ToTensor,
        ToTorchImage,
    )

    keep_freed_memory()
    info = places.settings[case].describe()
    mean, std = ([255 * value for value in row] for row in (info.mean, info.std))
    if case == "cifar":
        views = [SimpleRGBImageDecoder(), RandomHorizontalFlip(), RandomTranslate(padding=4)]
    else:
        views = [RandomResizedCropRGBImageDecoder((224, 224)), RandomHorizontalFlip()]
    normalize = import_torchvision().transforms.Normalize(mean, std)
    images = [*views, ToTensor(), ToTorchImage(), Convert(torch.float32), normalize]
    loader = Loader(
        str(places.settings[case].beton_paths()["train"]),
        batch_size=BATCH[case],
        num_workers=WORKERS,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=False,
        pipelines={"image": images, "label": [IntDecoder(), ToTensor(), Squeeze()]},
    )
    while True:
        for batch, _ in loader:
            yield len(batch)


def _torchvision(case: str, places: Places) -> Iterator[int]:
    torchvision = import_torchvision()
    transforms = torchvision.transforms
    info = places.settings[case].describe()
    crop = transforms.RandomCrop(32, padding=4) if case == "cifar" else transforms.RandomResizedCrop(224)
    views = transforms.Compose(
        [
            crop,
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(info.mean, info.std),
        ]
    )
    loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
        torchvision.datasets.ImageFolder(places.images[case], views),
        batch_size=BATCH[case],
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    while True:
        for images, _ in loader:
            yield len(images)


LOADERS: dict[str, Callable[[str, Places], Iterator[int]]] = {
    "torchvision": _torchvision,
    "ffcv": _ffcv,
    "pbkd": _pbkd,
}


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function`, which sends one value to the pipe it gets first, sends from a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    end, other = spawn.Pipe()
    process = spawn.Process(target=function, args=(other, *arguments))
    process.start()
    other.close()
    try:
        return _received(end, function.__name__)
    finally:
        process.join()


def _start_up(end: Connection, case: str, places: Places, began: float) -> None:
    """Seconds to the first batch: from the start of the process, and of a later stage in it."""
    torch.set_num_threads(WORKERS)
    next(_pbkd(case, places))
    cold = time.time() - began
    again = time.monotonic()
    next(_pbkd(case, places))
    end.send((cold, time.monotonic() - again))


def _memory(end: Connection, case: str, places: Places, epochs: int) -> None:
    """Resident memory in MB after each of `epochs` epochs."""
    torch.set_num_threads(WORKERS)
    keep_freed_memory()
    limited = places.settings[case].model_copy(update={"limit": 8 * BATCH[case]})
    reader = open_data(limited).reader("train", BATCH[case], augment=True, shuffle=True)
    used = []
    for epoch in range(epochs):
        reader.set_epoch(epoch)
        for _ in reader:
            pass
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    end.send(used)


def _row(what: str, loader: str, values: list[float], unit: str) -> Row:
    low, high = min(values), max(values)
    median = statistics.median(values)
    numbers = (round(median, 3), unit, round(low, 3), round(high, 3), len(values))
    return dict(zip(COLUMNS, (what, loader, *numbers), strict=False))


def _append(rows: list[Row]) -> None:
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
