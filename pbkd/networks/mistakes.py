"""What is wrong with a network that is no classifier pbkd can compress, and the cure; in the user's names."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx, nn
from torch.nn.parameter import is_lazy

from pbkd.errors import UserError, first_line

Shape = tuple[int, ...]
_PROBABILITIES = {"softmax", "log_softmax", "logsoftmax", "sigmoid", "logsigmoid", "softmin"}
_RESHAPES = {"squeeze", "view", "reshape", "flatten", "ravel"}
_LINEAR_LAYERS_OF_A_TRANSFORMER = 4


def paths_of(node: fx.Node) -> list[str]:
    """The modules a node runs in, outermost first."""
    stack: Mapping[str, Any] = node.meta.get("nn_module_stack", {})
    paths = [path for path in (entry[0] for entry in stack.values()) if path]
    if node.op == "call_module" and str(node.target) not in paths:
        paths.append(str(node.target))
    return paths


def place_of(node: fx.Node) -> str:
    """The innermost module that `node` runs in, or its own name."""
    return (paths_of(node) or [node.name])[-1]


def without_modes(module: nn.Module) -> str | None:
    """Of a network whose own `train` or `eval` is no such thing; None of any other, left in eval mode."""
    cure = "let it take mode=True, call super().train(mode), and return self"
    try:
        if module.train(False) is module and module.eval() is module:
            return None
    except Exception as error:  # noqa: BLE001  # whatever the user's method raises
        return f"its own train() or eval() fails: {first_line(error)}\n{cure}"
    return f"its own train() or eval() does not return the network\n{cure}"


def uncopied(module: nn.Module) -> str | None:
    """Of a network that cannot be copied, or not with all it does; None of any other."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            return (
                f"'{name}' has no size before a first batch\n"
                "let the builder run one: network(torch.zeros(1, *input_shape)); it is given input_shape"
            )
    if module._forward_hooks or module._forward_pre_hooks:
        return (
            "has a hook on the whole of it, which no part of it runs\n"
            "let its forward do what the hook does, or wrap it in a module: self.network(x)"
        )
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            try:
                if name not in ("_modules", "_parameters", "_buffers"):
                    copy.deepcopy(value)
            except Exception as error:  # noqa: BLE001  # whatever the user's attribute raises
                place = ".".join(filter(None, (path, name)))
                return (
                    f"its '{place}', a {type(value).__name__}, cannot be copied: {first_line(error)}\n"
                    "let its modules hold tensors, numbers and modules, or define __deepcopy__"
                )
    return None


def untraceable(error: Exception) -> str:
    """The cure for what a forward raises when it is traced."""
    made = [name for name in ("zeros", "ones", "empty", "full") if f"{name}()" in str(error)]
    if made:
        return f"write x.new_{made[0]}(...), of a tensor x of the forward, instead of torch.{made[0]}(...)"
    return "put what depends on the values of tensors into a module of its own, which then stays whole"


def transformer(module: nn.Module) -> str | None:
    """Of a network that cuts its image into patches and has no convolution behind them; None of any other."""
    layers = list(module.named_modules())
    convolutions = [(name, layer) for name, layer in layers if isinstance(layer, nn.Conv2d)]
    linear = sum(isinstance(layer, nn.Linear) for _, layer in layers)
    if len(convolutions) != 1 or linear < _LINEAR_LAYERS_OF_A_TRANSFORMER:
        return None
    name, patches = convolutions[0]
    if patches.kernel_size != patches.stride or max(patches.kernel_size) == 1:
        return None
    return (
        f"its only convolution, '{name}', cuts images into patches, as a transformer does; expected several, "
        "with maps (N, C, H, W) between them\n"
        "pbkd compresses convolutional classifiers: take one, such as torchvision/resnet50"
    )


