"""Read weights from files as people save them: safetensors, or what torch.save wrote, whatever the suffix.

Nothing is ever unpickled: torch reads tensors and plain containers only, and the few harmless objects that
training scripts save beside weights are replaced by an empty one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pbkd.errors import UserError
from pbkd.networks import BlockNetwork
from pbkd.networks.weights import few, fits
from pbkd.storage import open_file

PART = "::"
SAVE = "save the weights alone: torch.save(model.state_dict(), FILE)"
IGNORED_OBJECTS = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"{module}.{name}Path" for module in ("pathlib", "pathlib._local") for name in ("Posix", "Windows")),
)

Sets = dict[str, dict[str, Tensor]]
"""Sets of weights, each a state_dict, by the dotted keys that lead to them in the file."""


class _Ignored:
    """Takes the place of every object of `IGNORED_OBJECTS`, so that no code of theirs runs."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def split_part(path: Path) -> tuple[Path, str | None]:
    """Split `FILE::key` into the file and the key; the key is None if the path names no part.

    A file whose own name contains `::` wins. Where no such file exists, the path is returned whole.
    """
    file, key = str(path), None
    while not os.path.isfile(file):  # noqa: PTH113 - False, not OSError, for a name that is too long
        file, found, last = file.rpartition(PART)
        if not found:
            return path, None
        key = last if key is None else f"{last}{PART}{key}"
    return Path(file), key


def read_tensors(path: Path, network: BlockNetwork | None = None) -> dict[str, Tensor]:
    """Read one set of weights from a file of safetensors or of torch.save, under the file's own names.

    Training scripts put weights under `state_dict`, `model`, `model_ema` and the like, beside optimizer and
    epoch; every mapping of names to tensors is found, however deep. `FILE::key` names one of them, with dots
    for nested keys. Without it the only one is taken, or the only one that fits `network`.

    Raises:
        UserError: the file is missing or neither kind, holds objects other than data, holds no weights or
            not the named ones, or more than one set of weights among which the user has to choose.
    """
    file, key = split_part(path)
    sets = _weight_sets(file)
    if key is not None:
        sets = _named(sets, key, file)
    if network is not None and len(sets) > 1:
        sets = {key: tensors for key, tensors in sets.items() if fits(network, tensors)} or sets
    if len(sets) > 1:
        raise UserError(
            f"{file}: holds {len(sets)} sets of weights: {few(sets, 8)}\n"
            f"choose one, for example weights: {file}{PART}{[*sets][-1]}"
        )
    return next(iter(sets.values()))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        UserError: the file is missing or is not one.
    """
    _check_there(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as safetensors ({error}); it is damaged or another format"
        ) from error


def _check_there(path: Path) -> None:
    try:
        open_file(path).close()
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file; give one, absolute or relative to here") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file that can be") from error


def _weight_sets(path: Path) -> Sets:
    _check_there(path)
    try:
        with open_file(path) as file:
            start = file.read(9)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make the file readable") from error
    if start[8:] == b"{":  # behind the length of safetensors' header, which is JSON
        return {"": read_safetensors(path)}
    if not start.startswith((b"PK", b"\x80")):  # torch.save writes a zip; before torch 1.6, pickles
        raise UserError(
            f"{path}: cannot be read as safetensors, nor as what torch.save writes; it is damaged or another "
            "format"
        )
    content = _torch_content(path)
    sets = _sets(content)
    if not sets:
        kind = type(content).__name__
        held = few(content, 6) if isinstance(content, Mapping) and content else f"an object of type {kind}"
        raise UserError(f"{path}: holds no weights by name, but {held}\n{SAVE}")
    dotted = {key: tensors for key, tensors in sets.items() if any("." in name for name in tensors)}
    return dotted or sets  # a loss, or what an optimizer keeps for a weight, has no dots in its names


def _torch_content(path: Path) -> object:
    ignored: list[Callable[..., Any] | tuple[Callable[..., Any], str]]
    ignored = [(_Ignored, name) for name in IGNORED_OBJECTS]
    try:
        with path.open("rb") as file, torch.serialization.safe_globals(ignored):
            return torch.load(file, map_location="cpu", weights_only=True)  # of a path, it trusts the suffix
    except Exception as error:  # where a file is damaged, torch raises anything
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path}: holds a Python object, {found[1]}, where weights are expected; a whole network or "
                f"a script's own objects are never unpickled\n{SAVE}"
            ) from error
        if "TorchScript" in str(error):
            raise UserError(f"{path}: is a TorchScript program, not weights\n{SAVE}") from error
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip() or type(error).__name__
        raise UserError(
            f"{path}: torch cannot read weights from it, it is damaged or another format "
            f"({reason.splitlines()[0][:100]})\n{SAVE}"
        ) from error


def _sets(content: object, key: str = "") -> Sets:
    """Find all mappings of names to tensors, in the file's order; what else they hold is left out."""
    if not isinstance(content, Mapping):
        return {}
    named = {name: value for name, value in content.items() if isinstance(name, str)}
    tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    sets = {key: tensors} if tensors else {}
    for name, value in named.items():
        sets |= _sets(value, f"{key}.{name}" if key else name)
    return sets


def _named(sets: Sets, key: str, file: Path) -> Sets:
    """Keep the sets below `key`; it may also be the beginning of the names in one of them."""
    if key in sets:
        return {key: sets[key]}
    below = f"{key}."
    if inside := {name: tensors for name, tensors in sets.items() if name.startswith(below)}:
        return inside
    chosen = {
        full.removeprefix(below): tensor
        for name, tensors in sets.items()
        for own, tensor in tensors.items()
        if (full := f"{name}.{own}" if name else own).startswith(below)
    }
    if chosen:
        return {key: chosen}
    where = f"its weights are in {few(sets, 8)}" if any(sets) else "it holds weights directly, without a key"
    raise UserError(
        f"{file}: has no weights '{key}'; {where}\ngive one of its keys, or weights: {file} alone"
    )
