"""Betons, FFCV's files, may only be opened here: the manifest beside each one says what it must be."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_serializer
from pydantic_core.core_schema import SerializerFunctionWrapHandler

from pbkd.data.beton_format import RAW, FormatError, Tables, read_tables
from pbkd.data.folder import PartName
from pbkd.errors import UserError
from pbkd.preprocessing import Orientation
from pbkd.storage import open_file, stays_below

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

Mode = Literal["raw", "jpeg", "smart"]


def _below(name: str) -> str:
    if not stays_below(name):
        raise ValueError(f"{name!r} is not below the data set's root")
    return name


class BetonSettings(BaseModel):
    """How images are stored.

    mode: `raw` pixels; `jpeg`; or `smart`: raw where that takes no more than a 224 x 224 view, else JPEG.
    max_resolution: longer side in pixels to which larger images are scaled down; null: never.
    quality: of JPEG, 1 to 100. null: a JPEG file that needs neither conversion nor scaling is taken as it is,
      byte for byte, and others are encoded with 90.
    orientation: `exif` stores a photograph turned as its EXIF tag says; such JPEG files are encoded anew.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode = "raw"
    max_resolution: int | None = Field(default=None, ge=8, le=65535)
    quality: int | None = Field(default=None, ge=1, le=100)
    orientation: Orientation = "stored"

    @model_serializer(mode="wrap")
    def _without_the_usual(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = written(self)
        if self.orientation == "stored":  # betons of before it was a setting keep their seals
            del content["orientation"]
        return content


class BetonManifest(BaseModel):
    """What stands beside FILE.beton in FILE.beton.json.

    name, split: of the data set (`cifar10`, `cifar100`, `folder`), and its part.
    bytes, sha256: of the file. tables: sha256 of all of it but the images, which is cheap to compare.
    class_names: of a folder, in the order of labels.
    shape: (height, width) that all images share, or null.
    source_digest: `data_digest` of the data set it was made from, without the files in `broken`.
    broken: image files of both splits that were skipped, relative to the data set's root.
    seal: sha256 of the other keys, so that an edited manifest is noticed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    name: Literal["cifar10", "cifar100", "folder"]
    split: PartName
    bytes: int
    sha256: str
    tables: str
    samples: int = Field(ge=1)
    classes: int = Field(ge=1)
    class_names: tuple[str, ...] | None
    settings: BetonSettings
    shape: tuple[int, int] | None
    source_digest: str
    broken: tuple[Annotated[str, AfterValidator(_below)], ...] = ()
    seal: str = ""

    def sealed(self) -> Self:
        """The same with its `seal`."""
        return self.model_copy(update={"seal": self._seal()})

    @property
    def is_sealed(self) -> bool:
        """Whether nothing was changed since it was sealed."""
        return self.seal == self._seal()

    def _seal(self) -> str:
        return hashlib.sha256(self.model_dump_json(exclude={"seal"}).encode()).hexdigest()


def manifest_path(path: Path) -> Path:
    """FILE.beton.json of FILE.beton."""
    return path.with_name(path.name + ".json")


def default_folder(root: Path, name: str) -> Path:
    """Where the betons of data set `name` below `root` are unless a place is named."""
    return root / "beton" / name


def read_manifest(path: Path) -> BetonManifest:
    """The manifest of the beton `path`. Raises UserError when there is none, or not as it was written."""
    place = manifest_path(path)
    try:
        with open_file(place) as file:
            manifest = BetonManifest.model_validate_json(file.read())
    except FileNotFoundError:
        what = f"has no manifest {place.name}" if path.exists() else "there is no such file"
        raise _unfit(path, what) from None
    except (OSError, ValidationError) as error:
        raise _unfit(path, f"its manifest {place.name} cannot be read: {_reason(error)}") from error
    if not manifest.is_sealed:
        raise _unfit(path, f"its manifest {place.name} was edited")
    if path.name != f"{manifest.split}.beton":
        raise _unfit(path, f"is the {manifest.split} split under another name")
    return manifest


def open_checked(path: Path, expect_digest: str | None) -> BetonManifest:
    """Check everything about a beton that can be checked without reading its images: 0.01 s for 50,000.

    Manifest, size, header, fields, every row of both tables. `expect_digest` is `data_digest` of the data
    that the file must have been made from. Raises UserError naming the file and the cure.
    """
    manifest = read_manifest(path)
    with _opened(path) as file:
        _checked_tables(path, file, manifest)
    if expect_digest not in (None, manifest.source_digest):
        raise _other_data(path, manifest)
    return manifest


def find_intact(path: Path, settings: BetonSettings, expect_digest: str) -> BetonManifest | None:
    """The manifest of the beton `path` if that was made with `settings` of the data of `expect_digest`, and
    no byte of it has changed since."""
    try:
        manifest = open_checked(path, expect_digest)
        if manifest.settings != settings:
            return None
        with _opened(path) as file:
            _check_content(path, file, manifest)
    except UserError:
        return None
    return manifest


def verify(
    path: Path, full: bool = False, workers: int = 1, progress: Callable[[int, int], None] | None = None
) -> BetonManifest:
    """`open_checked`, and with `full` the file's sha256 and the decoding of every image on `workers` threads.

    `progress` is told (images done, of all). Raises UserError naming the file and the cure.
    """
    manifest = read_manifest(path)
    with _opened(path) as file:
        tables = _checked_tables(path, file, manifest)
        if not full:
            return manifest
        _check_content(path, file, manifest)

        def decoded(index: int) -> None:
            sample, place = tables.samples[index], tables.allocations[index]
            content = os.pread(file.fileno(), int(place["size"]), int(place["ptr"]))
            if sample["mode"] != RAW:
                _decode(content, int(sample["width"]), int(sample["height"]))

        with ThreadPoolExecutor(workers) as executor:
            results = in_order(executor, decoded, range(manifest.samples), ahead=4 * workers)
            try:
                for done, _ in enumerate(results, start=1):
                    if progress:
                        progress(done, manifest.samples)
            except FormatError as error:
                raise _unfit(path, str(error)) from error
    return manifest


def in_order(
    executor: Executor, function: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int
) -> Iterator[_Result]:
    """`function` of every item, in their order, computed by `executor` at most `ahead` items in advance."""
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(executor.submit(function, item))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _opened(path: Path) -> BufferedReader:
    try:
        return open_file(path)
    except OSError as error:
        raise _unfit(path, f"cannot be read: {_reason(error)}") from error


def _checked_tables(path: Path, file: BufferedReader, manifest: BetonManifest) -> Tables:
    size = os.fstat(file.fileno()).st_size
    if size != manifest.bytes:
        raise _unfit(path, f"has {size} bytes, its manifest says {manifest.bytes}: it was cut or replaced")
    try:
        tables = read_tables(file)
    except FormatError as error:
        raise _unfit(path, str(error)) from error
    if len(tables.samples) != manifest.samples:
        raise _unfit(path, f"has {len(tables.samples)} samples, and its manifest says {manifest.samples}")
    labels = tables.samples["label"]
    outside = (labels < 0) | (labels >= manifest.classes)
    if outside.any():
        index = int(np.argmax(outside))
        raise _unfit(path, f"label {labels[index]} of sample {index} is not below {manifest.classes}")
    if tables.shape != manifest.shape:
        raise _unfit(path, f"has images of {tables.shape}, and its manifest says {manifest.shape}")
    if tables.digest() != manifest.tables:
        raise _unfit(path, "its tables are not what was written")
    return tables


def _check_content(path: Path, file: BufferedReader, manifest: BetonManifest) -> None:
    file.seek(0)
    if hashlib.file_digest(file, "sha256").hexdigest() != manifest.sha256:
        raise _unfit(path, "its content is not what was written: the sha256 differs")


def _decode(content: bytes, width: int, height: int) -> None:
    try:
        with Image.open(BytesIO(content), formats=["JPEG"]) as image:
            image.load()
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and more on broken data
        raise FormatError(f"holds an image that cannot be decoded: {_reason(error)}") from error
    if image.size != (width, height) or image.mode != "RGB":
        raise FormatError(f"holds an image that is {image.mode} {image.size} instead of {width} x {height}")


def _other_data(path: Path, manifest: BetonManifest) -> UserError:
    if manifest.broken:
        return UserError(
            f"{path}: leaves out {len(manifest.broken)} broken images that the data set has, such as "
            f"{manifest.broken[0]}\nits manifest lists them under `broken`\n"
            "cure: remove these files from the data set; then it fits, without preparing it again"
        )
    return UserError(
        f"{path}: was made from other data than these (digest {manifest.source_digest[:12]}…)\n"
        "cure: pbkd data prepare again, or data.beton=DIR with the folder made from these data"
    )


def _unfit(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}\ncure: pbkd data prepare, which writes what is missing or damaged")


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}".partition("\n")[0]
