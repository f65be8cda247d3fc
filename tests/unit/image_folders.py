"""Small image folders in ImageNet's layout, with files of many kinds."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "emu")


def picture(seed: int, height: int, width: int) -> Image.Image:
    """A smooth RGB picture: JPEG changes it little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save_folder(root: Path, train: int = 6, val: int = 3) -> Path:
    """root/{train,val}/{cat,dog,emu}/NN.{JPEG,png}, of different sizes."""
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = picture(100 * label + number, 20 + 3 * number, 40 - 2 * number)
                image.save(folder / f"{number:02}.{'png' if number % 2 else 'JPEG'}")
    return root
