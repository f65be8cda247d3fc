"""A foreign network in the form of ours: stem, blocks and classifier, cut from its traced graph."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from pbkd.errors import UserError
from pbkd.networks.builders import ForeignSettings
from pbkd.networks.cuts import automatic_cuts, cut_name, named_cuts
from pbkd.networks.spec import TracedPart, TracedSpec
from pbkd.networks.trace import Reference, Trace, last_layer, result_of, trace
from pbkd.networks.writes import work_out_of_place

_traced = lru_cache(maxsize=64)(trace)
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def partition(settings: ForeignSettings, input_shape: tuple[int, int, int], num_classes: int) -> TracedSpec:
    """The spec of a foreign network for images of `input_shape` (C, H, W).

    Raises:
        UserError: it is unknown, cannot be traced, or a cut does not exist; see `trace`.
    """
    reference = Reference(settings.arch, tuple(sorted(settings.arguments.items())), input_shape, num_classes)
    traced = _traced(reference)
    cuts = automatic_cuts(traced) if settings.cuts is None else named_cuts(traced, settings.cuts)
    ends, before = [], cuts.stem
    for end in cuts.blocks:
        ends.append(TracedPart(end=cut_name(traced, before, end)))
        before = end
    spec = TracedSpec(
        arch=reference.arch,
        arguments=reference.arguments,
        input_shape=input_shape,
        num_classes=num_classes,
        stem=None if cuts.stem is None else TracedPart(end=cut_name(traced, None, cuts.stem)),
        blocks=tuple(ends),
        classifier=TracedPart(end="output"),
    )
    _check_unshared(spec)
    return spec


def _check_unshared(spec: TracedSpec) -> None:
    """Refuse weights that run in two parts: neither could be trained or narrowed alone."""
    stem, blocks, classifier = parts_of(spec, original_on_meta(spec))
    owners: dict[int, int] = {}
    for number, part in enumerate([stem, *blocks, classifier]):
        for name, weight in part.named_parameters():
            if owners.setdefault(id(weight), number) != number:
                raise UserError(
                    f"network {spec.arch}: the weights '{name}' run in more than one block; choose cuts that "
                    "keep all their uses in one"
                )


def traced_of(spec: TracedSpec) -> Trace:
    """The trace of the network that `spec` partitions."""
    return _traced(Reference.of(spec))


def with_memory(module: ModuleT, device: torch.device | str = "cpu") -> ModuleT:
    """`module`, which is on the meta device, in place with memory of undefined values.

    As `to_empty` does, whose `empty_like` imports sympy: two seconds of processor time.
    """
    tensors = [
        (held, name, id(tensor))
        for part in module.modules()
        for held in (part._parameters, part._buffers)
        for name, tensor in held.items()
    ]
    module._apply(  # type: ignore[no-untyped-call]
        lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    )
    first: dict[int, Any] = {}
    for held, name, key in tensors:  # what was one tensor is one again
        held[name] = first.setdefault(key, held[name])
    return module


def randomize(tensors: Iterable[Tensor], seed: int) -> None:
    """Fill floating-point tensors in place: filters of about unit norm, gains and variances about 1."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            if tensor.dim() > 1:
                values = (2 * values - 1) * (3.0 / tensor[0].numel()) ** 0.5
            else:
                values += 0.5
            tensor.copy_(values)


def original_on_meta(spec: TracedSpec) -> nn.Module:
    """The network before it was partitioned and narrowed, without memory for its weights."""
    return copy.deepcopy(traced_of(spec).module)


def original_empty(spec: TracedSpec) -> nn.Module:
    """The network before it was partitioned and narrowed, on the CPU, its weights undefined."""
    module = original_on_meta(spec)
    kept = module.state_dict().keys()
    computed = {name for name, _ in module.named_buffers()} - kept
    loose = any(isinstance(value, Tensor) for part in module.modules() for value in vars(part).values())
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    if computed or loose or hooked:  # what no file holds, only the builder knows
        return Reference.of(spec).build()
    return with_memory(module)


