"""Views of images, against what torchvision and plain loops give."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pbkd.data.augment import (
    cut_out,
    cutout_boxes,
    draw_views,
    random_crop,
    random_flip,
    resized_crop_box,
    resized_crop_flip,
)
from pbkd.data.draws import sample_keys
from pbkd.preprocessing import Preprocessing, WrongSizeError
from pbkd.torchvision_compat import import_torchvision


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(("padding", "side"), [(4, 32), (1, 8)])
def test_a_crop_is_a_window_of_the_zero_padded_image(padding, side):
    images = random_images(300, 3, side, side)
    cropped = random_crop(images, sample_keys(0, 0, np.arange(300)), padding)
    padded = np.pad(images, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    offsets = set()
    for image, view in zip(padded, cropped, strict=True):
        windows = {
            (y, x): image[:, y : y + side, x : x + side]
            for y in range(2 * padding + 1)
            for x in range(2 * padding + 1)
        }
        matches = [at for at, window in windows.items() if np.array_equal(window, view)]
        assert len(matches) == 1
        offsets.update(matches)
    assert len(offsets) > 0.9 * (2 * padding + 1) ** 2


def test_a_flip_mirrors_about_half_of_the_images():
    images = random_images(1000, 3, 8, 8)
    flipped = random_flip(images.copy(), sample_keys(0, 0, np.arange(1000)))
    mirrored = [np.array_equal(view, image[..., ::-1]) for image, view in zip(images, flipped, strict=True)]
    same = [np.array_equal(view, image) for image, view in zip(images, flipped, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 440 < sum(mirrored) < 560


@settings(max_examples=50)
@given(width=st.integers(1, 600), height=st.integers(1, 600), index=st.integers(0, 10**6))
def test_a_resized_crop_lies_in_the_image(width, height, index):
    numbers = draw_views(sample_keys(0, 0, np.array([index])))[0].tolist()
    left, top, right, bottom = resized_crop_box(width, height, numbers)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_resized_crops_have_torchvision_s_areas_and_ratios():
    rows = draw_views(sample_keys(0, 0, np.arange(2000))).tolist()
    boxes = np.array([resized_crop_box(500, 400, row) for row in rows])
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas, ratios = widths * heights / (500 * 400), widths / heights
    assert 0.075 < areas.min() < 0.1
    assert 0.98 < areas.max() <= 1
    assert 0.74 < ratios.min() < 0.77
    assert 1.3 < ratios.max() < 1.35
    random = import_torchvision().transforms.RandomResizedCrop
    theirs = np.array(
        [random.get_params(Image.new("L", (500, 400)), (0.08, 1), (3 / 4, 4 / 3)) for _ in range(2000)]
    )
    assert abs(areas.mean() - (theirs[:, 2] * theirs[:, 3]).mean() / (500 * 400)) < 0.03
    assert abs(ratios.mean() - (theirs[:, 3] / theirs[:, 2]).mean()) < 0.03


def test_a_resized_crop_equals_torchvision_s_of_the_same_box():
    image = Image.fromarray(random_images(70, 90, 3))
    numbers = draw_views(sample_keys(0, 0, np.array([3])))[0].tolist()
    left, top, right, bottom = resized_crop_box(90, 70, numbers)
    functional = import_torchvision().transforms.functional
    expected = functional.resized_crop(image, top, left, bottom - top, right - left, [32, 32])
    for flip in (False, True):
        numbers[1] = float(flip)
        view = resized_crop_flip(image, 32, numbers)
        assert np.array_equal(view, functional.hflip(expected) if flip else expected)


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (57, 57), (20, 400)])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_a_view_equals_torchvision_s(size: tuple[int, int], interpolation: str) -> None:
    transforms = import_torchvision().transforms
    mode = transforms.InterpolationMode(interpolation)
    image = Image.fromarray(random_images(size[1], size[0], 3))
    usual = {"image_size": 56, "mean": (0,), "std": (1,), "interpolation": interpolation, "crop": "center"}
    scaled = Preprocessing(resize="short_side", resize_size=64, **usual)
    expected = transforms.Compose([transforms.Resize(64, mode), transforms.CenterCrop(56)])(image)
    assert np.array_equal(scaled.pixels(image), expected)
    squashed = Preprocessing(resize="both", resize_size=60, **usual)
    expected = transforms.Compose([transforms.Resize((60, 60), mode), transforms.CenterCrop(56)])(image)
    assert np.array_equal(squashed.pixels(image), expected)


def test_an_image_of_another_size_is_refused_where_none_is_made_of_it() -> None:
    image = Image.fromarray(random_images(40, 32, 3))
    exact = Preprocessing(image_size=32, mean=(0,), std=(1,))
    assert np.array_equal(exact.pixels(image.crop((0, 4, 32, 36))), np.asarray(image)[4:36])
    with pytest.raises(WrongSizeError, match="has 32 x 40 pixels\nexpected 32 x 32"):
        exact.pixels(image)
    assert exact.model_copy(update={"crop": "center"}).pixels(image).shape == (32, 32, 3)
    with pytest.raises(WrongSizeError):
        exact.model_copy(update={"crop": "center", "image_size": 36}).pixels(image)


def test_a_cutout_is_half_the_side_around_any_pixel_and_clipped():
    images = random_images(3000, 3, 32, 32)
    keys = sample_keys(0, 0, np.arange(3000))
    fill = np.array([0, 0, 0], np.uint8)  # which no pixel has
    boxes = cutout_boxes(keys, 32)
    holes = cut_out(images, keys, fill) == 0
    for hole, (top, left, bottom, right) in zip(holes, boxes, strict=True):
        assert hole[:, top:bottom, left:right].all() and hole.sum() == 3 * (bottom - top) * (right - left)
    sizes = boxes[:, 2:] - boxes[:, :2]
    assert sizes.min() == 8 and sizes.max() == 16
    starts = boxes[:, 0]
    assert abs((starts == 0).mean() - 9 / 32) < 0.03 and set(starts) == set(range(24))
