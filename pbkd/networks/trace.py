"""The computation of a foreign network as a graph (torch.fx): where a single tensor passes."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, fx, nn

from pbkd.errors import UserError, first_line
from pbkd.networks import mistakes
from pbkd.networks.builders import build_module, require_builder
from pbkd.networks.dropout import is_dropout, keep_dropout
from pbkd.networks.mistakes import Shape, check_names, paths_of, place_of
from pbkd.networks.spec import Scalar, TracedSpec
from pbkd.networks.tracer import NetworkTracer
from pbkd.networks.writes import KEPT_WITH_NEXT, without_writes, work_out_of_place

_ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_ADAPTIVE_FUNCTIONS = (nn.functional.adaptive_avg_pool2d, nn.functional.adaptive_max_pool2d)
_BEHIND_LOGITS = (
    "ReLU", "AvgPool2d", "AdaptiveAvgPool2d", "Dropout", "Flatten",
    "relu", "avg_pool2d", "adaptive_avg_pool2d", "dropout", "flatten", "mean", "squeeze",
)  # fmt: skip
"""What may follow a convolution that gives the logits."""


@dataclass(frozen=True)
class Reference:
    """What a foreign network is built from; the same reference always gives the same graph."""

    arch: str
    arguments: tuple[tuple[str, Scalar], ...]
    input_shape: tuple[int, int, int]
    num_classes: int

    @classmethod
    def of(cls, spec: TracedSpec) -> Reference:
        """That of a spec."""
        return cls(spec.arch, spec.arguments, spec.input_shape, spec.num_classes)

    def build(self) -> nn.Module:
        """The user's module as it is, on the current default device.

        Raises:
            UserError: see `build_module`.
        """
        return build_module(self.arch, dict(self.arguments), self.input_shape, self.num_classes)

    def build_meta(self) -> nn.Module:
        """The same without memory for its weights; it can be copied."""
        require_builder(self.arch)  # a user's module makes its own tensors when it is imported
        try:
            with torch.device("meta"):
                module = self.build()
        except UserError as error:  # perhaps a builder that computes with numbers
            if not isinstance(error.__cause__, RuntimeError):
                raise
            module = self.build().to("meta")
        return detach_attributes(module)


def detach_attributes(module: nn.Module) -> nn.Module:
    """Make `module`, in place, one that can be copied: old-style weight norm keeps a computed weight."""
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor):
                setattr(part, name, value.detach())
    return module


@dataclass(frozen=True)
class Trace:
    """A foreign network's graph.

    Attributes:
        reference: what was traced.
        module: the original on the meta device; the nodes' targets are its modules.
        graph: from the images to the logits, in the order of execution.
        shapes: of each node that gives a tensor, for one image.
        points: nodes that are a single tensor on which alone all that follows depends, in order.
        features: the points at which a block may end: maps (1, C, H, W) before the classifier.
        places: path of a module, or name of an operation -> the node at which it ends for the last time.
    """

    reference: Reference
    module: nn.Module
    graph: fx.Graph
    shapes: Mapping[fx.Node, Shape]
    points: tuple[fx.Node, ...]
    features: tuple[fx.Node, ...]
    places: Mapping[str, fx.Node]

    def layers(self, nodes: Iterable[fx.Node]) -> list[nn.Conv2d | nn.Linear]:
        """The convolutions and linear layers that `nodes` run."""
        return [
            part
            for node in nodes
            if node.op == "call_module"
            for part in self.module.get_submodule(str(node.target)).modules()
            if isinstance(part, nn.Conv2d | nn.Linear)
        ]

    def depth(self, nodes: Iterable[fx.Node]) -> int:
        """How many of these layers the longest path through `nodes` passes."""
        depths: dict[fx.Node, int] = {}
        for node in nodes:
            own = len(self.layers([node]))
            depths[node] = own + max((depths.get(given, 0) for given in node.all_input_nodes), default=0)
        return max(depths.values(), default=0)

    def between(self, before: fx.Node | None, end: fx.Node) -> list[fx.Node]:
        """The nodes behind `before` (None: the images) up to `end`, included."""
        nodes = list(self.graph.nodes)
        first = 1 if before is None else nodes.index(before) + 1
        return nodes[first : nodes.index(end) + 1]


def trace(reference: Reference) -> Trace:
    """Trace the network of `reference` on the meta device, in eval mode.

    Raises:
        UserError: it cannot be traced, has several inputs or outputs, is no classifier or one of other
            classes, or does not take images of this shape; names the network, the module and the cure.
    """
    module = reference.build_meta()
    if (wrong := mistakes.without_modes(module) or mistakes.uncopied(module)) is not None:
        raise UserError(f"network {reference.arch}: {wrong}")
    tracer = NetworkTracer()
    try:
        _check_one_input(module, reference.arch)
        graph = tracer.trace(module)
    except UserError:
        raise
    except Exception as error:  # the user's forward may raise anything when it is traced
        raise UserError(
            f"network {reference.arch}: {type(module).__name__}.forward cannot be traced: "
            f"{first_line(error)}\n"
            f"{mistakes.untraceable(error)}"
        ) from error
    _check_one_output(graph, reference.arch)
    check_names(graph, reference.arch)
    image = torch.empty(1, *reference.input_shape, device="meta")
    _shapes(module, graph, reference)  # what fails, fails here, in words that say where
    without_writes(module, graph, image, reference.arch, place_of)
    work_out_of_place(module, graph)
    if any(map(is_dropout, graph.nodes)) and (trained := traced_in_training(reference)) is not None:
        keep_dropout(graph, trained)
    _simplify(module, graph)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    shapes = _shapes(module, graph, reference)
    _check_classifier(module, graph, shapes, reference)
    points = _points(graph, shapes)
    return Trace(
        reference, module, graph, shapes, points, _features(module, graph, shapes, points), _places(graph)
    )


def traced_in_training(reference: Reference) -> fx.Graph | None:
    """The network's graph in training mode; None if it cannot be traced there."""
    try:
        return NetworkTracer().trace(reference.build_meta().train())
    except Exception:  # noqa: BLE001  # the user's forward may raise anything; `init` says so
        return None


