"""The `data` section of a recipe."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from pbkd.data import DataInfo, DataSettings
from pbkd.errors import UserError


def test_cifar_and_digits_are_described_without_data():
    info = DataSettings(name="cifar100").describe()
    assert (info.input_shape, info.num_classes) == ((3, 32, 32), 100)
    assert DataSettings(name="digits").describe() == DataInfo("digits", (1, 8, 8), 10, (0.3053,), (0.3760,))
    assert DataSettings(name="cifar10").describe().has_val
    assert not DataSettings(name="cifar10", val_fraction=0).describe().has_val
    assert DataSettings(name="digits", val_fraction=0).describe().has_val
    assert DataSettings(name="cifar10", mean=(0, 0, 0), std=(1, 1, 1)).describe().std == (1, 1, 1)


def test_a_folder_is_described_by_num_classes_or_its_class_folders(tmp_path: Path):
    assert DataSettings(name="folder", num_classes=12).describe().num_classes == 12
    for name in ("cat", "dog", "emu", ".cache"):
        (tmp_path / "train" / name).mkdir(parents=True)
    info = DataSettings(name="folder", root=tmp_path, image_size=64).describe()
    assert (info.input_shape, info.num_classes) == ((3, 64, 64), 3)


def test_a_folder_that_is_not_here_names_both_cures(tmp_path: Path):
    with pytest.raises(UserError, match=r"data\.num_classes=N") as caught:
        DataSettings(name="folder", root=tmp_path / "none").describe()
    assert str(tmp_path / "none" / "train") in str(caught.value)
    assert "data.root=" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
    with pytest.raises(UserError, match=r"data\.root=DIR"):
        DataSettings(name="folder").describe()


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "cifar10", "batchsize": 3},
        {"name": "mnist"},
        {"name": "cifar10", "batch_size": 0},
        {"name": "cifar10", "val_fraction": 1},
        {"name": "cifar10", "mean": (0.5,)},
        {"name": "digits", "std": (0,)},
        {"name": "cifar10", "image_size": 64},
        {"name": "digits", "num_classes": 11},
        {"name": "folder", "resize": "none", "resize_size": 256},
        {"name": "folder", "resize_size": 200},
        {"name": "folder", "augment": "crop_flip", "progressive": ((0, 160),)},
        {"name": "cifar10", "resize": "none"},
        {"name": "cifar10", "orientation": "exif"},
        {"name": "digits", "splits": {"test": "test"}},
        {"name": "folder", "splits": {"tests": "test"}},
        {"name": "folder", "download": True},
        {"name": "cifar10", "augment": "resized_crop_flip"},
        {"name": "digits", "loader": "ffcv"},
        {"name": "digits", "beton": "somewhere"},
        {"name": "cifar10", "progressive": ((0, 16),)},
        {"name": "folder", "progressive": ((1, 160),)},
        {"name": "folder", "progressive": ((0, 160), (8, 224), (8, 192))},
        {"name": "folder", "progressive": ((0, 4),)},
    ],
)
def test_settings_that_make_no_sense_are_errors(wrong):
    with pytest.raises(ValidationError):
        DataSettings(**wrong)


def test_a_stage_key_sees_only_what_changes_the_numbers(tmp_path: Path):
    plain = DataSettings(name="cifar10")
    elsewhere = DataSettings(
        name="cifar10",
        root=tmp_path,
        download=True,
        workers=7,
        eval_batch_size=9,
        loader="ffcv",
        beton=tmp_path,
        augment="crop_flip",
    )
    assert plain.semantic() == elsewhere.semantic() == json.loads(json.dumps(plain.semantic()))
    for change in (
        {"batch_size": 64},
        {"augment": "none"},
        {"limit": 10},
        {"val_fraction": 0.2},
        {"mean": (0, 0, 0)},
        {"std": (1, 1, 1)},
    ):
        assert DataSettings(name="cifar10", **change).semantic() != plain.semantic()
    assert DataSettings(name="digits", val_fraction=0.3).semantic() == DataSettings(name="digits").semantic()
    resized = DataSettings(name="folder", progressive=((0, 160), (8, 224))).semantic()
    assert resized == {**DataSettings(name="folder").semantic(), "progressive": [[0, 160], [8, 224]]}
    small = DataSettings(name="folder", image_size=64).semantic()
    assert (
        small
        != DataSettings(name="folder").semantic()
        == DataSettings(name="folder", image_size=224, resize_size=256, crop="center").semantic()
    )
    changes = (
        {"resize": "both"}, {"resize": "none"}, {"resize_size": 300}, {"interpolation": "bicubic"},
        {"crop": "none"}, {"orientation": "exif"}, {"splits": {"val": "valid"}},
    )  # fmt: skip
    keys = [json.dumps(DataSettings(name="folder", **change).semantic()) for change in ({}, *changes)]
    assert len(set(keys)) == len(keys)


def test_what_follows_from_how_images_are_scaled() -> None:
    usual = DataSettings(name="folder").preprocessing()
    assert (usual.resize, usual.resize_size, usual.crop, usual.image_size) == (
        "short_side",
        256,
        "center",
        224,
    )
    exact = DataSettings(name="folder", resize="none", image_size=32)
    assert (exact.preprocessing().resize_size, exact.preprocessing().crop) == (None, "none")
    assert (
        exact.augmentation == "crop_flip" and DataSettings(name="folder").augmentation == "resized_crop_flip"
    )
    assert DataSettings(name="folder", resize="both", image_size=64).preprocessing().resize_size == 64
    assert DataSettings(name="digits").preprocessing().colours == "grey"
    assert DataSettings(name="cifar10").preprocessing().resize == "none"
