"""A network as a file that other tools run: ONNX, pt2, safetensors.

Plain PyTorch, and ONNX where that is asked for (extra `export`).
"""

from __future__ import annotations

import copy
import importlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pbkd.errors import UserError
from pbkd.networks import BlockNetwork, fold_norms, load_weights, read_spec
from pbkd.networks.weights import empty
from pbkd.preprocessing import Preprocessing
from pbkd.weight_files import read_safetensors

Format = Literal["onnx", "pt2", "safetensors"]

OPSET = 18
"""Of ONNX: what the exporter writes itself, without converting; ONNX Runtime runs it since 1.14 (2023)."""

INPUT, OUTPUT = "images", "logits"


def export(
    network: BlockNetwork,
    path: Path,
    form: Format,
    *,
    dynamic_batch: bool = False,
    fp16: bool = False,
    metadata: Mapping[str, str] | None = None,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Write `network` to the file `path`, in eval mode; the network itself is not changed.

    `onnx` and `pt2` take float32 images (N, C, H, W), normalized as in training, and give float32 logits
    (N, classes); N is 1, or anything with `dynamic_batch`. BatchNorm is folded into the convolution before
    it. With `fp16` weights and arithmetic are half precision behind that interface; with `preprocessing` it
    takes uint8 pixels (N, H, W, C) of the network's size, and normalizes them. `safetensors` has the
    weights alone, BatchNorm unfolded, under the names of the network's tensors, and its architecture as
    `pbkd.spec` in the file's metadata.

    Raises:
        UserError: ONNX has no operation for one of the network's, or the extra `export` is not installed.
    """
    network = copy.deepcopy(network).cpu().eval().requires_grad_(False)
    if form == "safetensors":
        _write_safetensors(network, path, fp16, metadata or {})
        return
    _fold(network)
    module: nn.Module = _HalfInside(network).eval() if fp16 else network
    images = torch.zeros(2 if dynamic_batch else 1, *network.spec.input_shape)
    if preprocessing is not None:
        module = _OfPixels(module, preprocessing).eval()
        images = images.permute(0, 2, 3, 1).contiguous().to(torch.uint8)
    if form == "onnx":
        _write_onnx(module, images, path, dynamic_batch, metadata or {}, network.spec.arch)
    else:
        _write_pt2(module, images, path, dynamic_batch, metadata or {})


def open_exported(path: Path, form: Format, threads: int | None = None) -> nn.Module:
    """What the file computes: images (N, C, H, W) -> logits. ONNX and pt2 are run without pbkd's networks.

    `threads` is for ONNX Runtime (None: its default); it runs on the CPU.

    Raises:
        UserError: ONNX Runtime has no implementation of an operation in it.
    """
    if form == "onnx":
        return _OnnxFile(path, threads)
    if form == "pt2":
        return _Pt2File(path)
    return _read_safetensors(path)


class _HalfInside(nn.Module):
    """Half precision behind an interface of float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.network(images.half()).float())


class _OfPixels(nn.Module):
    """A network behind an interface of pixels: uint8 (N, H, W, C)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.network = network
        mean, std = (
            torch.tensor(row, dtype=torch.float64).view(1, -1, 1, 1)
            for row in (preprocessing.mean, preprocessing.std)
        )
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (-mean / std).float())

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.network(images.permute(0, 3, 1, 2).float() * self.scale + self.shift))


class ByPixels(nn.Module):
    """A file that takes pixels, called like the network: with normalized images (N, C, H, W)."""

    def __init__(self, exported: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        self._exported, self._preprocessing = exported, preprocessing

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self._exported(to_pixels(images, self._preprocessing)))


def to_pixels(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pixels, uint8 (N, H, W, C), of normalized images (N, C, H, W)."""
    mean, std = (torch.tensor(row).view(1, -1, 1, 1) for row in (preprocessing.mean, preprocessing.std))
    pixels = (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1)


