"""Images in class folders: checks, decoding, and threads that change nothing."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pbkd.data import DataSettings, open_data
from pbkd.data.folder import read_rgb
from pbkd.errors import UserError

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
