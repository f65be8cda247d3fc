"""What a recipe says about its data: `DataSettings`, and what follows from it: `DataInfo`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from pbkd.data.beton import default_folder, read_manifest
from pbkd.data.folder import PartName, list_names
from pbkd.errors import AbsentDataError, UserError
from pbkd.preprocessing import Crop, Interpolation, Orientation, Preprocessing, Resize

READER_VERSION = 1
"""Raised by hand when the same settings, seed and data begin to give other numbers; part of every stage
key."""


def _absolute(path: Path) -> Path:
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:  # ~NAME of nobody
        raise ValueError(f"{path}: {error}") from error


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
"""A path as a recipe gives it, `~` and relative ones too; workers have another current folder."""

Augmentation = Literal["none", "crop_flip", "crop_flip_cutout", "shift", "resized_crop_flip"]


@dataclass(frozen=True)
class DataInfo:
    """What networks and stages have to know of the data.

    `input_shape` is (C, H, W); `mean` and `std` are per channel, of pixels in [0, 1]; `has_val` says whether
    a validation split is kept.
    """

    name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    has_val: bool = True


_CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100_STATISTICS = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_IN_MEMORY = {
    "digits": DataInfo("digits", (1, 8, 8), 10, (0.3053,), (0.3760,)),
    "cifar10": DataInfo("cifar10", (3, 32, 32), 10, *_CIFAR10_STATISTICS),
    "cifar100": DataInfo("cifar100", (3, 32, 32), 100, *_CIFAR100_STATISTICS),
}
_FOLDER_SIDE = 224
_SHORT_SIDE = 256 / 224
"""To which an image is scaled, as a share of the view that is cut out: what ImageNet is evaluated with."""
_OF_A_FOLDER = ("resize", "resize_size", "interpolation", "crop", "orientation", "splits", "progressive")
_IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_AUTO: dict[str, Augmentation] = {
    "digits": "shift",
    "cifar10": "crop_flip",
    "cifar100": "crop_flip",
    "folder": "resized_crop_flip",
}


class Splits(BaseModel):
    """Where a folder's parts are, below its root: folders of class folders, or CSV files (`path,label`).

    train: what is trained on. test: what accuracies are told of. val: what selects; without it, a
      `val_fraction` of `train`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str = "train"
    val: str | None = None
    test: str = "val"


