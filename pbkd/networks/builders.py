"""Networks that are not ours: built by torchvision, by timm, or by a function of the user's."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pbkd.errors import UserError, first_line
from pbkd.networks.own_code import digest_of_code, is_library_file
from pbkd.networks.spec import Scalar
from pbkd.torchvision_compat import import_torchvision

ALLOW_IMPORT = "PBKD_ALLOW_IMPORT"
LIBRARIES = ("torchvision", "timm")


class ForeignSettings(BaseModel):
    """A network of a library or of the user's own.

    Attributes:
        arch: `torchvision/NAME`, `timm/NAME`, or `package.module:function`, which gives the module and is
            imported only where `--allow-import` said so.
        cuts: where blocks end: paths of modules; null: where the resolution changes.
        arguments: of the library's builder or the function, beside the classes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    arch: str
    cuts: tuple[str, ...] | None = Field(default=None, min_length=1)
    arguments: dict[str, Scalar] = {}

    def code_digest(self) -> str | None:
        """sha256 of the user's code that `arch` names and of what it imports, for stage keys.

        None for a library's network, which counts by its name; see `digest_of_code`.

        Raises:
            UserError: the code may not or cannot be imported, or one of its files cannot be read.
        """
        return digest_of_code(_imported(self.arch)) if ":" in self.arch else None


def is_foreign(arch: str) -> bool:
    """Whether `arch` names a network of a library or of the user's, not one of `pbkd.networks.zoo`."""
    return "/" in arch or ":" in arch


def allow_import() -> None:
    """Let this process, and those it starts, import the modules that `package.module:function` names."""
    os.environ[ALLOW_IMPORT] = "1"


def build_module(
    arch: str, arguments: Mapping[str, Scalar], input_shape: tuple[int, int, int], num_classes: int
) -> nn.Module:
    """The module that `arch` names, on torch's current default device, with its builder's own weights.

    Raises:
        UserError: no such network, the builder fails, or the module may not be imported.
    """
    if ":" in arch:
        build: Callable[..., Any] = _function(arch)
        offered = {"num_classes": num_classes, "input_shape": input_shape}
        accepted = inspect.signature(build).parameters
        given = {name: value for name, value in offered.items() if name in accepted}
    else:
        library, _, name = arch.partition("/")
        _check_known(library, name)
        given = {"num_classes": num_classes}
        if library == "timm":
            build = _timm().create_model
            given |= {"model_name": name, "pretrained": False, "in_chans": input_shape[0]}
        else:
            build = _torchvision_models().get_model
            given |= {"name": name, "weights": None}
    try:
        module = build(**(given | dict(arguments)))
    except UserError:
        raise
    except Exception as error:  # a user's builder, or a library's given arguments, may raise anything
        raise UserError(f"network {arch}: its builder fails: {_raised(error)}") from error
    if not isinstance(module, nn.Module):
        raise UserError(f"network {arch}: gives a {type(module).__name__}, expected a torch.nn.Module")
    return module


def require_builder(arch: str) -> None:
    """Import what `arch` names, if it is a user's.

    Raises:
        UserError: it may not or cannot be imported, or has no such function.
    """
    if ":" in arch:
        _function(arch)


def pretrained_name(arch: str) -> str:
    """What the library's own weights of `arch` are called; identifies them in stage keys.

    Raises:
        UserError: there are none.
    """
    library, _, name = arch.partition("/")
    if library == "torchvision":
        _check_known(library, name)
        return str(_torchvision_models().get_model_weights(name)["DEFAULT"].url)
    if library == "timm":
        _check_known(library, name)
        configuration = _timm().get_pretrained_cfg(name)
        if configuration is not None and configuration.has_weights:
            return f"timm/{configuration.architecture}.{configuration.tag}"
    raise UserError(f"pretrained: {arch} comes without weights of its own; give weights: FILE.safetensors")


def pretrained_arguments(arch: str) -> dict[str, Scalar]:
    """What the library builds `arch` with if it comes with the library's own weights, and not else."""
    if arch in ("torchvision/googlenet", "torchvision/inception_v3"):
        return {"transform_input": True, "init_weights": False}
    return {}