def not_one_tensor(found: Any, places: Iterable[str]) -> str:
    """Of a network whose forward gives `found`, made by the modules or operations `places`."""
    expected = "expected the logits, one tensor (N, classes)"
    if found is None:
        return f"its forward gives None, {expected}; let it return them"
    kind, part = type(found).__name__.removeprefix("immutable_"), ""
    if isinstance(found, Mapping):
        what, part = f"a {kind} of {_listed(found)}", f"[{next(iter(found), 'logits')!r}]"
    elif names := list(getattr(found, "_fields", ()) or getattr(found, "__dataclass_fields__", ())):
        what, part = f"the class {kind} with {_listed(names)}", f".{names[0]}"
    elif isinstance(found, list | tuple):
        what, part = f"a {kind} of {len(found)}", "[0]"
    else:
        what = f"a {kind}"
    return (
        f"its forward gives {what} (from {_listed(places)}), {expected}\n"
        f"wrap it in a module whose forward returns those alone, for example self.net(x){part}"
    )


def failure(
    module: nn.Module, node: fx.Node, shapes: Mapping[fx.Node, Shape], image: Shape, reason: str
) -> str:
    """Of a network that fails on an image.

    Args:
        module: the network.
        node: what fails.
        shapes: what the nodes before it give for one image.
        image: (C, H, W).
        reason: what torch says.
    """
    wrong = None
    if node.all_input_nodes:
        given = node.all_input_nodes[0]
        wrong = _lost_batch(given, shapes)
        if wrong is None and node.op == "call_module" and given in shapes:
            wrong = _wrong_input(module.get_submodule(str(node.target)), shapes[given], image)
            wrong = wrong and f"'{node.target}' {wrong}"
    if wrong is None and "meta" in reason.lower():  # where tensors have shapes, and no values
        return (
            f"'{place_of(node)}' depends on the values of tensors: {reason[:100]}\n"
            "write it without (torch.where), or put it into a module of its own, of one tensor"
        )
    return wrong or (
        f"fails at '{place_of(node)}' on an image of {_by(image)}: {reason}\n"
        f"it must take a batch of one: try it, in eval(), on torch.zeros(1, {', '.join(map(str, image))})"
    )


def _lost_batch(node: fx.Node, shapes: Mapping[fx.Node, Shape]) -> str | None:
    """Of what drops or folds the dimension of the images, at `node` or before it; None if nothing does."""
    at: fx.Node | None = node
    while at is not None:
        before = next(iter(at.all_input_nodes), None)
        if before is not None and at in shapes and before in shapes:
            given, taken = shapes[at], shapes[before]
            if _has_batch(given):
                return None
            if _has_batch(taken) and len(given) < len(taken):
                cure = "flatten(1)" if _operation(at) in _RESHAPES else "what keeps the first dimension"
                return (
                    f"'{place_of(at)}' loses the dimension of the images: {taken}, of one image, becomes "
                    f"{given}\n"
                    f"expected (N, ...) for N images, one too: write {cure} instead"
                )
        at = before
    return None


def _has_batch(shape: Shape) -> bool:
    """Whether what a node gives for one image can have the images first."""
    return len(shape) >= 2 and shape[0] == 1


def _wrong_input(layer: nn.Module, given: Shape, image: Shape) -> str | None:
    """What `layer`, which fails, expected instead of `given`; None if that is not known."""
    if isinstance(layer, nn.Linear) and given[-1] != layer.in_features:
        wanted = layer.in_features
        said = f"takes {wanted} features, but gets {_of_batch(given)}: expected (N, {wanted})"
        if len(given) > 2:
            return f"{said}\nput a pooling to 1x1 and flatten(1) before it"
        return (
            f"{said}\nit fits images of another size: set data.image_size, or pool before it to a fixed size "
            "(nn.AdaptiveAvgPool2d)"
        )
    if isinstance(layer, nn.Conv2d) and len(given) == 4 and given[1] != layer.in_channels:
        said = f"takes {layer.in_channels} channels, but gets {given[1]}"
        if given[1:] != image:
            return f"{said}: {_of_batch(given)}\ngive it in_channels={given[1]}"
        return (
            f"{said}, as many as the images have\nbuild it for {image[0]}: a function of yours is given "
            "input_shape (C, H, W), and timm/NAME takes any number"
        )
    return _too_small(layer, given)