class _OnnxFile(nn.Module):
    """An ONNX file in ONNX Runtime, called like a network."""

    def __init__(self, path: Path, threads: int | None) -> None:
        super().__init__()
        runtime = _onnx("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except runtime.capi.onnxruntime_pybind11_state.NotImplemented as error:
            reason = str(error).partition("NOT_IMPLEMENTED : ")[2] or str(error)
            raise UserError(f"ONNX Runtime cannot run this network: {reason.splitlines()[0]}") from error

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self._session.run([OUTPUT], {INPUT: images.contiguous().numpy()})
        return torch.from_numpy(logits)


class _Pt2File(nn.Module):
    """A pt2 file, called like a network: its own module refuses `eval()`, in which it was written."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._run = (torch.export.load(path).module(),)  # a tuple, so that it is no part of this one

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self._run[0](images))


def _fold(network: BlockNetwork) -> None:
    fold_norms(network)
    for part in network.modules():
        if isinstance(part, fx.GraphModule):
            _fold_traced(part)


def _fold_traced(part: fx.GraphModule) -> None:
    """Merge every BatchNorm of a traced part into the convolution before it, if both are called once."""
    nodes = [node for node in part.graph.nodes if node.op == "call_module" and node.all_input_nodes]
    calls = Counter(node.target for node in nodes)
    for node in nodes:
        before = node.all_input_nodes[0]
        if before.op != "call_module" or len(before.users) > 1:
            continue
        layer, norm = part.get_submodule(before.target), part.get_submodule(node.target)
        # Of subclasses nothing is known but their name: one may standardize its weight, or pad.
        if (
            type(layer) is nn.Conv2d
            and (behind := _behind_norm(norm)) is not None
            and calls[node.target] == calls[before.target] == 1
        ):
            assert isinstance(norm, nn.BatchNorm2d)
            part.set_submodule(before.target, fuse_conv_bn_eval(layer, norm))
            part.set_submodule(node.target, behind)
    part.recompile()


def _behind_norm(norm: nn.Module) -> nn.Module | None:
    """What the forward of a BatchNorm does behind normalizing; None: it is none that can be folded."""
    if not isinstance(norm, nn.BatchNorm2d) or not norm.track_running_stats:
        return None
    if type(norm) is nn.BatchNorm2d:
        return nn.Identity()
    kind = f"{type(norm).__module__}.{type(norm).__qualname__}"
    if kind == "timm.layers.norm_act.BatchNormAct2d":
        return nn.Sequential(norm.drop, norm.act)  # type: ignore[arg-type]  # modules, timm's
    return None


def _write_onnx(
    module: nn.Module,
    images: Tensor,
    path: Path,
    dynamic_batch: bool,
    metadata: Mapping[str, str],
    arch: str,
) -> None:
    onnx = _onnx("onnx")
    _onnx("onnxscript")
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    with warnings.catch_warnings():
        # torch's own: copyreg of its exporter asks for a class that torch itself deprecates.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        try:
            program = torch.onnx.export(
                module,
                (images,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(_inexpressible(error, arch)) from error
    assert program is not None, "with dynamo it is returned"
    model = program.model_proto
    for part in (*model.graph.input, *model.graph.output, *model.graph.value_info, *model.graph.node):
        del part.metadata_props[:]  # stack traces, with the paths of this machine
    for name, value in metadata.items():
        model.metadata_props.add(key=name, value=value)
    onnx.checker.check_model(model)
    onnx.save_model(model, path)


def _inexpressible(error: BaseException, arch: str) -> str:
    """Names the operation, which torch says in the error behind the error."""
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        said.append(str(cause))
        cause = cause.__cause__
    operation = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", "\n".join(said))
    if operation is None:
        return f"network {arch}: cannot be written as ONNX: {said[-1].strip().splitlines()[0][:200]}"
    return (
        f"network {arch}: ONNX has no operation for '{operation[1]}', which its forward uses\n"
        "replace it there, or export with --format pt2, which has all of PyTorch's"
    )


def _write_pt2(
    module: nn.Module, images: Tensor, path: Path, dynamic_batch: bool, metadata: Mapping[str, str]
) -> None:
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    program = torch.export.export(module, (images,), dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files=dict(metadata))


def _write_safetensors(network: BlockNetwork, path: Path, fp16: bool, metadata: Mapping[str, str]) -> None:
    tensors = {
        name: (tensor.half() if fp16 and tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in network.state_dict().items()
    }
    spec = json.dumps(network.spec.model_dump(mode="json"))
    save_file(tensors, path, metadata={"pbkd.spec": spec, **metadata})


def _read_safetensors(path: Path) -> BlockNetwork:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        spec = read_spec(json.loads(file.metadata()["pbkd.spec"]))
    network = empty(spec)
    load_weights(network, read_safetensors(path), str(path))
    return network.eval().requires_grad_(False)


def _onnx(name: str) -> Any:
    try:
        module: ModuleType = importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--format onnx: {name} is not installed; pip install 'pbkd[export]'") from error
    return module
