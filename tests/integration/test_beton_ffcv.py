"""What we write is what FFCV reads, and its format is what we take it for."""

from pathlib import Path

import numpy as np
import pytest

from pbkd.data import DataSettings
from pbkd.data.beton import BetonSettings
from pbkd.data.beton_format import ALLOCATION, FIELD, HEADER, SAMPLE, VERSION
from pbkd.data.beton_samples import encoder
from pbkd.data.beton_write import prepare, write_beton
from pbkd.data.datasets import Arrays, Files, load_splits
from pbkd.data.folder import read_rgb
from tests.unit.image_folders import save_folder

pytestmark = pytest.mark.ffcv


def test_our_tables_are_laid_out_as_ffcv_s():
    from ffcv.fields import IntField, RGBImageField
    from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_metadata_type

    assert CURRENT_VERSION == VERSION
    for ours, theirs in ((HEADER, HeaderType), (FIELD, FieldDescType), (ALLOCATION, ALLOC_TABLE_TYPE)):
        assert ours.itemsize == theirs.itemsize
        assert ours.names == theirs.names
        assert [ours.fields[name][1] for name in ours.names] == [
            theirs.fields[name][1] for name in theirs.names
        ]
    samples = get_metadata_type([RGBImageField(), IntField()])
    assert SAMPLE.itemsize == samples.itemsize
    assert SAMPLE.fields["label"] == samples.fields["f1"]
    image = samples.fields["f0"][0]
    assert {name: SAMPLE.fields[name] for name in image.names} == dict(image.fields)


def test_ffcv_s_loader_gives_the_arrays_in_their_order(tmp_path: Path):
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    random = np.random.default_rng(0)
    count = 3000  # two pages
    images = random.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    source = Arrays(images, random.integers(0, 10, count))
    encode = encoder(source, BetonSettings())
    with (tmp_path / "train.beton").open("wb") as file:
        write_beton(file, ((encode(i), int(label)) for i, label in enumerate(source.labels)), count)
    loader = Loader(
        str(tmp_path / "train.beton"),
        batch_size=500,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
    )
    batches = [(np.array(pixels), np.array(labels)) for pixels, labels in loader]
    np.testing.assert_array_equal(
        np.concatenate([pixels for pixels, _ in batches]), images.transpose(0, 2, 3, 1)
    )
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches])[:, 0], source.labels)


@pytest.mark.parametrize("settings", [BetonSettings(mode="jpeg"), BetonSettings(mode="jpeg", quality=95)])
def test_ffcv_decodes_what_was_stored_as_pil_does(settings: BetonSettings, tmp_path: Path):
    from ffcv.libffcv import imdecode
    from ffcv.reader import Reader

    root = save_folder(tmp_path / "images")
    data = DataSettings(name="folder", root=root)
    train, _ = prepare(data, tmp_path / "out", settings)
    files = load_splits(data)["train"].source
    assert isinstance(files, Files)
    reader = Reader(str(train.path))
    assert reader.field_names == ["image", "label"]
    np.testing.assert_array_equal(reader.metadata["f1"], files.labels)
    content = np.fromfile(train.path, np.uint8)
    for name, row, place in zip(files.names, reader.metadata["f0"], reader.alloc_table, strict=True):
        stored = content[place["ptr"] : place["ptr"] + place["size"]]
        height, width = int(row["height"]), int(row["width"])
        decoded = np.zeros((height, width, 3), np.uint8)
        assert imdecode(stored, decoded, height, width, height, width, 0, 0, 1, 1, False, False) == 0
        difference = np.abs(decoded.astype(np.int16) - np.asarray(read_rgb(root / name)))
        lossless = name.endswith(".JPEG") and settings.quality is None
        assert difference.mean() < (2 if lossless else 12)