def _check_one_input(module: nn.Module, arch: str) -> None:
    if (wrong := mistakes.transformer(module)) is not None:  # few can be traced
        raise UserError(f"network {arch}: {wrong}")
    parameters = signature(module.forward).parameters.values()
    needed = [
        parameter.name
        for parameter in parameters
        if parameter.default is Parameter.empty
        and parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    ]
    if len(needed) > 1:
        raise UserError(
            f"network {arch}: {type(module).__name__}.forward takes {len(needed)} inputs "
            f"({', '.join(needed)}); wrap it in a module that takes images alone"
        )


def _check_one_output(graph: fx.Graph, arch: str) -> None:
    (output,) = (node for node in graph.nodes if node.op == "output")
    if not isinstance(output.args[0], fx.Node):
        places = [place_of(node) for node in output.all_input_nodes]
        raise UserError(f"network {arch}: {mistakes.not_one_tensor(output.args[0], places)}")


def _simplify(module: nn.Module, graph: fx.Graph) -> None:
    """Leave out what does nothing."""
    for node in graph.nodes:
        part = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(part) is nn.Identity and not (part._forward_hooks or part._forward_pre_hooks):
            node.replace_all_uses_with(node.all_input_nodes[0])


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and keeps the shape of what every node gives."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.shapes: dict[fx.Node, Shape] = {}
        self.current: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run, and keep the shape."""
        self.current = n
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def _shapes(module: nn.Module, graph: fx.Graph, reference: Reference) -> dict[fx.Node, Shape]:
    recorder = _ShapeRecorder(module, graph)
    recorder.extra_traceback = False
    image = torch.empty(1, *reference.input_shape, device="meta")
    try:
        with torch.no_grad():
            result = recorder.run(image)
    except Exception as error:  # the user's modules may raise anything
        assert recorder.current is not None, "the input is a node"
        wrong = mistakes.failure(
            module, recorder.current, recorder.shapes, reference.input_shape, first_line(error)
        )
        raise UserError(f"network {reference.arch}: {wrong}") from error
    if not isinstance(result, Tensor):
        places = [place_of(node) for node in result_of(graph).all_input_nodes]
        raise UserError(f"network {reference.arch}: {mistakes.not_one_tensor(result, places)}")
    return recorder.shapes


def _check_classifier(
    module: nn.Module, graph: fx.Graph, shapes: Mapping[fx.Node, Shape], reference: Reference
) -> None:
    last, end, found = last_layer(module, graph), result_of(graph), shapes[result_of(graph)]
    if last is not None and found == (1, reference.num_classes):
        return
    layer = None if last is None else place_of(last)
    wrong = mistakes.wrong_output(module, end, shapes, layer, reference.num_classes)
    raise UserError(f"network {reference.arch}: {wrong}")


def last_layer(module: nn.Module, graph: fx.Graph) -> fx.Node | None:
    """The layer that gives the logits: linear, or a 1x1 convolution before what pools and flattens."""

    def layer_of(node: fx.Node) -> nn.Module | None:
        return module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def name_of(node: fx.Node) -> str:
        layer = layer_of(node)
        return str(getattr(node.target, "__name__", node.target)) if layer is None else type(layer).__name__

    node = result_of(graph)
    if isinstance(layer_of(node), nn.Linear):
        return node
    while name_of(node) in _BEHIND_LOGITS and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    layer = layer_of(node)
    return node if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) else None


def result_of(graph: fx.Graph) -> fx.Node:
    """The node that gives the logits."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    result = output.args[0]
    assert isinstance(result, fx.Node)
    return result


