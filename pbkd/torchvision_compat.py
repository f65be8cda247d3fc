"""The one way to torchvision: imports it, and cures the import of a build for CUDA beside a torch for the
CPU."""

import importlib
import sys
from functools import cache
from types import ModuleType

import torch

_MISSING = "operator torchvision::nms does not exist"


@cache
def import_torchvision() -> ModuleType:
    """Import torchvision; its models, datasets and transforms work, `ops.nms` and `io` may not (decode with
    PIL).

    A torchvision built for CUDA cannot load its compiled part beside a CPU torch, and then stops at the
    registration of two operators. Declaring their schemas is enough for everything that does not call them.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _declare_operators()
    return importlib.import_module("torchvision")


@cache  # keeps the library alive: its schemas disappear with it
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
