"""Images in class folders: checks, decoding, and threads that change nothing."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from pbkd.data import Data, DataSettings, data_digest, open_data
from pbkd.data.datasets import Arrays, divided
from pbkd.data.folder import list_files, read_rgb
from pbkd.errors import UserError
from pbkd.torchvision_compat import import_torchvision
from tests.unit.image_folders import picture

TRAIN = {"seed": 7, "augment": True, "shuffle": True}


def save_images(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number in range(count):
        height, width = random.integers(20, 60, 2)
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.{'png' if number % 2 else 'JPEG'}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for label, name in enumerate(("cat", "dog", "emu")):
        save_images(tmp_path / "train" / name, 10, label)
        save_images(tmp_path / "val" / name, 4, 10 + label)
    return tmp_path


def settings(root: Path, **changes) -> DataSettings:
    return DataSettings(name="folder", root=root, image_size=16, **changes)


def batches(
    root: Path, split: str = "train", batch_size: int = 4, first: int = 0, workers: int = 2, **options
):
    reader = open_data(settings(root, workers=workers)).reader(split, batch_size, **options)
    reader.resume_at(first)
    return list(reader)


def decoding_threads() -> int:
    return sum(thread.name.startswith("pbkd-decode") for thread in threading.enumerate())


def test_splits_and_labels_come_from_the_folders(root: Path):
    data = open_data(settings(root))
    assert data.sizes == {"train": 27, "val": 3, "test": 12}
    assert data.info.num_classes == 3
    labels = torch.cat([labels for _, labels in data.reader("test", 5)])
    assert labels.bincount().tolist() == [4, 4, 4]
    images, _ = next(iter(data.reader("train", 5, **TRAIN)))
    assert images.shape == (5, 3, 16, 16)
    assert images.is_contiguous()


@pytest.mark.parametrize("options", [TRAIN, {}])
def test_the_number_of_threads_changes_nothing(root: Path, options):
    one, three = (batches(root, workers=workers, **options) for workers in (1, 3))
    assert len(one) == 7
    for (images, labels), (other_images, other_labels) in zip(one, three, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def test_world_size_and_resume_change_nothing(root: Path):
    whole = batches(root, **TRAIN)
    ranks = [batches(root, first=3, rank=rank, world=2, **TRAIN) for rank in range(2)]
    assert len(whole) == 7
    assert len(ranks[0]) == 6 - 3  # 27 = 6 * 4 + 3: three samples are too few for two ranks
    for (images, labels), *shares in zip(whole[3:6], *ranks, strict=True):
        assert torch.equal(images, torch.cat([share for share, _ in shares]))
        assert torch.equal(labels, torch.cat([share for _, share in shares]))


def test_progressive_resizing_changes_augmented_views_by_epoch(root: Path):
    data = open_data(settings(root, progressive=((0, 8), (2, 12))))
    reader = data.reader("train", 4, **TRAIN)
    sides = []
    for epoch in range(4):
        reader.set_epoch(epoch)
        sides.append(next(iter(reader))[0].shape[-1])
    assert sides == [8, 8, 12, 12]
    assert next(iter(data.reader("val", 4)))[0].shape[-2:] == (16, 16)


def test_a_broken_image_is_named_and_the_threads_end(root: Path):
    broken = root / "train" / "dog" / "04.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(UserError, match=r"04\.JPEG") as caught:
        batches(root, **TRAIN)
    assert str(broken) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    del caught
    assert decoding_threads() == 0


def test_threads_end_on_close_and_on_early_break(root: Path):
    reader = open_data(settings(root)).reader("train", 4, **TRAIN)
    for _ in reader:
        assert decoding_threads() > 0
        break
    assert decoding_threads() == 0
    kept = iter(reader)
    next(kept)
    assert decoding_threads() > 0
    reader.close()
    assert decoding_threads() == 0


def test_train_and_val_must_have_the_same_classes(root: Path):
    save_images(root / "train" / "fox", 2, 0)
    with pytest.raises(UserError, match="fox") as caught:
        open_data(settings(root))
    assert str(root / "val") in str(caught.value)
    save_images(root / "val" / "fox", 2, 0)
    save_images(root / "val" / "gnu", 2, 0)
    with pytest.raises(UserError, match="gnu"):
        open_data(settings(root))


def test_an_empty_class_is_named(root: Path):
    for part in ("train", "val"):
        (root / part / "fox").mkdir()
        (root / part / "fox" / "readme.txt").write_text("no image")
    with pytest.raises(UserError, match="train/fox"):
        open_data(settings(root))


def test_missing_folders_and_wrong_num_classes_are_the_user_s_errors(root: Path, tmp_path_factory):
    with pytest.raises(UserError, match=r"data\.root=ROOT"):
        open_data(settings(tmp_path_factory.mktemp("empty")))
    with pytest.raises(UserError, match=r"data\.num_classes=3"):
        open_data(settings(root, num_classes=4))


def test_what_torchvision_finds_is_found_and_more(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Subfolders, suffixes of other systems, none at all; what is no image is told once, in a line."""
    cat = root / "train" / "cat"
    image = Image.new("RGB", (24, 24))
    for name, form in {
        "2021/a.jpg": "JPEG", "2021/may/b.JPG": "JPEG", "c.jfif": "JPEG", "d.gif": "GIF", "e.jp2": "JPEG2000",
        "f": "PNG", "g.photo": "JPEG", "h.avif": "AVIF",
    }.items():  # fmt: skip
        (cat / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(cat / name, form)
    (cat / "again").symlink_to(cat)  # a circle
    (root / "elsewhere").mkdir()
    image.save(root / "elsewhere" / "i.png")
    (cat / "linked").symlink_to(root / "elsewhere")
    for name in ("cat/Thumbs.db", "cat/2021/notes.txt", "list.csv"):
        (root / "train" / name).write_text("no image")
    (cat / ".hidden.jpg").write_text("resource fork")
    import_folder = import_torchvision().datasets.ImageFolder
    (cat / "again").unlink()
    theirs = {Path(path).relative_to(root).as_posix() for path, _ in import_folder(root / "train").samples}
    (cat / "again").symlink_to(cat)
    listing = list_files(root, {"train": "train", "test": "val"})
    ours = set(listing.parts["train"].paths)
    assert theirs - {"train/cat/.hidden.jpg"} <= ours and len(ours) == 30 + 9
    assert set(listing.left_out) == {"train/cat/Thumbs.db", "train/cat/2021/notes.txt", "train/list.csv"}
    data_digest(settings(root), root / "cache")
    (said,) = caplog.messages
    assert said.startswith(f"{root}: 3 files are no images and are left out: train/cat/2021/notes.txt, ")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("link", r"9\.jpg is a link to .*gone\.jpg, which cannot be opened: No such file"),
        ("loop", r"9\.jpg is a link to .*9\.jpg, which cannot be opened: Too many levels"),
        ("pipe", r"9\.jpg is a named pipe"),
        ("device", r"9\.jpg is a device"),
        ("socket", r"9\.jpg is a socket"),
    ],
)
@pytest.mark.parametrize("place", ["train/cat/9.jpg", "val/cat/below/9.jpg", "train/9.jpg"])
def test_what_is_no_file_is_named_and_not_waited_for(root: Path, kind: str, said: str, place: str) -> None:
    (path := root / place).parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(os.path.relpath(path))
    else:
        path.symlink_to({"link": "../gone.jpg", "loop": path, "device": "/dev/zero"}[kind])
    with pytest.raises(UserError, match=said) as caught:
        open_data(settings(root))
    assert len(str(caught.value).splitlines()) <= 3 and "cure: " in str(caught.value)


