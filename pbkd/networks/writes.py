"""In-place operations of a traced network as ones that give new tensors: no block changes what it gets."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from pbkd.errors import UserError

KEPT_WITH_NEXT = "pbkd.kept_with_next"
"""In the meta of a node behind which no block may end: the next one changes what it gives."""


@dataclass(frozen=True)
class _Memory:
    """Which elements of which storage a tensor is."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Memory:
        storage = tensor.untyped_storage()._cdata
        return cls(storage, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset()))

    def meets(self, other: _Memory) -> bool:
        """Whether they have an element in common."""
        if self == other:
            return True
        return self.storage == other.storage and bool(set(self._elements()) & set(other._elements()))

    def _elements(self) -> list[int]:
        last = self.offset + sum(
            (size - 1) * step for size, step in zip(self.size, self.stride, strict=True) if size
        )
        return torch.arange(last + 1).as_strided(self.size, self.stride, self.offset).flatten().tolist()


_ANSWERS = (
    "gt_", "ge_", "lt_", "le_", "eq_", "ne_",
    "greater_", "greater_equal_", "less_", "less_equal_", "not_equal_",
    "logical_not_", "logical_and_", "logical_or_", "logical_xor_",
)  # fmt: skip
"""Methods that write ones and zeros of their tensor's type; their namesakes give booleans."""
_NO_TENSOR = _Memory(-1, (), (), 0)


class _Recorder(fx.Interpreter):
    """Runs a graph on the meta device and keeps what each node writes into.

    Attributes:
        memories: of the tensors that a node gives, as they were then.
        tensors: the nodes that give a single one.
        written: node that writes -> those among its arguments whose tensor it has changed.
        mixed: those of them that get tensors of several types.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.extra_traceback = False
        self.memories: dict[fx.Node, list[_Memory]] = {}
        self.written: dict[fx.Node, list[fx.Node]] = {}
        self.tensors: set[fx.Node] = set()
        self.mixed: set[fx.Node] = set()
        self._alive: list[Tensor] = []  # else a storage's address would be another's next

    def run_node(self, n: fx.Node) -> Any:
        """Run, and compare the versions of the arguments' tensors."""
        given = [(node, tensor) for node in _arguments(n) for tensor in _tensors(self.env.get(node))]
        before = [tensor._version for _, tensor in given]
        result = super().run_node(n)
        changed: list[_Memory] = []
        for (node, tensor), version in zip(given, before, strict=True):
            memory = _Memory.of(tensor)
            # Views of one tensor share its version; those beside what was written are as they were.
            is_beside = any(memory.storage == other.storage and not memory.meets(other) for other in changed)
            if tensor._version != version and not is_beside:
                changed.append(memory)
                if node not in self.written.setdefault(n, []):
                    self.written[n].append(node)
        if len({tensor.dtype for _, tensor in given}) > 1:
            self.mixed.add(n)
        is_assignment = n.target is operator.setitem  # it gives None, and rewritten the tensor it changes
        gives = self.env[n.all_input_nodes[0]] if is_assignment else result
        found = list(_tensors(gives))
        self._alive += found
        if isinstance(gives, Tensor):
            self.tensors.add(n)
        self.memories[n] = [_Memory.of(tensor) for tensor in found]
        return result


def _arguments(node: fx.Node) -> list[fx.Node]:
    """In the order in which they are written, what is written into first."""
    found: list[fx.Node] = []
    map_arg((node.kwargs.get("out"), node.args, node.kwargs), found.append)
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))


def without_writes(
    module: nn.Module, graph: fx.Graph, image: Tensor, arch: str, place_of: Callable[[fx.Node], str]
) -> None:
    """Rewrite `graph`, in place, so that no node changes a tensor that another one gives.

    A node that writes gives the new tensor instead, and what reads the changed one later reads that. The
    flags `inplace` of the modules it runs have to be off afterwards (`work_out_of_place`).

    Args:
        module: on the meta device, in eval mode; the graph's targets are its modules.
        image: (1, C, H, W) on the meta device.

    Raises:
        UserError: what is changed is read again later in another way, or is the network's own state;
            names the network and the module. What the network itself raises is raised as it is.
    """
    recorder = _Recorder(module, graph)
    with torch.no_grad():
        recorder.run(image)
    position = {node: index for index, node in enumerate(graph.nodes)}
    newest: dict[fx.Node, fx.Node] = {}
    for writer, (written, *others) in recorder.written.items():
        given = newest.get(written, written)
        memories = recorder.memories[given]
        seen = [pair for memory in memories for pair in _seen_later(writer, memory, recorder, position)]
        same = [memory for _, memory in seen] + [m for other in others for m in recorder.memories[other]]
        is_one = len(memories) == 1 and all(memory == memories[0] for memory in same)
        is_seen = not any(0 in memory.size for memory in memories)  # of one image, which may be too few
        if given.op == "get_attr" or not is_one or not is_seen:
            raise _refused(arch, place_of(writer), given)
        if not _rewrite(module, writer, given, graph, writer in recorder.mixed) and seen:
            raise _refused(arch, place_of(writer), given)
        newest |= dict.fromkeys((written, given, *(node for node, _ in seen)), writer)
        newest |= {older: writer for older, newer in newest.items() if newer is given}
        for node, _ in seen:
            for user in list(node.users):
                if position.get(user, -1) > position[writer]:
                    user.replace_input_with(node, writer)


