"""The FFCV reader against the torch reader, and against itself on other threads, ranks and positions."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from pbkd.data import Data, DataSettings, open_data, resolve_loader
from pbkd.data.beton import BetonManifest, BetonSettings, manifest_path
from pbkd.data.beton_reader import Beton, open_beton, read_beton
from pbkd.data.beton_samples import encoder
from pbkd.data.beton_write import prepare, write_beton
from pbkd.data.datasets import Arrays, divided
from pbkd.data.memory import RecycledMemory
from pbkd.data.pixels import Views
from pbkd.errors import UserError
from pipelines.graph import build_graph
from pipelines.recipe_file import load_recipe
from pipelines.store import Store
from tests.integration.pbkd_process import ROOT, run, states, with_database
from tests.unit.image_folders import save_folder

pytestmark = pytest.mark.ffcv

RECIPE = ROOT / "pipelines" / "recipes" / "imagenette_resnet18.yaml"
TRAIN = {"seed": 7, "augment": True, "shuffle": True}
Batches = list[tuple[Tensor, Tensor]]


def batches(
    data: Data, split: str = "train", size: int = 16, epoch: int = 2, first: int = 0, **options
) -> Batches:
    reader = data.reader(split, size, **options)
    reader.set_epoch(epoch)
    reader.resume_at(first)
    return list(reader)


def equal(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


def joined(*shares: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([images for images, _ in shares]), torch.cat([labels for _, labels in shares])


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_arrays(arrays: Arrays, path: Path) -> Beton:
    """A beton of images in memory, as `prepare` makes it of a CIFAR."""
    encode = encoder(arrays, BetonSettings())
    with path.open("wb") as file:
        samples = ((encode(index), int(label)) for index, label in enumerate(arrays.labels))
        tables = write_beton(file, samples, len(arrays.labels))
    manifest = BetonManifest(
        name="cifar10",
        split="train" if path.stem == "train" else "test",
        bytes=path.stat().st_size,
        sha256=sha256(path.read_bytes()).hexdigest(),
        tables=tables.digest(),
        samples=len(tables.samples),
        classes=10,
        class_names=None,
        settings=BetonSettings(),
        shape=tables.shape,
        source_digest="none",
    )
    manifest_path(path).write_text(manifest.sealed().model_dump_json())
    return open_beton(path)


def random_arrays(count: int, seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    return Arrays(images, random.integers(0, 10, count))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[dict[str, Arrays], dict[str, Beton]]:
    """Random images of CIFAR's shape: in memory, and in betons."""
    folder = tmp_path_factory.mktemp("small")
    arrays = {"train": random_arrays(150, 0), "test": random_arrays(50, 1)}
    return arrays, {name: write_arrays(part, folder / f"{name}.beton") for name, part in arrays.items()}