def test_parts_under_other_names_and_a_validation_part_of_its_own(root: Path) -> None:
    whole = batches(root, "test")
    (root / "val").rename(root / "test")
    named = settings(root, splits={"test": "test"})
    assert all(
        torch.equal(a, b) for (a, _), (b, _) in zip(whole, open_data(named).reader("test", 4), strict=True)
    )
    for label, name in enumerate(("cat", "dog", "emu")):
        save_images(root / "valid" / name, 2, 20 + label)
    own = open_data(settings(root, splits={"val": "valid", "test": "test"}))
    assert own.sizes == {"train": 30, "val": 6, "test": 12} and own.info.has_val
    assert data_digest(own.settings, root) != data_digest(named, root)
    with pytest.raises(UserError, match=r"cannot list .*/val: No such file or directory"):
        open_data(settings(root))


def csv_of(root: Path, part: str, name: str, label: Callable[[Path], object]) -> None:
    rows = [f"{path.relative_to(root)},{label(path)}" for path in sorted((root / part).rglob("*.*"))]
    (root / name).write_text("\n".join(["path,label", *rows]) + "\n")


@pytest.mark.parametrize("numbers", [False, True])
def test_a_list_of_files_is_read_as_the_folder_is(root: Path, numbers: bool) -> None:
    for part in ("train", "val"):
        csv_of(
            root,
            part,
            f"{part}.csv",
            lambda path: "cde".index(path.parent.name[0]) if numbers else path.parent.name,
        )
    listed = open_data(settings(root, splits={"train": "train.csv", "test": "val.csv"}))
    assert listed.classes == (("0", "1", "2") if numbers else ("cat", "dog", "emu"))
    for split in ("train", "val", "test"):
        for ours, theirs in zip(listed.reader(split, 4), batches(root, split), strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1]) or numbers
    assert DataSettings(name="folder", root=root, splits=listed.settings.splits).describe().num_classes == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("file,class\na.png,1\n", "names the columns file, class\nexpected path and label"),
        ("", "names the columns \nexpected"),
        ("path,label\n", "names no image"),
        ("path,label\ntrain/cat/00.JPEG\n", "line 2: lacks a path or a label"),
        ("path,label\nnone.png,0\n", "none.png: No such file"),
        ("path,label\ntrain/cat/00.JPEG,0\ntrain/cat/01.png,2\n", "labels go up to 2, and none is 1"),
        ("path,label\ntrain/cat/00.JPEG,\xff\n", "cannot be read: 'utf-8'"),
    ],
)
def test_a_wrong_list_is_told_by_line(root: Path, text: str, said: str) -> None:
    (root / "train.csv").write_bytes(text.encode("latin-1"))
    csv_of(root, "val", "val.csv", lambda path: "0")
    with pytest.raises(UserError) as caught:
        open_data(settings(root, splits={"train": "train.csv", "test": "val.csv"}))
    assert said in str(caught.value) and len(str(caught.value).splitlines()) <= 3


