"""A network as a file that other tools run: ONNX, pt2, safetensors; compared with the network itself.

Plain PyTorch, and ONNX where that is asked for (extra `export`).
"""

from __future__ import annotations

import copy
import importlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pbkd.errors import StageError, UserError
from pbkd.measure.modes import evaluating
from pbkd.networks import BlockNetwork, fold_norms, load_weights, read_spec
from pbkd.networks.weights import empty
from pbkd.weight_files import read_safetensors

Format = Literal["onnx", "pt2", "safetensors"]

OPSET = 18
"""Of ONNX: what the exporter writes itself, without converting; ONNX Runtime runs it since 1.14 (2023)."""

INPUT, OUTPUT = "images", "logits"
TOLERANCE = {False: 1e-5, True: 5e-3}
"""What logits may differ by, in fp32 and fp16, as a share of the largest, or of 10 if that is more."""
OF_SPREAD = {False: 1e-4, True: 5e-3}
"""And as a share of `Parity.spread`: of small logits the above would pass anything."""

MULTIPLY_ACCUMULATES = 100e9
FEWEST, MOST = 16, 1000


@dataclass(frozen=True)
class Parity:
    """How a file's logits compare with the network's, over `images` images.

    Attributes:
        max_abs_diff: the largest difference of a logit.
        max_abs_logit: the largest logit of the network.
        spread: how far apart the largest and the smallest logit of an image are, at most.
        agreement: percent of images for which both say the same class.
        tolerance: what `max_abs_diff` may be.
    """

    images: int
    max_abs_diff: float
    max_abs_logit: float
    spread: float
    agreement: float
    tolerance: float


def export(
    network: BlockNetwork,
    path: Path,
    form: Format,
    *,
    dynamic_batch: bool = False,
    fp16: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `network` to the file `path`, in eval mode; the network itself is not changed.

    `onnx` and `pt2` take float32 images (N, C, H, W), normalized as in training, and give float32 logits
    (N, classes); N is 1, or anything with `dynamic_batch`. BatchNorm is folded into the convolution before
    it. With `fp16` weights and arithmetic are half precision behind that interface. `safetensors` has the
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


@torch.inference_mode()
def compare(
    network: nn.Module, exported: nn.Module, images: Iterable[Tensor], *, one_by_one: bool, fp16: bool
) -> Parity:
    """Compare logits on batches of `images` (N, C, H, W), which `exported` gets `one_by_one` if it must.

    Raises:
        StageError: they differ by more than `TOLERANCE` allows, or are not numbers.
    """
    count, agreeing, difference, largest, spread = 0, 0, 0.0, 0.0, 0.0
    with evaluating(network):
        for batch in images:
            expected = network(batch)
            parts = batch.split(1) if one_by_one else [batch]
            found = torch.cat([exported(part) for part in parts])
            # A maximum would pass NaN over where it is compared with a number.
            difference = max(difference, float((found - expected).abs().nan_to_num(nan=torch.inf).max()))
            largest = max(largest, float(expected.abs().max()))
            spread = max(spread, float((expected.amax(1) - expected.amin(1)).max()))
            agreeing += int((found.argmax(1) == expected.argmax(1)).sum())
            count += len(batch)
    if not count:
        raise ValueError("nothing to compare: no image was given")
    parity = Parity(
        images=count,
        max_abs_diff=difference,
        max_abs_logit=largest,
        spread=spread,
        agreement=100 * agreeing / count,
        tolerance=min(TOLERANCE[fp16] * max(10.0, largest), OF_SPREAD[fp16] * spread),
    )
    if difference > parity.tolerance:
        cure = "; half precision is too coarse for it: export without fp16" if fp16 else ""
        raise StageError(
            f"the exported file does not compute what the network does: logits differ by {difference:.2g}, "
            f"allowed are {parity.tolerance:.2g} over {count} images{cure}"
        )
    return parity


def images_to_compare(macs: int) -> int:
    """How many images make a comparison that takes seconds, for a network of so many multiply-accumulates."""
    return max(FEWEST, min(MOST, int(MULTIPLY_ACCUMULATES // max(1, macs))))


class _HalfInside(nn.Module):
    """Half precision behind an interface of float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.half()

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.network(images.half()).float())


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
