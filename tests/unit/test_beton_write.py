"""Writing betons: the samples in their order, every kind of image, and nothing left of what fails."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image

from pbkd.data import DataSettings, data_digest
from pbkd.data.beton import BetonSettings, open_checked, verify
from pbkd.data.beton_format import JPEG, PAGE_SIZE, RAW, read_tables
from pbkd.data.beton_samples import encoder
from pbkd.data.beton_write import Prepared, checked_labels, prepare, write_beton
from pbkd.data.datasets import Arrays, Files, load_splits
from pbkd.data.folder import read_rgb
from pbkd.errors import UserError
from tests.unit.image_folders import CLASSES, picture, save_folder

pytestmark = pytest.mark.ffcv  # for libturbojpeg, which comes with it

RAW_PIXELS = BetonSettings(mode="raw")
AS_JPEG = BetonSettings(mode="jpeg")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "images")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def write(root: Path, out: Path, settings: BetonSettings = RAW_PIXELS, **options) -> list[Prepared]:
    return prepare(DataSettings(name="folder", root=root), out, settings, **options)


def contents(path: Path) -> list[tuple[int, bytes, int, tuple[int, int]]]:
    """(mode, bytes, label, (width, height)) of every sample."""
    with path.open("rb") as file:
        tables = read_tables(file)
        return [
            (
                int(row["mode"]),
                os.pread(file.fileno(), int(place["size"]), int(place["ptr"])),
                int(row["label"]),
                (int(row["width"]), int(row["height"])),
            )
            for row, place in zip(tables.samples, tables.allocations, strict=True)
        ]


def source(root: Path, split: str) -> Files:
    found = load_splits(DataSettings(name="folder", root=root, val_fraction=0.3))[split].source
    assert isinstance(found, Files)
    return found


def digest(root: Path) -> str:
    return data_digest(DataSettings(name="folder", root=root), root)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def put(root: Path, content: bytes, name: str = "03.JPEG") -> Path:
    path = root / "train" / "dog" / name
    path.write_bytes(content)
    return path


def encoded(image: Image.Image, form: str, **options) -> bytes:
    stream = BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def test_sample_i_is_the_source_s_sample_i_before_the_division(root: Path, out: Path):
    for prepared in write(root, out, workers=3):
        files = source(root, prepared.manifest.split)
        stored = contents(prepared.path)
        assert [label for _, _, label, _ in stored] == files.labels.tolist()
        assert [content for _, content, _, _ in stored] == [
            read_rgb(root / name).tobytes() for name in files.names
        ]
        assert [size for *_, size in stored] == [read_rgb(root / name).size for name in files.names]


def test_the_manifest_describes_the_file_and_its_source(root: Path, out: Path):
    train, test = write(root, out, AS_JPEG)
    assert names(out) == ["test.beton", "test.beton.json", "train.beton", "train.beton.json"]
    assert (train.manifest.samples, test.manifest.samples) == (18, 9)
    assert train.manifest.class_names == CLASSES
    assert train.manifest.source_digest == test.manifest.source_digest == digest(root)
    assert train.manifest.bytes == train.path.stat().st_size
    assert train.manifest.shape is None
    assert train.manifest == open_checked(train.path, digest(root)) == verify(train.path, full=True)


def test_the_same_data_give_the_same_bytes_with_any_number_of_workers(root: Path, tmp_path: Path):
    files = [
        [(p.path.read_bytes(), p.manifest) for p in write(root, tmp_path / f"{workers}", workers=workers)]
        for workers in (1, 2, 7)
    ]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize(
    "content",
    [
        encoded(picture(0, 30, 20).convert("L"), "JPEG"),
        encoded(picture(0, 30, 20).convert("CMYK"), "JPEG"),
        encoded(picture(0, 30, 20).convert("RGBA"), "PNG"),
        encoded(picture(0, 30, 20).convert("P"), "PNG"),
        encoded(picture(0, 30, 20).convert("P"), "PNG", transparency=3),
        encoded(picture(0, 30, 20).convert("LA"), "PNG"),
        encoded(picture(0, 30, 20).convert("1"), "PNG"),
        encoded(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(30, 20) * 100), "PNG"),
    ],
    ids=["gray", "cmyk", "rgba", "palette", "transparent", "gray-alpha", "bits", "16-bit"],
)
@pytest.mark.parametrize("settings", [RAW_PIXELS, AS_JPEG], ids=["raw", "jpeg"])
def test_every_kind_of_image_is_stored_as_rgb(content: bytes, settings: BetonSettings, root: Path):
    path = put(root, content)
    stored = encoder(Files(root, [path.relative_to(root).as_posix()], np.zeros(1, np.int64)), settings)(0)
    expected = np.asarray(read_rgb(path), np.int16)
    assert (stored.height, stored.width) == expected.shape[:2] == (30, 20)
    if settings.mode == "raw":
        assert stored.content == expected.astype(np.uint8).tobytes()
        return
    with Image.open(BytesIO(stored.content)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (20, 30))
        assert np.abs(np.asarray(image) - expected).mean() < 15  # dithered palettes lose most


def test_a_jpeg_file_is_kept_byte_for_byte_unless_it_must_change(root: Path):
    plain, progressive = (encoded(picture(1, 30, 40), "JPEG", progressive=flag) for flag in (False, True))

    def stored(content: bytes, settings: BetonSettings) -> bytes:
        return encoder(Files(root, [str(put(root, content))], np.zeros(1, np.int64)), settings)(0).content

    assert stored(plain, AS_JPEG) == plain
    assert stored(progressive, AS_JPEG) == progressive
    odd = plain[:-2] + bytes(30) + plain[-2:]  # bytes between the data and the end: harmless, but not clean
    assert stored(odd, RAW_PIXELS) == stored(plain, RAW_PIXELS)
    assert stored(odd, AS_JPEG) == stored(plain, BetonSettings(mode="jpeg", quality=90))
    assert stored(plain, BetonSettings(mode="jpeg", quality=90)) != plain
    assert stored(plain, BetonSettings(mode="jpeg", max_resolution=39)) != plain
    assert stored(plain, BetonSettings(mode="jpeg", max_resolution=40)) == plain
    assert len(stored(plain, BetonSettings(mode="jpeg", quality=20))) < len(plain)


def test_larger_images_are_scaled_to_the_longer_side_and_others_are_not(root: Path, out: Path):
    train, _ = write(root, out, BetonSettings(mode="raw", max_resolution=30))
    sizes = [read_rgb(root / name).size for name in source(root, "train").names]
    for before, (*_, after) in zip(sizes, contents(train.path), strict=True):
        assert after == before if max(before) <= 30 else max(after) == 30
        assert after[0] / after[1] == pytest.approx(before[0] / before[1], rel=0.05)


def test_smart_stores_small_images_raw_and_large_ones_as_jpeg(root: Path, out: Path):
    put(root, encoded(picture(0, 224, 224), "PNG"), "90.png")
    put(root, encoded(picture(0, 225, 224), "PNG"), "91.png")
    train, _ = write(root, out, BetonSettings(mode="smart"))
    modes = [mode for mode, *_ in contents(train.path)]
    files = [Path(name).name for name in source(root, "train").names]
    assert modes.count(JPEG) == 1
    assert modes[files.index("91.png")] == JPEG
    assert modes[files.index("90.png")] == RAW


def test_images_fill_pages_and_never_cross_one(root: Path, out: Path):
    for number in range(3):
        put(root, encoded(picture(number, 1000, 1100), "PNG", compress_level=0), f"9{number}.png")
    train, _ = write(root, out)
    assert train.manifest.bytes > 3 * PAGE_SIZE
    assert verify(train.path, full=True).samples == 21


def test_arrays_are_stored_height_by_width_by_channel():
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 6), dtype=np.uint8)
    stored = encoder(Arrays(images, np.zeros(4, np.int64)), RAW_PIXELS)(2)
    assert (stored.mode, stored.width, stored.height) == (RAW, 6, 5)
    assert stored.content == images[2].transpose(1, 2, 0).tobytes()
    for wrong in (images.astype(np.float32), images[:, :1], np.concatenate([images, images[:, :1]], axis=1)):
        with pytest.raises(UserError, match="uint8 of shape"):
            encoder(Arrays(wrong, np.zeros(4, np.int64)), RAW_PIXELS)


def test_a_raw_beton_has_the_bytes_it_always_had(tmp_path: Path):
    images = np.arange(5 * 3 * 4 * 6, dtype=np.uint8).reshape(5, 3, 4, 6)
    encode = encoder(Arrays(images, np.arange(5)), RAW_PIXELS)
    with (tmp_path / "train.beton").open("wb") as file:
        write_beton(file, ((encode(i), i) for i in range(5)), 5)
    found = hashlib.sha256((tmp_path / "train.beton").read_bytes()).hexdigest()
    assert found == "9fffdcaf3081038c284d90a3baa0f5021a4ffa53a9b1424d5e8caf7e683e3bcc"


@pytest.mark.data("cifar-10-batches-py")
def test_cifar_is_written_in_the_order_of_its_arrays(out: Path):
    data = DataSettings(name="cifar10", root=Path(os.environ["PBKD_DATA"]))
    train, test = prepare(data, out, RAW_PIXELS, workers=2)
    assert (train.manifest.samples, test.manifest.samples) == (50_000, 10_000)
    arrays = load_splits(data)["test"].source
    assert isinstance(arrays, Arrays)
    stored = contents(test.path)
    assert [label for _, _, label, _ in stored] == arrays.labels.tolist()
    pixels = np.frombuffer(b"".join(content for _, content, _, _ in stored), np.uint8)
    np.testing.assert_array_equal(pixels.reshape(-1, 32, 32, 3), arrays.images.transpose(0, 2, 3, 1))


def test_what_is_intact_is_kept_and_what_is_not_is_written(root: Path, out: Path):
    def written(settings: BetonSettings = RAW_PIXELS) -> list[bool]:
        return [prepared.written for prepared in write(root, out, settings)]

    assert written() == [True, True]
    assert written() == [False, False]
    with (out / "test.beton").open("r+b") as file:  # a pixel
        file.seek(PAGE_SIZE + 5)
        file.write(b"\x00\x01\x02")
    assert written() == [False, True]
    (out / "train.beton.json").unlink()
    assert written() == [True, False]
    assert written(AS_JPEG) == [True, True]
    assert written() == [True, True]
    put(root, encoded(picture(5, 20, 20), "PNG"), "77.png")
    assert written() == [True, True]
    assert written() == [False, False]


def overwritten(jpeg: bytes) -> bytes:
    """With two bytes of its data replaced, by what no data have."""
    place = len(jpeg) * 7 // 8
    return jpeg[:place] + b"\xff\xd5" + jpeg[place + 2 :]


BROKEN = {
    "truncated": encoded(picture(0, 60, 60), "JPEG")[:700],
    "no end": encoded(picture(0, 60, 60), "JPEG")[:-40] + b"\xff\xd9",
    "overwritten": overwritten(encoded(picture(0, 60, 60), "JPEG")),
    "overwritten gray": overwritten(encoded(picture(0, 60, 60).convert("L"), "JPEG")),
    "overwritten cmyk": overwritten(encoded(picture(0, 60, 60).convert("CMYK"), "JPEG")),
    "text": b"not an image",
    "empty": b"",
    "float": encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
    "32-bit": encoded(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_image_stops_with_its_path_and_leaves_nothing(content: bytes, root: Path, out: Path):
    path = put(root, content)
    with pytest.raises(UserError) as error:
        write(root, out, workers=2)
    assert str(path) in str(error.value)
    assert "--skip-broken" in str(error.value)
    assert names(out) == []


def test_skipped_images_are_listed_and_training_waits_until_they_are_removed(root: Path, out: Path):
    first = put(root, b"not an image")
    second = root / "val" / "emu" / "00.JPEG"
    second.write_bytes(b"")
    train, test = write(root, out, skip_broken=True)
    assert train.manifest.broken == test.manifest.broken == ("train/dog/03.JPEG", "val/emu/00.JPEG")
    assert (train.manifest.samples, test.manifest.samples) == (18, 8)
    with pytest.raises(UserError, match=r"2 broken images .*train/dog/03.JPEG[\s\S]*remove these files"):
        open_checked(train.path, digest(root))
    assert [p.written for p in write(root, out, skip_broken=True)] == [False, False]
    first.unlink()
    second.unlink()
    for prepared in (train, test):
        assert open_checked(prepared.path, digest(root)).source_digest == digest(root)
    labels = [label for _, _, label, _ in contents(test.path)]
    assert labels == source(root, "test").labels.tolist()
    assert [p.written for p in write(root, out)] == [False, False]


def test_an_image_that_was_skipped_and_repaired_is_taken(root: Path, out: Path):
    put(root, b"not an image")
    write(root, out, skip_broken=True)
    put(root, encoded(picture(0, 30, 30), "JPEG"))
    train, _ = write(root, out, skip_broken=True)
    assert train.manifest.broken == ()
    assert train.manifest.samples == 19
    assert open_checked(train.path, digest(root)) == train.manifest


def test_a_class_without_a_readable_image_cannot_be_skipped(root: Path, out: Path):
    for path in (root / "train" / "emu").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no image of class 2 of train can be read"):
        write(root, out, skip_broken=True)
    assert names(out) == []


def test_an_image_too_large_for_a_beton_is_an_error_that_no_option_hides(root: Path, out: Path):
    put(root, encoded(Image.new("RGB", (3000, 1000)), "PNG"))
    with pytest.raises(UserError, match=r"03.JPEG: 3000 x 1000 pixels[\s\S]*--max-resolution"):
        write(root, out, skip_broken=True)
    assert names(out) == []
    write(root, out, AS_JPEG)


@pytest.mark.parametrize("label", [-1, 10, 2**40])
def test_labels_out_of_range_are_refused(label: int):
    with pytest.raises(UserError, match=f"label {label} of sample 1\nexpected 0 to 9"):
        checked_labels(np.array([0, label, 3]), 10)


@pytest.mark.parametrize(("labels", "kind"), [([3.7], "float64"), ([3, None], "object")])
def test_labels_that_are_no_whole_numbers_are_refused(labels: list[float | None], kind: str):
    with pytest.raises(UserError, match=f"labels are {kind}\nexpected whole numbers from 0 to 9"):
        checked_labels(np.array(labels), 10)


def _without_class(root: Path) -> None:
    for path in (root / "val" / "emu").iterdir():
        path.unlink()
    (root / "val" / "emu").rmdir()


def _empty_class(root: Path) -> None:
    for path in (root / "train" / "emu").iterdir():
        path.unlink()


def _no_train(root: Path) -> None:
    (root / "train").rename(root / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "expected"),
    [(_without_class, "lacks 1 classes"), (_empty_class, "holds no image"), (_no_train, "cannot list")],
)
def test_folders_that_are_no_data_set_are_refused(
    damage: Callable[[Path], None], expected: str, root: Path, out: Path
):
    damage(root)
    with pytest.raises(UserError, match=f"{expected}[\\s\\S]*cure: "):
        write(root, out)
    assert names(out) == []


@contextmanager
def without_privileges() -> Iterator[None]:
    """As a user whom the mode of a file means something."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def shared_folder() -> Path:
    """A folder for temporary files that every user can reach, which root's own TMPDIR need not be."""
    with without_privileges():
        places = map(Path, (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"))
        return next(place for place in places if os.access(place, os.W_OK | os.X_OK, effective_ids=True))


@pytest.mark.parametrize("place", ["train/dog", "train/dog/01.png"])
def test_what_cannot_be_read_is_named(place: str, root: Path, monkeypatch: pytest.MonkeyPatch):
    with TemporaryDirectory(dir=shared_folder()) as open_to_all:  # those above pytest's own are closed
        monkeypatch.setattr(tempfile, "tempdir", open_to_all)
        images = shutil.copytree(root, Path(open_to_all) / "images")
        for path in [images.parent, images, *images.rglob("*")]:
            path.chmod(0o777)
        (images / place).chmod(0)
        with without_privileges(), pytest.raises(UserError, match=f"{place}: .*ermission"):
            write(images, images / "out")
        assert names(images / "out") == []
        (images / place).chmod(0o700)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_finished_split_and_no_part_of_the_other(
    stop: type[BaseException], root: Path, out: Path
):
    def interrupt(split: str, done: int, count: int) -> None:
        if split == "test" and done == 4:
            raise stop

    with pytest.raises(stop):
        write(root, out, progress=interrupt)
    assert names(out) == ["train.beton", "train.beton.json"]
    assert [prepared.written for prepared in write(root, out)] == [False, True]


def test_data_that_change_while_they_are_read_are_refused(root: Path, out: Path):
    def add_image(split: str, done: int, count: int) -> None:
        put(root, encoded(picture(5, 20, 20), "PNG"), "77.png")

    with pytest.raises(UserError, match="changed while they were read"):
        write(root, out, progress=add_image)
    assert names(out) == []
    write(root, out)


def test_two_writers_of_one_folder_exclude_each_other(root: Path, out: Path):
    out.mkdir()
    descriptor = os.open(out, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another pbkd data prepare is writing"):
            write(root, out)
    finally:
        os.close(descriptor)
    write(root, out)


def test_a_folder_that_cannot_be_written_to_is_named(root: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out: cannot be written: Not a directory[\s\S]*--out"):
        write(root, tmp_path / "file" / "out")


def test_digits_need_no_beton(out: Path):
    with pytest.raises(UserError, match="digits"):
        prepare(DataSettings(name="digits"), out, RAW_PIXELS)