def _too_small(layer: nn.Module, given: Shape) -> str | None:
    if not isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) or len(given) != 4:
        return None
    if isinstance(layer.padding, str):  # "same": the map is as large as before
        return None
    kernel, padding = _pair(layer.kernel_size), _pair(layer.padding)
    if all(side + 2 * pad >= wide for side, pad, wide in zip(given[2:], padding, kernel, strict=True)):
        return None
    return (
        f"has a kernel of {_by(kernel)}, but gets a map of {_by(given[2:])}: the images are too small\n"
        "set data.image_size, or take a network for small images, such as resnet20"
    )


def wrong_output(
    module: nn.Module, end: fx.Node, shapes: Mapping[fx.Node, Shape], last: str | None, classes: int
) -> str:
    """Of a network whose output is not the logits (N, classes) of a layer.

    Args:
        module: the network.
        end: what gives its output.
        shapes: what every node gives for one image.
        last: the layer that gives logits; None: there is none.
        classes: as many as the data have.
    """
    found, place, expected = shapes[end], place_of(end), f"expected logits (N, {classes})"
    if (wrong := _lost_batch(end, shapes)) is not None:
        return wrong
    if len(found) == 4 and max(found[2:]) > 1:
        return (
            f"'{place}' gives a map {_of_batch(found)}, {expected}, one answer an image\n"
            "pbkd compresses classifiers, no segmentation; a classifier pools its map: x.mean((2, 3))"
        )
    if last is None:
        layer = module.get_submodule(str(end.target)) if end.op == "call_module" else None
        name = _operation(end) if layer is None else type(layer).__name__
        return _wrong_end(end, name, found, expected)
    if len(found) > 2 and found[1] == classes:
        return f"'{place}' gives {_of_batch(found)}, {expected}\nput flatten(1) behind it"
    return (
        f"gives logits {_of_batch(found)}, but the data have {classes} classes: {expected}\n"
        f"give its last layer, '{last}', {classes} outputs; a function of yours is given num_classes"
    )


def _wrong_end(end: fx.Node, name: str, found: Shape, expected: str) -> str:
    if name.lower() in _PROBABILITIES:
        return (
            f"ends in {name}, '{place_of(end)}', {expected}\n"
            f"let it return what '{place_of(end.all_input_nodes[0])}' gives: the losses here take logits, "
            "and the highest stays the highest"
        )
    return (
        f"ends in '{place_of(end)}', which gives {_of_batch(found)}; {expected} of a linear layer, or of a "
        "1x1 convolution and a pooling\nlet its forward return what one such layer gives"
    )


def _operation(node: fx.Node) -> str:
    """The name of the function or method that `node` calls."""
    return str(getattr(node.target, "__name__", node.target))


def _listed(names: Iterable[Any]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:4] + ["..."] * (len(shown) > 4)) or "nothing"


def _pair(value: Any) -> Shape:
    return (value, value) if isinstance(value, int) else tuple(value)


def _by(sides: Shape) -> str:
    return "x".join(map(str, sides))


def _of_batch(shape: Shape) -> str:
    return f"({', '.join(['N', *map(str, shape[1:])])})"


def check_names(graph: fx.Graph, arch: str) -> None:
    """Refuse what a part of the graph could not hold.

    Raises:
        UserError: a tensor made of numbers in the forward, or a module whose name torch.fx needs itself.
    """
    reserved = set(dir(fx.GraphModule)) - set(dir(nn.Module))
    for node in graph.nodes:
        name = str(node.target).partition(".")[0] if node.op in ("call_module", "get_attr") else ""
        if name.startswith("_tensor_constant"):
            where = place_of(next(iter(node.users), node))
            raise UserError(
                f"network {arch}: '{where}' uses a tensor that the forward makes of numbers\n"
                "register it as a buffer, which moves with the network: self.register_buffer(NAME, TENSOR)"
            )
        if name in reserved:
            raise UserError(f"network {arch}: '{name}' is a name that torch.fx needs; call it otherwise")
