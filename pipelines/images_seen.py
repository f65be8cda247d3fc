"""What `pbkd init` finds out about a user's images: their folders, their sizes, how the network sees them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pbkd.data import DataSettings, open_data
from pbkd.data.folder import read_rgb
from pbkd.errors import UserError
from pbkd.measure.accuracy import evaluate
from pbkd.networks.builders import usual_preprocessing

if TYPE_CHECKING:
    from pbkd.networks import BlockNetwork

LOOKED_AT = 64  # images of which the size is read
COMPARED = 2000  # images that an accuracy is compared on
TRIED = 300  # images that another way of seeing them is tried on
Z = 2.6  # of chance, 99 %
MOST_MISSED = 0.5  # percent
_TEST_FOLDERS = ("val", "test", "valid", "validation")
_OTHER_WAYS: tuple[dict[str, Any], ...] = (
    {"resize": "none", "resize_size": None},
    {"resize": "short_side", "resize_size": None},
    {"resize": "both", "resize_size": None},
    {"interpolation": "bilinear"},
    {"interpolation": "bicubic"},
    {"orientation": "exif"},
    {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
    {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)},
)
"""What else a network may have been trained with."""


def settings_for(root: Path, arch: str, image_size: int | None, pretrained: bool) -> tuple[DataSettings, str]:
    """The data settings for a folder, and in a few words where they come from.

    The library's own for its own weights; else images that all have one size, that of the network if it is
    named, are taken as they are; else the library's again.
    """
    given: dict[str, Any] = {"splits": _splits(root)}
    usual = usual_preprocessing(arch) if "/" in arch else {}
    own = None if pretrained else _own_side(DataSettings(name="folder", root=root, **given))
    if own is not None and image_size in (None, own):
        seen = {name: usual[name] for name in ("mean", "std") if name in usual}
        given |= seen | {"image_size": own, "resize": "none"}
        why = "all images have this size, and are taken as they are"
        return DataSettings(name="folder", root=root, **given), why
    if not usual:
        return DataSettings(name="folder", root=root, image_size=image_size, **given), "ImageNet's usual"
    side = image_size or usual["image_size"]
    usual["resize_size"] = round(side * usual["resize_size"] / usual["image_size"])
    given |= usual | {"image_size": side}
    return DataSettings(name="folder", root=root, **given), f"what {arch}'s own weights were trained for"


def _splits(root: Path) -> dict[str, str | None]:
    """`val` selects where there is a `test`, too; else what is there tests."""
    there = [name for name in _TEST_FOLDERS if (root / name).is_dir()]
    selects = [name for name in there if name != "test"]
    if "test" in there:
        return {"val": selects[0] if selects else None, "test": "test"}
    return {"test": there[0] if there else "val"}


def _own_side(settings: DataSettings) -> int | None:
    """The height and width of some training images, if all of them have the same."""
    from pbkd.data.datasets import list_folder

    paths = list_folder(settings).parts["train"].paths
    sides = set[int]()
    for path in paths[:: max(1, len(paths) // LOOKED_AT)]:
        sides.update(read_rgb(settings.data_root() / path).size)
    return sides.pop() if len(sides) == 1 else None


def compare_accuracy(network: BlockNetwork, settings: DataSettings, known: float) -> str:
    """What the network reaches on test images, in a line, if that is what the user knows.

    Raises UserError if it is not, with the way of seeing images that comes nearest.
    """
    found, count = _accuracy(network, settings, COMPARED)
    share = known / 100
    allowed = max(MOST_MISSED, 100 * Z * math.sqrt(share * (1 - share) / count))
    if abs(found - known) <= allowed:
        return f"{found:.2f} % of {count} test images, as you know it ({known:.2f} %)"
    others: Mapping[str, float] = {}
    if settings.name == "folder":
        ways = [*_OTHER_WAYS]
        if (side := _own_side(settings)) is not None:
            ways.append({"resize": "none", "resize_size": None, "image_size": side})
        others = {name: each for way in ways for name, each in _tried(network, settings, way)}
    name = min(others, key=lambda name: abs(others[name] - known), default=None)
    cure = "look at the normalization, the order of the classes and that of the colours (RGB)"
    if name is not None and abs(others[name] - known) < abs(found - known) - allowed:
        cure = f"with {name} it would be about {others[name]:.0f} %; else {cure}"
    raise UserError(
        f"--accuracy {known:g}: this network gets {found:.2f} % of {count} test images right\n"
        f"expected within {allowed:.1f} of it\n{cure}"
    )


def _accuracy(network: BlockNetwork, settings: DataSettings, images: int) -> tuple[float, int]:
    data = open_data(settings.model_copy(update={"limit": images, "loader": "torch"}))
    reader = data.reader("test", min(settings.eval_batch_size, 100))
    try:
        found = evaluate(network, reader)
    finally:
        reader.close()
    return found.top1, found.count


def _tried(network: BlockNetwork, settings: DataSettings, way: Mapping[str, Any]) -> list[tuple[str, float]]:
    changes = {name: value for name, value in way.items() if getattr(settings, name) != value}
    if not changes:
        return []
    try:
        other = DataSettings.model_validate(settings.model_dump() | changes | {"augment": "none"})
        found, _ = _accuracy(network, other, TRIED)
    except (ValueError, RuntimeError):  # images have not the size for it, or the network not
        return []
    told = [f"data.{name}={_text(value)}" for name, value in changes.items() if value is not None]
    return [(" ".join(told), found)]


def _text(value: Any) -> str:
    return "[" + ",".join(f"{number:g}" for number in value) + "]" if isinstance(value, tuple) else str(value)