def _seen_later(
    writer: fx.Node, written: _Memory, recorder: _Recorder, position: dict[fx.Node, int]
) -> list[tuple[fx.Node, _Memory]]:
    """Nodes before `writer` through which something later reads what it changes, each with its memory."""
    found = []
    for node, memories in recorder.memories.items():
        if position[node] >= position[writer]:
            break
        later = [user for user in node.users if position.get(user, -1) > position[writer]]
        if later and node in recorder.tensors:
            found += [(node, memory) for memory in memories if memory.meets(written)]
        elif any(memory.meets(written) for user in later for memory in _read_of(user, memories)):
            found.append((node, _NO_TENSOR))
    return found


def _read_of(user: fx.Node, memories: list[_Memory]) -> list[_Memory]:
    """What `user` reads of several tensors."""
    if user.target is operator.getitem and isinstance(index := user.args[1], int):
        return [memories[index]]
    return memories


def _refused(arch: str, place: str, given: fx.Node) -> UserError:
    if given.op == "get_attr":
        return UserError(
            f"network {arch}: '{place}' changes the network's own '{given.target}' in eval mode\n"
            "let it do so in training alone: if self.training: ..."
        )
    return UserError(
        f"network {arch}: '{place}' changes in place what is read again later in another way\n"
        "let it give a new tensor instead (y[i] = y[i] + x, not y[i] += x), or keep all that uses this one "
        "within a module that stays whole"
    )


def _rewrite(
    module: nn.Module, writer: fx.Node, given: fx.Node, graph: fx.Graph, of_several_types: bool
) -> bool:
    """Let `writer` give what it would have made of `given`; False if only its own result is that."""
    name = str(getattr(writer.target, "__name__", writer.target))
    is_operator = writer.target is getattr(operator, name, None)
    keeps_type = of_several_types or name in _ANSWERS  # in place, a tensor keeps it; the namesake may promote
    if writer.op == "call_module":
        if getattr(module.get_submodule(str(writer.target)), "inplace", False) is True:
            return True  # once the flag is off
        return _on_a_clone(writer, given, graph)
    if writer.target is operator.setitem:
        writer.target = with_item
    elif keeps_type and (is_operator or name.endswith("_")) and writer.args[:1] == (given,):
        method = f"__{name}__" if is_operator else name
        writer.op, writer.target = "call_function", on_a_copy
        writer.args = (given, method, *writer.args[1:])
    elif is_operator:  # iadd and the like
        writer.target = getattr(operator, name.removeprefix("i"))
    elif "inplace" in (arguments := _named(writer)):
        writer.args, writer.kwargs = (), arguments | {"inplace": False}
    elif (function := _namesake(writer.target, name)) is not None:
        writer.target = function
    elif name.endswith("_") and hasattr(Tensor, name) and writer.args[:1] == (given,):
        writer.op, writer.target = "call_method", name.removesuffix("_")
        if not hasattr(Tensor, str(writer.target)):
            writer.op, writer.target = "call_function", on_a_copy
            writer.args = (given, name, *writer.args[1:])
    else:
        return _on_a_clone(writer, given, graph)
    return True


def _on_a_clone(writer: fx.Node, given: fx.Node, graph: fx.Graph) -> bool:
    """Let `writer` change a copy, which nobody else may read."""
    with graph.inserting_before(writer):
        copied = graph.call_function(torch.clone, (given,))
    copied.meta = {"nn_module_stack": writer.meta.get("nn_module_stack", {}), KEPT_WITH_NEXT: True}
    writer.replace_input_with(given, copied)
    return False


def _namesake(target: Any, name: str) -> Callable[..., Any] | None:
    """The function of torch that does the same, but not in place."""
    for library in (torch, nn.functional):
        if name.endswith("_") and getattr(library, name, None) is target:
            return getattr(library, name.removesuffix("_"), None)
    return None


def _named(node: fx.Node) -> dict[str, Any]:
    """The arguments of a function by name, if it tells them."""
    try:
        assert callable(node.target)
        return dict(signature(node.target).bind(*node.args, **node.kwargs).arguments)
    except (AssertionError, TypeError, ValueError):
        return {}


def with_item(x: Tensor, index: Any, value: Any) -> Tensor:
    """`x` with `x[index] = value`."""
    x = x.clone()
    x[index] = value
    return x


def on_a_copy(x: Tensor, method: str, *args: Any, **kwargs: Any) -> Tensor:
    """What `x` is after the method, which works in place."""
    x = x.clone()
    getattr(x, method)(*args, **kwargs)
    return x


_OPERATORS = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
}


def work_out_of_place(module: nn.Module, graph: fx.Graph) -> None:
    """Turn off the flags `inplace` of the modules that a rewritten graph runs, not of those within them.

    And let `n //= 2` of numbers give a new one: as code, a graph has one name for both.
    """
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _OPERATORS.get(node.target, node.target)
        if node.op == "call_module":
            part = module.get_submodule(str(node.target))
            if getattr(part, "inplace", False) is True:
                part.inplace = False  # type: ignore[assignment]  # a flag, whatever torch declares