def pretrained_tensors(arch: str) -> dict[str, Tensor]:
    """The library's own weights of `arch`, downloaded unless they are cached.

    Raises:
        UserError: they cannot be had.
    """
    wanted = pretrained_name(arch)
    library, _, name = arch.partition("/")
    try:
        if library == "torchvision":
            weights = _torchvision_models().get_model_weights(name)["DEFAULT"]
            return cast(dict[str, Tensor], weights.get_state_dict(progress=False, check_hash=True))
        network = cast(nn.Module, _timm().create_model(name, pretrained=True))
    except (OSError, RuntimeError, ValueError) as error:  # what urllib, torch.hub and huggingface_hub raise
        raise UserError(
            f"pretrained: {wanted} cannot be had ({first_line(error)}); where there is no network, give a "
            "file: weights: FILE.safetensors, or a state_dict that torch.save wrote"
        ) from error
    return network.state_dict()


def usual_preprocessing(arch: str) -> dict[str, Any]:
    """How the library's own weights of `arch` see images, in the names of `pbkd.preprocessing`.

    {} if it does not say, or says what has no name there (timm's `crop_mode="border"`).
    """
    library, _, name = arch.partition("/")
    _check_known(library, name)
    if library == "torchvision":
        seen = _torchvision_models().get_model_weights(name)["DEFAULT"].transforms()
        return {
            "image_size": seen.crop_size[0],
            "resize": "short_side",
            "resize_size": seen.resize_size[0],
            "interpolation": seen.interpolation.value,
            "mean": tuple(seen.mean),
            "std": tuple(seen.std),
        }
    if (seen := _timm().get_pretrained_cfg(name)) is None or seen.crop_mode == "border":
        return {}
    side = seen.input_size[-1]
    return {
        "image_size": side,
        "resize": "both" if seen.crop_mode == "squash" else "short_side",
        "resize_size": math.floor(side / seen.crop_pct),
        "interpolation": seen.interpolation,
        "mean": tuple(seen.mean),
        "std": tuple(seen.std),
    }


def known_names(library: str) -> list[str]:
    """The classifiers of `library`."""
    if library == "timm":
        return list(_timm().list_models())
    models = _torchvision_models()
    return list(models.list_models(module=models))


def _check_known(library: str, name: str) -> None:
    if library not in LIBRARIES:
        raise UserError(
            f"network.arch: unknown library '{library}'; it is torchvision/NAME, timm/NAME, one of ours, or "
            "package.module:function"
        )
    names = known_names(library)
    if name in names:
        return
    base = name.partition(".")[0]
    if library == "timm" and base in names:  # timm writes NAME.WEIGHTS
        names = list(_timm().list_pretrained(f"{base}.*"))
        if name in names:
            return
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{library}/{near[0]}'?" if near else ""
    raise UserError(f"network.arch: {library} has no network '{name}'{hint}")


def _function(arch: str) -> Callable[..., Any]:
    name = arch.partition(":")[2]
    found = getattr(_imported(arch), name, None)
    if not callable(found):
        raise UserError(f"network {arch}: its module has no function '{name}'")
    return cast(Callable[..., Any], found)


def _imported(arch: str) -> ModuleType:
    module = arch.partition(":")[0]
    if os.environ.get(ALLOW_IMPORT) != "1":
        raise UserError(
            f"network {arch}: needs your code, which is imported only if you say so: add --allow-import, or "
            f"set {ALLOW_IMPORT}=1"
        )
    if (here := str(Path.cwd())) not in sys.path:  # as `python -m` does
        sys.path.append(here)
    try:
        return importlib.import_module(module)
    except Exception as error:  # the module is the user's, and may raise anything
        is_missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        cure = "\nit is looked for here and on PYTHONPATH" if is_missing else ""
        raise UserError(f"network {arch}: {module} cannot be imported: {_raised(error)}{cure}") from error


def _torchvision_models() -> Any:
    import_torchvision()
    return importlib.import_module("torchvision.models")


def _timm() -> Any:
    import_torchvision()  # which timm imports
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError("network.arch: timm is not installed; pip install 'pbkd[timm]'") from error


def _raised(error: Exception) -> str:
    """What the user's code raised, and at which of its lines."""
    said = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {said}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith("<") and not is_library_file(frame.filename)
    ]
    return f"{own[-1].filename}, line {own[-1].lineno}: {said}" if own else said
