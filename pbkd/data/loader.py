"""Which loader reads the data: FFCV where it can, or torch."""

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from pbkd.data.beton import BetonManifest, open_checked, read_manifest
from pbkd.data.digest import Identity, data_digest, data_identity
from pbkd.data.settings import DataSettings
from pbkd.errors import AbsentDataError, UserError
from pbkd.storage import user_cache


def resolve_loader(settings: DataSettings, digest: str | None = None) -> DataSettings:
    """`settings` with `loader` as it is taken here: `ffcv` or `torch`.

    `auto` takes FFCV where it is installed and betons of these data are there. `digest` is `data_digest` of
    the data; it is computed where it is needed and not given.

    Raises UserError with the cure when FFCV is to be used, and it or a beton is missing, or a beton is
    damaged, of other data, or not as these settings need it.
    """
    if settings.loader == "ffcv" and not _is_installed():
        raise without_ffcv("is not installed")
    loader: Literal["ffcv", "torch"] = "torch"
    if settings.loader != "torch" and settings.name != "digits" and _is_asked_or_there(settings):
        digest = digest or data_digest(settings, user_cache())
        if settings.loader == "ffcv" or all(_is_of(path, digest) for path in settings.beton_paths().values()):
            for path in settings.beton_paths().values():
                _require_pixels(path, open_checked(path, digest), settings)
            loader = "ffcv"
    return settings.model_copy(update={"loader": loader})


def look_at(
    settings: DataSettings, cache: Path, known: Identity | None = None
) -> tuple[DataSettings, Identity | None, str | None]:
    """What the data are, or the user's message why they, or betons that are asked for, are not here.

    Returns `settings` with `loader` as it is taken here; the identity, or None; the message, or None. Data
    that are `known` are not looked at again. `cache`: see `data_identity`. Raises UserError for data that are
    here and cannot be used.
    """
    try:
        if known is None or known.source != settings.source():
            known = data_identity(settings, cache)
    except AbsentDataError as error:
        return settings, None, str(error)
    try:
        return resolve_loader(settings, known.digest), known, None
    except UserError as error:
        return settings, None, str(error)


def without_ffcv(what: str) -> UserError:
    """The error for FFCV that is asked for but cannot be used."""
    return UserError(
        f"data.loader=ffcv: FFCV {what}\n"
        "it is built with pkg-config, libturbojpeg0-dev, libopencv-dev (apt-get) and a C++ compiler\n"
        "cure: these, then pip install 'pbkd[ffcv]' (in a checkout: make ffcv); or data.loader=torch"
    )


def _is_asked_or_there(settings: DataSettings) -> bool:
    if settings.loader == "ffcv":
        return True
    if settings.root is None and settings.beton is None:
        return False
    return _is_installed() and all(path.is_file() for path in settings.beton_paths().values())


def _is_installed() -> bool:
    return find_spec("ffcv") is not None


def _is_of(path: Path, digest: str) -> bool:
    try:
        return read_manifest(path).source_digest == digest
    except UserError:  # nothing says what it was made from
        return False


def _require_pixels(path: Path, manifest: BetonManifest, settings: DataSettings) -> None:
    """Raise UserError if the torch reader would give other images: a CIFAR is not stored pixel by pixel, or
    photographs are turned otherwise."""
    if settings.name == "folder":
        if (stored := manifest.settings.orientation) != settings.orientation:
            raise UserError(
                f"{path}: has orientation {stored}, and data.orientation={settings.orientation}\n"
                "cure: pbkd data prepare RECIPE.yaml, or data.loader=torch"
            )
        return
    side = settings.describe().input_shape[1]
    if manifest.settings.mode == "jpeg" or manifest.shape != (side, side):
        raise UserError(
            f"{path}: holds images of {manifest.shape} as {manifest.settings.mode}\n"
            f"expected raw pixels of {side} x {side}, as {settings.name} has\n"
            f"cure: pbkd data prepare {settings.name} --mode raw"
        )
