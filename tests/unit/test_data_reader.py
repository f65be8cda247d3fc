"""The reader's contract: the same batches whatever the world size, resumed or not, every sample once."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pbkd.data import Data, DataSettings, open_data
from pbkd.data.datasets import load_digits
from pbkd.errors import UserError

DIGITS = open_data(DataSettings(name="digits", batch_size=64))
TRAIN = {"seed": 7, "augment": True, "shuffle": True}


def epoch(data: Data, split: str = "train", batch_size: int = 64, number: int = 0, first: int = 0, **options):
    reader = data.reader(split, batch_size, **options)
    reader.set_epoch(number)
    reader.resume_at(first)
    return list(reader)


def joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def equal(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


def rows(images: Tensor) -> list[bytes]:
    return sorted(image.numpy().tobytes() for image in images)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_global_batch_contiguously(world: int):
    whole = epoch(DIGITS, number=3, **TRAIN)
    ranks = [epoch(DIGITS, number=3, rank=rank, world=world, **TRAIN) for rank in range(world)]
    assert equal(whole, [joined(list(shares)) for shares in zip(*ranks, strict=True)])
    for shares in zip(*ranks, strict=True):
        sizes = [len(labels) for _, labels in shares]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


def test_a_resumed_epoch_is_the_tail_and_the_next_one_is_whole():
    whole = epoch(DIGITS, number=2, **TRAIN)
    reader = DIGITS.reader("train", 64, **TRAIN)
    reader.set_epoch(2)
    reader.resume_at(4)
    assert equal(list(reader), whole[4:])
    assert equal(list(reader), whole)
    reader.resume_at(len(reader))
    assert list(reader) == []


def test_order_and_views_depend_on_seed_and_epoch_only():
    assert equal(epoch(DIGITS, number=1, **TRAIN), epoch(DIGITS, number=1, **TRAIN))
    views = [
        epoch(DIGITS, number=number, **{**TRAIN, "seed": seed})[0][0]
        for number, seed in ((1, 7), (2, 7), (1, 8))
    ]
    assert not torch.equal(views[0], views[1])
    assert not torch.equal(views[0], views[2])


@settings(max_examples=20, deadline=None)
@given(batch_size=st.integers(2, 800), world=st.integers(1, 4), shuffle=st.booleans())
def test_a_view_depends_on_neither_batch_nor_world_nor_order(batch_size: int, world: int, shuffle: bool):
    if batch_size < world:
        return
    options = {"seed": 7, "augment": True}
    expected = rows(joined(epoch(DIGITS, batch_size=700, **options))[0])
    found = [
        images
        for rank in range(world)
        for images, _ in epoch(
            DIGITS, batch_size=batch_size, rank=rank, world=world, shuffle=shuffle, **options
        )
    ]
    found_rows = rows(torch.cat(found))
    if shuffle and 0 < 700 % batch_size < 2 * world:  # too small for batch normalization: left out
        assert len(found_rows) == 700 - 700 % batch_size
        assert set(found_rows) <= set(expected)
    else:
        assert found_rows == expected


@pytest.mark.parametrize("world", [1, 3])
def test_an_evaluation_gives_every_test_sample_once(world: int):
    expected = rows(joined(epoch(DIGITS, "test", 1000))[0])
    readers = [DIGITS.reader("test", 333, rank=rank, world=world) for rank in range(world)]
    parts = [list(reader) for reader in readers]
    assert rows(torch.cat([joined(part)[0] for part in parts])) == expected
    assert [len(reader) for reader in readers] == [4] * world
    assert [readers[0].global_count(batch) for batch in range(4)] == [333, 333, 333, 1]
    if world == 3:
        assert [len(part) for part in parts] == [
            4,
            3,
            3,
        ]  # the last batch has one sample: empty shares are skipped
    with pytest.raises(IndexError):
        readers[0].global_count(4)


def test_digits_are_split_once_for_all():
    assert DIGITS.sizes == {"train": 700, "val": 97, "test": 1000}
    parts = [joined(epoch(DIGITS, split, 1000)) for split in ("train", "val", "test")]
    info = DIGITS.info
    pixels = torch.from_numpy(load_digits().images).double() / 255
    expected = ((pixels - info.mean[0]) / info.std[0]).float()
    found = torch.cat([images for images, _ in parts])
    assert torch.allclose(
        found.sum(dim=(1, 2, 3)).sort().values, expected.sum(dim=(1, 2, 3)).sort().values, atol=1e-3
    )
    assert len(set(rows(found))) == len(set(rows(expected)))
    assert all(labels.bincount(minlength=10).min() > 0 for _, labels in parts)


def test_limit_takes_the_first_samples_of_each_split():
    limited = open_data(DataSettings(name="digits", limit=40))
    assert limited.sizes == {"train": 40, "val": 40, "test": 40}
    for split in ("train", "val", "test"):
        whole, first = joined(epoch(DIGITS, split, 1000)), joined(epoch(limited, split, 1000))
        assert torch.equal(whole[0][:40], first[0])
        assert torch.equal(whole[1][:40], first[1])


@pytest.mark.parametrize(("world", "batches"), [(1, 3), (2, 3), (3, 2)])
def test_a_last_batch_too_small_for_batch_normalization_is_dropped(world: int, batches: int):
    data = open_data(DataSettings(name="digits", limit=68))
    reader = data.reader("train", 32, shuffle=True, world=world)
    assert len(reader) == batches
    assert sum(reader.global_count(batch) for batch in range(batches)) == (68 if batches == 3 else 64)


def test_too_few_samples_to_train_on_is_the_user_s_error():
    with pytest.raises(UserError, match=r"data\.batch_size"):
        DIGITS.reader("train", 2, world=3, shuffle=True)
    few = open_data(DataSettings(name="digits", limit=5))
    assert len(few.reader("train", 64, shuffle=True, world=2)) == 1
    with pytest.raises(UserError, match=r"data\.limit"):
        few.reader("train", 64, shuffle=True, world=3)


def test_channels_last_changes_the_layout_only():
    plain, other = (epoch(DIGITS, channels_last=flag, **TRAIN)[0][0] for flag in (False, True))
    assert torch.equal(plain, other)
    assert plain.is_contiguous()
    assert other.is_contiguous(memory_format=torch.channels_last)
    assert plain.dtype == torch.float32


def test_batches_are_the_consumer_s_own():
    reader = DIGITS.reader("train", 64, **TRAIN)
    expected = [(images.clone(), labels.clone()) for images, labels in reader]
    for images, labels in reader:
        images.zero_()
        labels.zero_()
    assert equal(list(reader), expected)


def test_a_closed_reader_reads_no_more():
    reader = DIGITS.reader("train", 64)
    batches = iter(reader)
    next(batches)
    reader.close()
    assert next(batches, None) is None
    with pytest.raises(RuntimeError, match="closed"):
        iter(reader)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_or_damaged_cifar_says_what_was_looked_for_and_the_cure(name: str, tmp_path: Path):
    settings = DataSettings(name=name, root=tmp_path)
    with pytest.raises(
        UserError, match=r"is missing(.|\n)*data\.root=DIR(.|\n)*data\.download=true"
    ) as caught:
        open_data(settings)
    assert len(str(caught.value).splitlines()) <= 3
    folder, names = (
        "cifar-10-batches-py",
        [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"],
    )
    if name == "cifar100":
        folder, names = "cifar-100-python", ["train", "test", "meta"]
    (tmp_path / folder).mkdir()
    for file in names:
        (tmp_path / folder / file).write_bytes(b"not an archive")
    with pytest.raises(UserError, match=r"damaged(.|\n)*data\.download=true"):
        open_data(settings)
    with pytest.raises(UserError, match=r"data\.root is not set"):
        open_data(DataSettings(name=name))


@pytest.mark.data("cifar-10-batches-py")
def test_cifar10_has_its_sizes_and_statistics():
    data = open_data(DataSettings(name="cifar10", root=Path(os.environ["PBKD_DATA"])))
    assert data.sizes == {"train": 45000, "val": 5000, "test": 10000}
    images, labels = next(iter(data.reader("train", 5000)))
    assert images.mean(dim=(0, 2, 3)).abs().max() < 0.03
    assert (images.std(dim=(0, 2, 3)) - 1).abs().max() < 0.03
    assert labels.bincount(minlength=10).min() > 400
    assert sum(labels.bincount() for _, labels in data.reader("test", 500)).tolist() == [1000] * 10
    views = [epoch(data, batch_size=128, rank=rank, world=2, first=350, **TRAIN) for rank in range(2)]
    whole = epoch(data, batch_size=128, first=350, **TRAIN)
    assert equal([joined(list(shares)) for shares in zip(*views, strict=True)], whole)