def both(small, augment: str = "auto") -> tuple[Data, Data]:
    settings = DataSettings(name="cifar10", augment=augment)
    first, second = (Data(settings, divided(settings, parts), "0123456789") for parts in small)
    return first, second


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A folder of images of all sizes, with betons at their usual place."""
    root = save_folder(tmp_path_factory.mktemp("photographs"), train=20, val=5)
    prepare(settings(root), root / "beton" / "folder", BetonSettings(mode="smart"))
    return root


def settings(root: Path, **changes) -> DataSettings:
    return DataSettings(name="folder", root=root, image_size=16, **changes)


def in_betons(root: Path, folder: Path, mode: str = "jpeg") -> Data:
    """The same folder from betons of its own, which a test may damage."""
    prepare(settings(root), folder, BetonSettings(mode=mode))
    return open_data(settings(root, loader="ffcv", beton=folder))


@pytest.mark.parametrize("augment", ["none", "shift", "crop_flip", "crop_flip_cutout"])
def test_small_images_are_the_same_bits_by_both_readers(small, augment: str):
    torch_reader, ffcv_reader = both(small, augment)
    for options in (TRAIN, {**TRAIN, "rank": 1, "world": 3}, {**TRAIN, "channels_last": True, "first": 4}):
        expected, found = (batches(data, **options) for data in (torch_reader, ffcv_reader))
        assert equal(expected, found)
        assert all(a.stride() == b.stride() for (a, _), (b, _) in zip(expected, found, strict=True))
    for split in ("val", "test"):
        for rank in range(2):
            options = {"split": split, "size": 33, "rank": rank, "world": 2}
            assert equal(*(batches(data, **options) for data in (torch_reader, ffcv_reader)))


@pytest.mark.data("cifar-10-batches-py")
def test_cifar10_is_the_same_bits_by_both_readers(tmp_path: Path):
    cifar = DataSettings(name="cifar10", root=Path(os.environ["PBKD_DATA"]), beton=tmp_path)
    prepare(cifar, tmp_path, BetonSettings(), workers=2)
    found = open_data(cifar)
    assert found.settings.loader == "ffcv"
    expected = open_data(cifar.model_copy(update={"loader": "torch"}))
    assert found.sizes == expected.sizes
    for split, options in (("train", TRAIN), ("val", {}), ("test", {})):
        assert equal(*(batches(data, split, 500, **options) for data in (expected, found)))


@pytest.mark.parametrize("mode", ["raw", "jpeg", "smart"])
def test_photographs_look_as_by_the_torch_reader(photographs: Path, mode: str, tmp_path: Path):
    found, expected = in_betons(photographs, tmp_path, mode), open_data(settings(photographs, loader="torch"))
    for split, options in (("train", TRAIN), ("val", {}), ("test", {})):
        ours, theirs = (joined(*batches(data, split, **options)) for data in (found, expected))
        assert torch.equal(ours[1], theirs[1])
        assert ours[0].shape == theirs[0].shape and ours[0].is_contiguous()
        # What became JPEG is another image.
        assert distance(ours[0], theirs[0]) < (ROUNDING if mode == "raw" else 0.3)
    other = joined(*batches(expected, epoch=3, **TRAIN))[0]
    assert distance(joined(*batches(found, **TRAIN))[0], other) > 0.5


ROUNDING = 0.1 / 255 / 0.225  # of normalized pixels
WAYS: list[dict[str, Any]] = [
    {"interpolation": "nearest"},
    {"interpolation": "bicubic", "resize_size": 23},
    {"interpolation": "lanczos", "resize": "both", "resize_size": 40, "augment": "crop_flip"},
    {"interpolation": "hamming", "image_size": 48},
    {"interpolation": "box", "resize": "none", "crop": "center", "augment": "crop_flip_cutout"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way["interpolation"])
def test_both_readers_see_an_image_in_the_same_way(way: dict[str, Any], tmp_path: Path) -> None:
    """Enlarged, made smaller, squeezed, cut: a pixel differs by less than a tenth in the mean, of 255."""
    root = save_folder(tmp_path / "images")
    seen = DataSettings.model_validate({"name": "folder", "root": root, "image_size": 16} | way)
    prepare(seen, tmp_path, BetonSettings(mode="raw"))
    found = open_data(seen.model_copy(update={"beton": tmp_path}))
    expected = open_data(seen.model_copy(update={"loader": "torch"}))
    assert (found.settings.loader, expected.settings.loader) == ("ffcv", "torch")
    for split, options in (("train", TRAIN), ("test", {})):
        ours, theirs = (joined(*batches(data, split, **options)) for data in (found, expected))
        assert torch.equal(ours[1], theirs[1]) and distance(ours[0], theirs[0]) < ROUNDING


def test_photographs_are_turned_in_betons_or_refused(tmp_path: Path) -> None:
    root = save_folder(tmp_path / "images")
    tag = Image.Exif()
    tag[ExifTags.Base.Orientation] = 6
    for path in root.rglob("*.JPEG"):
        Image.open(path).save(path, exif=tag, quality=95)
    turned = settings(root, orientation="exif", val_fraction=0)
    prepare(turned, root / "beton" / "folder", BetonSettings(mode="smart", orientation="exif"))
    found, expected = (
        open_data(turned.model_copy(update={"loader": loader})) for loader in ("ffcv", "torch")
    )
    assert distance(joined(*batches(found, "test"))[0], joined(*batches(expected, "test"))[0]) < ROUNDING
    with pytest.raises(UserError, match=r"has orientation exif, and data\.orientation=stored"):
        open_data(settings(root, loader="ffcv"))


def distance(first: Tensor, second: Tensor) -> float:
    return (first - second).abs().mean().item()


@pytest.mark.parametrize("options", [TRAIN, {"split": "test"}])
def test_threads_ranks_and_position_change_no_bit(photographs: Path, options):
    data = open_data(settings(photographs))
    assert data.settings.loader == "ffcv"
    with torch_threads(1):
        whole = batches(data, **options)
    with torch_threads(2):
        assert equal(batches(open_data(settings(photographs)), **options), whole)
    ranks = [batches(data, first=1, rank=rank, world=2, **options) for rank in range(2)]
    shares = list(zip(*ranks, strict=False))
    assert equal([joined(*share) for share in shares], whole[1 : 1 + len(shares)])
    assert not equal(batches(data, epoch=3, **options), whole) or "augment" not in options


def test_progressive_resizing_is_that_of_the_torch_reader(photographs: Path):
    progressive = ((0, 8), (2, 12))
    found, expected = (
        open_data(settings(photographs, progressive=progressive, loader=loader))
        for loader in ("ffcv", "torch")
    )
    for epoch in (1, 2):
        ours, theirs = (joined(*batches(data, epoch=epoch, **TRAIN))[0] for data in (found, expected))
        assert ours.shape == theirs.shape and distance(ours, theirs) < 0.25 * distance(
            ours, theirs.roll(1, 0)
        )


def test_an_evaluation_gives_every_sample_once(photographs: Path):
    data = open_data(settings(photographs))
    whole = joined(*batches(data, "test", 100))[0]
    ranks = [batches(data, "test", 4, rank=rank, world=3) for rank in range(3)]
    parts = torch.cat([joined(*part)[0] for part in ranks])
    assert sorted(map(bytes, whole.numpy())) == sorted(map(bytes, parts.numpy()))
    assert len(whole) == data.sizes["test"] == 15


def test_batches_are_the_consumers_own(small):
    _, data = both(small)
    kept = batches(data, **TRAIN)
    copies = [(images.clone(), labels.clone()) for images, labels in kept]
    for images, labels in batches(data, **TRAIN):
        images.zero_()
        labels.zero_()
    assert equal(kept, copies) and equal(batches(data, **TRAIN), copies)


def test_two_iterations_at_the_same_time_do_not_mix(photographs: Path, small):
    data, (_, other) = open_data(settings(photographs)), both(small)
    alone = batches(data, **TRAIN), batches(other, **TRAIN)
    readers = [each.reader("train", 16, **TRAIN) for each in (data, other)]
    for reader in readers:
        reader.set_epoch(2)
    together = list(zip(*readers, strict=False))
    assert len(together) > 2
    for position in range(2):
        assert equal([pair[position] for pair in together], alone[position][: len(together)])


def reading() -> int:
    """Threads and open betons of this process."""
    threads = sum(thread.name.startswith("pbkd-beton") for thread in threading.enumerate())
    files = Path("/proc/self/fd").iterdir()
    return threads + sum(os.path.realpath(file).endswith(".beton") for file in files)


def test_nothing_is_left_of_an_iteration_that_ends_early(photographs: Path):
    reader = open_data(settings(photographs)).reader("train", 4, **TRAIN)
    for _ in reader:
        assert reading() == 2
        break
    assert reading() == 0
    kept = iter(reader)
    next(kept)
    assert reading() == 2
    reader.close()
    assert reading() == 0 and next(kept, None) is None


def test_kernels_are_compiled_once_for_all_files_splits_and_views(photographs: Path, tmp_path: Path, small):
    from pbkd.data import beton_kernels

    for data in (open_data(settings(photographs)), in_betons(photographs, tmp_path, "raw")):
        for options in (TRAIN, {"split": "test"}, {**TRAIN, "seed": 8, "epoch": 0}):
            batches(data, **options)
    for augment in ("none", "crop_flip_cutout"):
        batches(both(small, augment)[1], **TRAIN)
    assert len(beton_kernels.photographs.signatures) == len(beton_kernels.small.signatures) == 1


def test_a_thread_that_ends_is_an_error_and_no_hang(small, monkeypatch: pytest.MonkeyPatch):
    def end(*_: object) -> None:
        raise SystemExit("the thread ends here")

    _, data = both(small)
    monkeypatch.setattr("pbkd.data.beton_reader._read_small", end)
    with pytest.raises(SystemExit):
        batches(data, **TRAIN)
    assert reading() == 0


def damaged(folder: Path, data: Data, what: bytes) -> int:
    """Overwrite the beginning of one training image's bytes; its place in the split."""
    beton = open_beton(folder / "train.beton")
    sample = int(np.flatnonzero(~beton.are_raw)[0])
    with beton.path.open("r+b") as file:
        file.seek(int(beton.offsets[sample]))
        file.write(what)
    return sample