def _points(graph: fx.Graph, shapes: Mapping[fx.Node, Shape]) -> tuple[fx.Node, ...]:
    nodes = list(graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    last_use = {node: max((position[user] for user in node.users), default=-1) for node in nodes}
    points: list[fx.Node] = []
    live: set[fx.Node] = set()
    for index, node in enumerate(nodes[:-1]):
        if node.op != "get_attr":  # a part may fetch the same weights again
            live.add(node)
        live = {other for other in live if last_use[other] > index}
        ends = node.op != "placeholder" and KEPT_WITH_NEXT not in node.meta
        if live == {node} and ends and node in shapes:
            points.append(node)
    return tuple(points)


def _features(
    module: nn.Module, graph: fx.Graph, shapes: Mapping[fx.Node, Shape], points: tuple[fx.Node, ...]
) -> tuple[fx.Node, ...]:
    """The points before the classifier: before the pooling behind the last kernel larger than 1x1."""
    nodes = list(graph.nodes)
    spatial = [
        index
        for index, node in enumerate(nodes)
        if node.op == "call_module"
        and any(
            isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1
            for part in module.get_submodule(str(node.target)).modules()
        )
    ]
    last = max(spatial, default=-1)
    features: list[fx.Node] = []
    size: Shape = shapes[nodes[0]][2:]
    logits = last_layer(module, graph)
    assert logits is not None, "checked before"
    for point in points:
        if nodes.index(point) >= nodes.index(logits):
            break
        is_map = len(shapes[point]) == 4
        if nodes.index(point) > last and (not is_map or _pools(module, point, size, shapes[point][2:])):
            break
        if is_map:
            features.append(point)
            size = shapes[point][2:]
    return tuple(features)


def _pools(module: nn.Module, node: fx.Node, before: Shape, after: Shape) -> bool:
    if node.op == "call_module":
        target = module.get_submodule(str(node.target))
        if isinstance(target, _ADAPTIVE):
            return True
        if any(True for _ in target.parameters()):
            return False
    return node.target in _ADAPTIVE_FUNCTIONS or (after == (1, 1) and before != (1, 1))


def _places(graph: fx.Graph) -> dict[str, fx.Node]:
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    paths = {path: node for node in nodes for path in paths_of(node)}
    return {operation_name(node, paths): node for node in nodes} | paths


def operation_name(node: fx.Node, taken: Container[str]) -> str:
    """The name of a node; of an operation, one that no module's path, among those `taken`, has."""
    name = node.name
    while node.op != "call_module" and name in taken:
        name += "_"
    return name