class DataSettings(BaseModel):
    """The `data` section of a recipe; unknown keys are errors.

    name: `digits` (comes with scikit-learn), `cifar10`, `cifar100`, or `folder`: root/train/CLASS/*.JPEG and
      root/val/CLASS/*.JPEG as ImageNet has them; there `val` is the test split.
    root: folder that holds the data; digits need none.
    splits: of a folder with other names, or of CSV files: see `Splits`.
    download: fetch a missing CIFAR into `root`.
    batch_size: global training batch, over all ranks.
    eval_batch_size: global batch of evaluations; does not change their results.
    val_fraction: share of the training set kept for selection (0: no validation split). Digits are split into
      700 / 97 / 1000 samples whatever it says.
    augment: `auto` is `crop_flip` (4 zero pixels) for CIFAR and a folder with `resize: none`, `shift` (1
      pixel, no flip) for digits, and `resized_crop_flip` for other folders. `crop_flip_cutout` also replaces
      a random square of half the side by the mean colour.
    image_size: side in pixels of what the network gets (of a folder: 224 by default); others have their own.
    resize, resize_size, interpolation, crop, orientation: of a folder's images, see `Preprocessing`. Without
      `resize_size`, `short_side` takes 256/224 of `image_size`, and `both` takes `image_size`. `crop` is
      `center`, but `none` with `resize: none`.
    progressive: progressive resizing of a folder's augmented views: pairs (epoch, side), such as
      [[0, 160], [8, 224]] for 160 pixels in a stage's first eight epochs. The network must take every size.
    num_classes: of a folder, when it is not on this machine.
    mean, std: per channel, of pixels in [0, 1]; default: the data set's usual ones.
    limit: only the first so many samples of each split, for smoke runs.
    workers: threads that read images (of a folder, or of betons by FFCV); does not change the results.
    loader: `ffcv` reads betons, `torch` the data themselves; `auto` is `ffcv` where it is installed and there
      are betons of these data. CIFAR gives the same numbers by both; a folder's images are decoded and scaled
      otherwise.
    beton: folder of the betons that `pbkd data prepare` wrote; default: ROOT/beton/NAME.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["digits", "cifar10", "cifar100", "folder"]
    root: AbsolutePath | None = None
    download: bool = False
    batch_size: int = Field(default=128, ge=1)
    eval_batch_size: int = Field(default=500, ge=1)
    val_fraction: float = Field(default=0.1, ge=0, lt=1)
    augment: Literal["auto"] | Augmentation = "auto"
    image_size: int | None = Field(default=None, ge=8)
    splits: Splits = Splits()
    resize: Resize = "short_side"
    resize_size: int | None = Field(default=None, ge=8)
    interpolation: Interpolation = "bilinear"
    crop: Crop | None = None
    orientation: Orientation = "stored"
    progressive: tuple[tuple[int, int], ...] = ()
    num_classes: int | None = Field(default=None, ge=2)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    limit: int | None = Field(default=None, ge=2)
    workers: int = Field(default=2, ge=1)
    loader: Literal["auto", "ffcv", "torch"] = "auto"
    beton: AbsolutePath | None = None

    @model_validator(mode="after")
    def _fits_its_data(self) -> Self:
        native = _IN_MEMORY.get(self.name)
        if native is None:
            self._fit_folder()
        else:
            self._fit_memory(native)
        channels = 3 if native is None else native.input_shape[0]
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != channels:
                raise ValueError(f"{key} has {len(values)} values; {self.name} has {channels} channels")
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std={self.std}: every value must be above 0")
        return self

    def _fit_folder(self) -> None:
        size = self._resize_size()
        if self.download:
            raise ValueError("download=true works for cifar10 and cifar100; a folder is never fetched")
        if self.resize == "none" and size is not None:
            raise ValueError(f"resize_size={size}: resize=none scales nothing; leave it out")
        if size is not None and size < self._side():
            raise ValueError(
                f"resize_size={size}: image_size={self._side()} is cut out of that, and cannot be more"
            )
        if self.progressive and self.augmentation != "resized_crop_flip":
            raise ValueError(f"progressive: augment={self.augmentation} has one size; leave it out")

    def _fit_memory(self, native: DataInfo) -> None:
        side = native.input_shape[1]
        if self.augment == "resized_crop_flip":
            raise ValueError(
                f"augment=resized_crop_flip: {self.name} has crop_flip, crop_flip_cutout, shift or none"
            )
        if self.image_size not in (None, side):
            raise ValueError(f"image_size={self.image_size}: {self.name} has {side}; leave it out")
        for key in _OF_A_FOLDER:
            if (found := getattr(self, key)) != type(self).model_fields[key].get_default():
                raise ValueError(f"{key}={found}: {self.name} has images of {side}; leave it out")
        if self.num_classes not in (None, native.num_classes):
            raise ValueError(
                f"num_classes={self.num_classes}: {self.name} has {native.num_classes}; leave it out"
            )
        if self.name == "digits" and (self.loader == "ffcv" or self.beton is not None):
            raise ValueError("loader=ffcv and beton: digits are in memory; leave both out")

    @model_validator(mode="after")
    def _progressive_rises(self) -> Self:
        epochs = [epoch for epoch, _ in self.progressive]
        if epochs and (epochs[0] != 0 or epochs != sorted(set(epochs))):
            raise ValueError(f"progressive={list(self.progressive)}: epochs must start at 0 and rise")
        if any(side < 8 for _, side in self.progressive):
            raise ValueError(f"progressive={list(self.progressive)}: every side must be 8 or more")
        return self

    @property
    def augmentation(self) -> Augmentation:
        """`augment` with `auto` resolved."""
        if self.augment != "auto":
            return self.augment
        return "crop_flip" if self.resize == "none" else _AUTO[self.name]

    def preprocessing(self) -> Preprocessing:
        """What makes a network's input of an image, resolved."""
        native = _IN_MEMORY.get(self.name)
        mean, std = (native.mean, native.std) if native else _IMAGENET_STATISTICS
        mean, std = self.mean or mean, self.std or std
        if native is not None:
            colours: Literal["grey", "RGB"] = "grey" if native.input_shape[0] == 1 else "RGB"
            return Preprocessing(colours=colours, image_size=native.input_shape[1], mean=mean, std=std)
        return Preprocessing(
            orientation=self.orientation,
            resize=self.resize,
            resize_size=self._resize_size(),
            interpolation=self.interpolation,
            crop=self.crop or ("none" if self.resize == "none" else "center"),
            image_size=self._side(),
            mean=mean,
            std=std,
        )

    def _side(self) -> int:
        return self.image_size or _FOLDER_SIDE

    def _resize_size(self) -> int | None:
        if self.resize == "none" or self.resize_size is not None:
            return self.resize_size
        return round(self._side() * _SHORT_SIDE) if self.resize == "short_side" else self._side()

    def places(self) -> dict[PartName, str]:
        """Where the parts of a folder are, below its root."""
        named: tuple[tuple[PartName, str | None], ...] = (
            ("train", self.splits.train),
            ("val", self.splits.val),
            ("test", self.splits.test),
        )
        return {name: place for name, place in named if place is not None}

    def data_root(self) -> Path:
        """The folder `root` names. Raises UserError when the recipe names none."""
        if self.root is None:
            raise AbsentDataError(
                f"data.root is not set, and {self.name} is read from disk\ncure: data.root=DIR"
            )
        return self.root

    def source(self) -> str:
        """What names the data set on this machine."""
        return json.dumps([self.name, None if self.root is None else str(self.root), self.places()])

    def beton_paths(self) -> dict[PartName, Path]:
        """The beton of each part. Raises UserError when neither `beton` nor `root` is set."""
        folder = self.beton or default_folder(self.data_root(), self.name)
        return {part: folder / f"{part}.beton" for part in self.places()}

    def describe(self, classes: int | None = None) -> DataInfo:
        """Input shape, classes and normalization; reads no data.

        A folder's number of classes is `classes` if that is given, else `num_classes`, else counted in
        root/train. Raises UserError when there is none of these.
        """
        native = _IN_MEMORY.get(self.name)
        if native is None:
            classes = classes or self.num_classes or self._count_classes()
            native = DataInfo(self.name, (3, self._side(), self._side()), classes, *_IMAGENET_STATISTICS)
        has_val = self.name == "digits" or self.val_fraction > 0 or self.splits.val is not None
        return replace(native, mean=self.mean or native.mean, std=self.std or native.std, has_val=has_val)

    def semantic(self) -> dict[str, Any]:
        """What changes the numbers, resolved and ready for JSON: these settings' part of a stage key.

        Not in it: where the data lie and how fast they are read (root, download, workers, eval_batch_size,
        beton), and `num_classes`, which the data themselves determine. With `loader` resolved to `ffcv`, a
        folder has how its betons store the images; raises UserError when they are gone.
        """
        seen = self.preprocessing()
        result: dict[str, Any] = {
            "name": self.name,
            "batch_size": self.batch_size,
            "augment": self.augmentation,
            "mean": list(seen.mean),
            "std": list(seen.std),
            "limit": self.limit,
        }
        if self.name != "digits" and self.splits.val is None:
            result["val_fraction"] = self.val_fraction
        if self.name == "folder":
            result |= seen.model_dump(exclude={"mean", "std", "colours"})
            if self.progressive:
                result["progressive"] = [list(pair) for pair in self.progressive]
            if self.loader == "ffcv":
                result["betons"] = [
                    read_manifest(path).settings.model_dump() for path in self.beton_paths().values()
                ]
        return result

    def _count_classes(self) -> int:
        try:
            return len(list_names(self.data_root(), self.splits.train))
        except UserError as error:
            cure = "or, where the data are elsewhere: data.num_classes=N"
            raise UserError(f"{error} {cure}") from None