def test_a_damaged_image_is_an_error_that_names_file_and_sample(photographs: Path, tmp_path: Path):
    data = in_betons(photographs, tmp_path)
    sample = damaged(tmp_path, data, bytes(200))
    data = open_data(settings(photographs, loader="ffcv", beton=tmp_path, val_fraction=0))
    with pytest.raises(UserError, match=rf"train\.beton: sample {sample} cannot be decoded") as caught:
        batches(data, **TRAIN)
    assert "cure: pbkd data prepare" in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_content_that_still_decodes_is_found_by_its_hash(photographs: Path, tmp_path: Path):
    opened = in_betons(photographs, tmp_path, "raw").settings
    open_data(opened, cache=tmp_path / "cache")
    beton = open_beton(tmp_path / "test.beton")
    with beton.path.open("r+b") as file:
        file.seek(int(beton.offsets[0]))
        file.write(b"other pixels")
    with pytest.raises(UserError, match=r"test\.beton: .*sha256(.|\n)*pbkd data prepare"):
        open_data(opened, cache=tmp_path / "cache")


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[ProcessPoolExecutor]:
    """A process that may crash; what was asked of it is an error then."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("how", ["cut", "emptied", "overwritten", "replaced", "removed"])
def test_a_file_that_changes_while_it_is_read_is_an_error(
    photographs: Path, how: str, elsewhere: ProcessPoolExecutor, tmp_path: Path
):
    said, left = elsewhere.submit(read_what_changes, photographs, how, tmp_path).result(timeout=120)
    assert re.search(r"train\.beton: (was changed or replaced|.*cannot be (found|read|decoded))", said[0])
    assert re.search(r"train\.beton", said[1])
    assert left == 0


def read_what_changes(root: Path, how: str, folder: Path) -> tuple[list[str], int]:
    """What is said by the iteration that is under way and by the next; what is left open."""
    data = in_betons(root, folder)
    path = folder / "train.beton"
    reader = data.reader("train", 4, **TRAIN)
    reading_on = iter(reader)
    next(reading_on)
    if how in ("cut", "emptied"):
        os.truncate(path, 0 if how == "emptied" else path.stat().st_size - 1000)
    elif how == "overwritten":
        damaged(folder, data, b"other")
    elif how == "replaced":
        shutil.copy(path, folder / "other")
        (folder / "other").replace(path)
    else:
        path.unlink()
    said = []
    for iteration in (reading_on, iter(reader)):
        with pytest.raises(UserError) as caught:
            list(iteration)
        said.append(str(caught.value))
    return said, reading()


@pytest.mark.parametrize("index", [150, -1, 2**40])
@pytest.mark.parametrize("are_photographs", [True, False])
def test_an_index_of_no_sample_is_an_error(
    index: int, are_photographs: bool, small, photographs: Path, elsewhere: ProcessPoolExecutor
):
    path = photographs / "beton" / "folder" / "train.beton" if are_photographs else small[1]["train"].path
    said = elsewhere.submit(read_index, path, index).result(timeout=120)
    assert said.startswith(f"{path}: sample {index} of ")


def read_index(path: Path, index: int) -> str:
    """What is said of an index."""
    seen = DataSettings(name="folder", image_size=32).preprocessing()
    views = Views("none", 0, 0, 32, np.zeros(3, np.uint8), seen)
    batches = iter([np.array([0, index])])
    with pytest.raises(IndexError) as caught:
        list(read_beton(open_beton(path), views, 1, RecycledMemory(), batches))
    return str(caught.value)


def test_auto_takes_betons_of_these_data_only(tmp_path: Path):
    root = save_folder(tmp_path / "images")
    assert resolve_loader(settings(root)).loader == "torch"
    with pytest.raises(UserError, match=r"train\.beton(.|\n)*pbkd data prepare"):
        resolve_loader(settings(root, loader="ffcv"))
    prepare(settings(root), tmp_path / "betons", BetonSettings())
    made = settings(root, beton=tmp_path / "betons")
    assert resolve_loader(made).loader == "ffcv"
    assert resolve_loader(made.model_copy(update={"loader": "torch"})).loader == "torch"
    assert resolve_loader(made, "another digest").loader == "torch"
    with pytest.raises(UserError, match="other data"):
        resolve_loader(made.model_copy(update={"loader": "ffcv"}), "another digest")
    os.truncate(tmp_path / "betons" / "test.beton", 1000)
    with pytest.raises(
        UserError, match=r"test\.beton"
    ):  # what belongs to these data is not passed over in silence
        resolve_loader(made)


def test_without_ffcv_auto_is_torch_and_ffcv_names_what_to_install(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "ffcv", None)
    assert resolve_loader(settings(photographs)).loader == "torch"
    with pytest.raises(UserError, match="libturbojpeg0-dev") as caught:
        resolve_loader(settings(photographs, loader="ffcv"))
    assert "pip install 'pbkd[ffcv]'" in str(caught.value)


def test_cifar_in_jpeg_is_refused(tmp_path: Path, small):
    write_arrays(small[0]["train"], tmp_path / "train.beton")
    write_arrays(small[0]["test"], tmp_path / "test.beton")
    place = manifest_path(tmp_path / "test.beton")
    manifest = BetonManifest.model_validate_json(place.read_bytes())
    jpeg = manifest.model_copy(update={"settings": BetonSettings(mode="jpeg")})
    place.write_text(jpeg.sealed().model_dump_json())
    with pytest.raises(UserError, match=r"test\.beton: holds images of \(32, 32\) as jpeg(.|\n)*--mode raw"):
        resolve_loader(DataSettings(name="cifar10", beton=tmp_path, loader="ffcv"), "none")


def digest_of(data: DataSettings) -> str:
    found = batches(open_data(data), **TRAIN)
    return sha256(b"".join(images.numpy().tobytes() for images, _ in found)).hexdigest()


def test_spawned_processes_read_the_same(photographs: Path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(digest_of, (settings(photographs),)) == digest_of(settings(photographs))


def test_opening_leaves_torchs_threads_alone(photographs: Path):
    code = (
        "import sys, torch; from pathlib import Path; from pbkd.data import DataSettings, open_data\n"
        "torch.set_num_threads(2)\n"
        "data = open_data(DataSettings(name='folder', root=Path(sys.argv[1]), loader='ffcv'))\n"
        "next(iter(data.reader('test', 2))); print(torch.get_num_threads())"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(photographs)],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(found.stdout) == 2


def on(root: Path, *more: str) -> list[str]:
    """Overrides of RECIPE for a small folder."""
    small = ("data.num_classes=3", "data.image_size=32", "stages.teacher.network.arch=resnet20")
    return [f"data.root={root}", *small, "compute.precision=fp32", "compute.threads=1", "smoke=true", *more]


@pytest.mark.parametrize("executor", ["local", pytest.param("ray", marks=pytest.mark.proof)])
def test_a_pipeline_trains_from_betons_and_its_manifests_say_so(
    photographs: Path, executor: str, tmp_path: Path, request: pytest.FixtureRequest
):
    workers, joined = 2, {}
    if executor == "ray":
        workers, joined = 1, request.getfixturevalue("ray_cluster").for_runs()
    relative = Path(os.path.relpath(photographs, ROOT))  # workers on Ray have another current folder
    settings = on(relative, f"compute.executor={executor}", f"compute.workers={workers}")
    store = with_database(tmp_path / "runs")
    report = run(RECIPE, *settings, "--until", "teacher", "--store", store, **joined)
    assert states(report) == {"teacher": "ran"}
    manifest = Store(store).manifest(report["stages"][0]["key"])
    assert manifest is not None and manifest.compute["data_loader"] == "ffcv"


def test_a_folders_loader_and_betons_are_in_the_key(photographs: Path, tmp_path: Path):
    def key(*overrides: str) -> str | None:
        graph = build_graph(load_recipe(RECIPE, on(photographs, *overrides)), None, tmp_path)
        return graph.nodes["teacher"].key

    prepare(settings(photographs), tmp_path / "raw", BetonSettings(mode="raw"))
    keys = [key(), key("data.loader=torch"), key(f"data.beton={tmp_path / 'raw'}")]
    assert None not in keys and len(set(keys)) == 3
    assert key("data.loader=ffcv", "data.workers=1") == keys[0]
    assert key("data.loader=ffcv", f"data.beton={tmp_path / 'none'}") is None