def original_fresh(spec: TracedSpec, seed: int) -> nn.Module:
    """The network before it was partitioned and narrowed, on the CPU, with its builder's random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Reference.of(spec).build()


def parts_of(spec: TracedSpec, original: nn.Module) -> tuple[nn.Module, list[nn.Module], nn.Sequential]:
    """Stem, blocks and classifier made of the modules of `original`, which are narrowed in place.

    Tensors that are narrower than in the original keep its leading entries. The classifier's last child is
    the layer that gives the logits, with what follows it. Tensors have their names in the original, behind
    the part's.

    Raises:
        UserError: see `trace`; or the spec was cut by another version of the library.
    """
    stem_graph, *graphs = _graphs(traced_of(spec), spec)
    work_out_of_place(original, traced_of(spec).graph)
    _hold_state(original)
    narrow(original, {name: shape for part in parts_in(spec) for name, shape in part.shapes})
    stem = nn.Identity() if stem_graph is None else fx.GraphModule(original, stem_graph)
    *blocks, head, linear = (fx.GraphModule(original, graph) for graph in graphs if graph is not None)
    return stem, [*blocks], nn.Sequential(OrderedDict(head=head, linear=linear))


def _hold_state(module: nn.Module) -> None:
    """Turn tensors that no state_dict holds into buffers, in place, so that artifacts store them.

    Those of modules with forward pre-hooks are left alone: old-style weight and spectral norm recompute them.
    """
    unshare(module)
    for part in module.modules():
        part._non_persistent_buffers_set.clear()
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor):
                delattr(part, name)
                if part._forward_pre_hooks:
                    setattr(part, name, value.detach())
                else:
                    part.register_buffer(name, value.detach())


def unshare(module: nn.Module) -> None:
    """Copy expanded tensors, in place: their elements share memory, so no weights can be loaded into them."""
    for part in module.modules():
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            if any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
                replace_tensor(part, name, tensor.contiguous())


def parts_in(spec: TracedSpec) -> tuple[TracedPart, ...]:
    """All parts of a spec, in order."""
    return (*((spec.stem,) if spec.stem is not None else ()), *spec.blocks, spec.classifier)


def original_name(name: str) -> str:
    """The name in the original network of a tensor of the partitioned one."""
    depth = {"stem": 1, "blocks": 2, "classifier": 2}[name.partition(".")[0]]
    return name.split(".", depth)[depth]


def narrow(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Cut the tensors in `shapes`, by name, to their leading entries, in place; layers know of it."""
    touched: dict[str, nn.Module] = {}
    for name, shape in shapes.items():
        path, _, tensor = name.rpartition(".")
        owner = touched.setdefault(path, module.get_submodule(path))
        replace_tensor(owner, tensor, getattr(owner, tensor)[tuple(slice(size) for size in shape)])
    for owner in touched.values():
        count_channels(owner)


def replace_tensor(owner: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a copy of `tensor` in the place of a parameter or buffer."""
    old = getattr(owner, name)
    new = tensor.detach().clone()
    setattr(owner, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def count_channels(layer: nn.Module) -> None:
    """Let a layer's numbers of channels be those of its tensors, in place."""
    weight = getattr(layer, "weight", None)
    if isinstance(layer, nn.Conv2d):
        if is_depthwise(layer):
            layer.groups = layer.weight.shape[0]
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, _NormBase):
        tensor = weight if weight is not None else layer.running_mean
        assert tensor is not None, "a norm without tensors is not in the table"
        layer.num_features = len(tensor)
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(layer.weight.shape)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = len(layer.weight)
    elif isinstance(layer, nn.PReLU):
        layer.num_parameters = len(layer.weight)


def is_depthwise(layer: nn.Conv2d) -> bool:
    """Whether each output channel sees one input channel, and each input channel has one output."""
    return 1 < layer.groups == layer.out_channels == layer.in_channels


def unnarrowed(spec: TracedSpec) -> TracedSpec:
    """The spec with the original's channels everywhere."""
    wide = {"shapes": ()}
    return spec.model_copy(
        update={
            "stem": None if spec.stem is None else spec.stem.model_copy(update=wide),
            "blocks": tuple(block.model_copy(update=wide) for block in spec.blocks),
            "classifier": spec.classifier.model_copy(update=wide),
        }
    )


def _graphs(traced: Trace, spec: TracedSpec) -> list[fx.Graph | None]:
    """Of the stem (None: there is none), the blocks, the classifier's head and its last layer."""
    last = last_layer(traced.module, traced.graph)
    assert last is not None, "checked when it was traced"
    ends = [traced.places.get(part.end) for part in parts_in(spec)[:-1]]
    if any(end not in traced.points for end in ends):
        raise UserError(
            f"network {spec.arch}: its blocks end at {', '.join(part.end for part in spec.blocks)}, which it "
            "does not have here; use the version of its library that it was made with"
        )
    graphs: list[fx.Graph | None] = [] if spec.stem is not None else [None]
    before: fx.Node | None = None
    penultimate = last.all_input_nodes[0]
    for end in [*ends, penultimate, result_of(traced.graph)]:
        assert end is not None
        graphs.append(_segment(traced, before, end))
        before = end
    return graphs


def _segment(traced: Trace, before: fx.Node | None, end: fx.Node) -> fx.Graph:
    """The graph from behind `before` (None: the images) to `end`, as that of a network of its own."""
    graph = fx.Graph()
    start = next(iter(traced.graph.nodes)) if before is None else before
    copies = {start: graph.placeholder("x")}

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies and node.op == "get_attr":  # weights fetched by a part before this one
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in traced.between(before, end):
        if node.op != "get_attr":
            copies[node] = graph.node_copy(node, copy_of)
    graph.output(copies[end])
    return graph