def test_a_label_that_training_does_not_have_is_told(root: Path) -> None:
    csv_of(root, "train", "train.csv", lambda path: path.parent.name)
    csv_of(root, "val", "val.csv", lambda path: path.parent.name.upper())
    with pytest.raises(UserError, match=r"val\.csv, line 2: label 'CAT' is not one of .*train\.csv"):
        open_data(settings(root, splits={"train": "train.csv", "test": "val.csv"}))
    with pytest.raises(UserError, match="names folders and CSV files"):
        open_data(settings(root, splits={"train": "train.csv", "test": "val"}))


def test_images_of_the_network_s_size_are_taken_as_they_are(tmp_path: Path) -> None:
    """As the CIFAR reader gives the same images, in training too."""
    random = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 6)):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "b").mkdir()
        for number in range(count):
            pixels = random.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / "ab"[number >= count / 2] / f"{number:02}.png")
    exact = DataSettings(
        name="folder", root=tmp_path, image_size=32, resize="none", augment="crop_flip_cutout"
    )
    data = open_data(exact)
    parts = {}
    for name, part in (("train", "train"), ("test", "val")):
        paths = sorted((tmp_path / part).rglob("*.png"))
        images = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths])
        parts[name] = Arrays(images, np.repeat([0, 1], len(paths) // 2))
    cifar = exact.model_dump(include={"mean", "std", "augment"}) | {"name": "cifar10"}
    memory = DataSettings(**cifar | {"mean": data.info.mean, "std": data.info.std})
    same = Data(memory, divided(memory, parts), "0123456789")
    for split, options in (("train", TRAIN), ("test", {})):
        for ours, theirs in zip(
            data.reader(split, 4, **options), same.reader(split, 4, **options), strict=True
        ):
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    Image.new("RGB", (32, 30)).save(tmp_path / "val" / "a" / "00.png")
    with pytest.raises(UserError, match=r"val/a/00\.png: has 32 x 30 pixels(.|\n)*data\.resize=short_side"):
        list(open_data(exact).reader("test", 6))


def test_a_photograph_is_turned_where_that_is_asked_for(tmp_path: Path) -> None:
    image = picture(0, 30, 20)
    tag = Image.Exif()
    tag[ExifTags.Base.Orientation] = 6  # to be turned to the right
    image.save(tmp_path / "a.jpg", exif=tag, quality=95)
    stored, turned = (np.asarray(read_rgb(tmp_path / "a.jpg", upright=upright)) for upright in (False, True))
    assert stored.shape == (30, 20, 3) and turned.shape == (20, 30, 3)
    assert np.array_equal(turned, np.rot90(stored, -1))


COLOUR = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("L", "png"),
        ("L", "jpeg"),
        ("P", "png"),
        ("1", "png"),
        ("LA", "png"),
        ("RGBA", "png"),
        ("CMYK", "jpeg"),
    ],
)
def test_every_mode_becomes_rgb(mode: str, suffix: str, tmp_path: Path):
    path = tmp_path / f"image.{suffix}"
    COLOUR.convert(mode).save(path)
    image = read_rgb(path)
    assert image.mode == "RGB"
    with Image.open(path) as stored:
        assert stored.mode == mode
        assert np.array_equal(image, stored.convert("RGB"))


def test_a_palette_with_transparency_keeps_its_colours(tmp_path: Path):
    palette = COLOUR.convert("P")
    palette.save(tmp_path / "image.png", transparency=bytes(range(256)))
    assert np.array_equal(read_rgb(tmp_path / "image.png"), palette.convert("RGB"))


def test_sixteen_bit_grey_keeps_its_upper_byte(tmp_path: Path):
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(grey).save(tmp_path / "image.png")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "image.png"))[..., 1], grey >> 8)
