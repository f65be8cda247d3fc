"""Whether a foreign network in blocks computes what the user's own module does, and where they first part."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from pbkd.errors import UserError, first_line
from pbkd.networks.block_network import BlockNetwork
from pbkd.networks.mistakes import place_of
from pbkd.networks.partition import original_fresh, original_name, randomize, traced_of, unnarrowed, unshare
from pbkd.networks.spec import TracedSpec
from pbkd.networks.trace import Reference, result_of

BATCHES = (1, 8)
ROUNDING = 1e-9
"""Of the largest logit: two orders of the same sums in float64 differ by less."""


def require_exact(spec: TracedSpec, images: Tensor | None = None) -> None:
    """Check that the network of `spec`, as it was cut, is the user's, with random weights.

    Raises:
        UserError: see `require_equal`.
    """
    require_equal(random_copy(spec), unnarrowed(spec), images)


def random_copy(spec: TracedSpec) -> BlockNetwork:
    """The network of `spec` as it was cut, in eval mode, with random weights."""
    network = BlockNetwork(unnarrowed(spec), original_fresh(spec, 0)).eval()
    held = traced_of(spec).module.state_dict()
    own = network.state_dict()
    randomize((tensor for name, tensor in own.items() if original_name(name) in held), 0)
    return network


def require_equal(
    network: BlockNetwork,
    spec: TracedSpec,
    images: Tensor | None = None,
    unused: Mapping[str, Tensor] | None = None,
) -> None:
    """Compare `network`, which is not narrowed, with the user's untouched module in eval mode.

    Bit for bit, on noise and on `images`, in batches of one and of eight; where that fails, float64 decides
    whether it is rounding.

    Args:
        network: on the CPU; not changed.
        images: (N, C, H, W), on the CPU.
        unused: tensors of the original that the network does not use, by their names there.

    Raises:
        UserError: they differ; names the first module that gives something else. Or, in eval mode, the
            original gives another result each time, or changes its own tensors.
    """
    try:
        _require_equal(network, spec, images, unused)
    except UserError:
        raise
    except Exception as error:  # the user's forward may raise anything where it runs as a copy
        raise UserError(
            f"network {spec.arch}: a copy of it cannot be run: {first_line(error)}\n"
            "let it hold its tensors as parameters or buffers in float32, none in closures, hooks or lists"
        ) from error


def _require_equal(
    network: BlockNetwork, spec: TracedSpec, images: Tensor | None, unused: Mapping[str, Tensor] | None
) -> None:
    original = with_tensors_of(network, spec, unused).requires_grad_(False)
    noise = torch.randn(max(BATCHES), *spec.input_shape, generator=torch.Generator().manual_seed(1))
    _require_repeatable(original, noise[:1], spec.arch)
    network = copy.deepcopy(network).eval()
    _require_untouched(network, noise, spec.arch)
    for given in (noise,) if images is None else (images, noise):
        for count in BATCHES:
            if not _are_equal(network, original, given[:count], spec.arch):
                where = _first_difference(network, original, spec, given[:count])
                raise UserError(
                    f"network {spec.arch}: in blocks it computes something else than your module does; "
                    f"of its modules, the first that gives something else is '{where}'\n"
                    "let no operation before it change what others read, or what the module itself holds"
                )


def with_tensors_of(
    network: BlockNetwork, spec: TracedSpec, unused: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """The user's untouched module in eval mode, with the values of the network's tensors, and of `unused`.

    Raises:
        UserError: it holds tensors that are in no state_dict and others in each build.
    """
    original = Reference.of(spec).build().eval()
    unshare(original)
    own = {original_name(name): tensor for name, tensor in network.state_dict().items()}
    _require_same_build(original, own, spec.arch)
    _give(original, own | dict(unused or {}))
    return original


def _are_equal(network: BlockNetwork, original: nn.Module, images: Tensor, arch: str) -> bool:
    expected, found = _logits(original, images), _logits(network, images)
    if _same(expected, found):
        return True
    doubles = (copy.deepcopy(part).double() for part in (original, network))
    try:
        expected, found = (_logits(part, images.double()) for part in doubles)
    except RuntimeError as error:
        raise UserError(
            f"network {arch}: in blocks it computes something else than your module does, and float64, which "
            f"tells whether that is rounding, fails: {first_line(error)}\n"
            "let it compute in one type: no autocast and no change of types in its forward"
        ) from error
    return bool((expected - found).abs().max() <= ROUNDING * expected.abs().max())


def _same(first: Tensor, second: Tensor) -> bool:
    """Bit for bit; NaN where the other is NaN."""
    return torch.allclose(first, second, rtol=0.0, atol=0.0, equal_nan=True)


def _logits(part: nn.Module, images: Tensor) -> Tensor:
    with deterministic():
        logits: Tensor = part(images.clone())
    return logits


def _require_untouched(network: BlockNetwork, x: Tensor, arch: str) -> None:
    """Refuse a part that changes what it gets: teacher and student are given the same."""
    parts = {"stem": network.stem} | {f"block {n}": block for n, block in enumerate(network.blocks, 1)}
    for name, part in (parts | dict(network.classifier.named_children())).items():
        before = x.clone()
        with deterministic():
            result = part(x)
        if not _same(x, before):
            raise UserError(
                f"network {arch}: its {name} changes the tensor that it is given\n"
                "let it work on a copy: x = x.clone()"
            )
        x = result


def _require_same_build(original: nn.Module, own: Mapping[str, Tensor], arch: str) -> None:
    """Refuse tensors that no file holds and that are others each time the network is built."""
    held = original.state_dict()
    for name, tensor in own.items():
        if name not in held:
            path, _, leaf = name.rpartition(".")
            other = getattr(original.get_submodule(path), leaf)
            if not _same(other, tensor):
                raise UserError(
                    f"network {arch}: '{name}', which no state_dict holds, is another one in each build\n"
                    "let the builder draw it from a seed of its own, or register it as a persistent buffer"
                )


@contextmanager
def deterministic() -> Iterator[None]:
    """As any user would run it; what is random gives the same each time."""
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _give(original: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the values of `tensors` into `original`, parameters, buffers and other attributes alike."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            getattr(original.get_submodule(path), leaf).copy_(tensor)


def _require_repeatable(original: nn.Module, image: Tensor, arch: str) -> None:
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    results = []
    for seed in range(2):
        with deterministic():
            torch.manual_seed(seed)
            results.append(original(image.clone()))
    changed = [name for name, tensor in original.state_dict().items() if not _same(tensor, before[name])]
    if changed:
        raise UserError(
            f"network {arch}: changes its own tensor '{changed[0]}' in eval mode\n"
            "let it do so in training alone: if self.training: ..."
        )
    if not _same(*results):
        raise UserError(
            f"network {arch}: gives another result each time for the same image, in eval mode too\n"
            "let what is random ask self.training: F.dropout(x, p, self.training), or nn.Dropout"
        )


def _first_difference(network: BlockNetwork, original: nn.Module, spec: TracedSpec, images: Tensor) -> str:
    """The first module, in the order of the graph, that gives something else."""
    original = copy.deepcopy(original).double()
    traced = traced_of(spec)
    called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
    theirs: dict[str, list[Tensor]] = {}

    def keep(path: str) -> Any:
        def hook(module: nn.Module, given: Any, result: Any) -> None:
            if isinstance(result, Tensor):
                theirs.setdefault(path, []).append(result.clone())

        return hook

    hooks = [original.get_submodule(path).register_forward_hook(keep(path)) for path in called]
    with deterministic():
        original(images.double())
    for hook in hooks:
        hook.remove()
    return _compare(network, spec, theirs, images)


def _compare(
    network: BlockNetwork, spec: TracedSpec, theirs: Mapping[str, list[Tensor]], images: Tensor
) -> str:
    calls: dict[str, int] = {}
    network = copy.deepcopy(network).double()
    different: list[fx.Node] = []

    class Compared(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.op == "call_module" and isinstance(result, Tensor) and not different:
                number = calls[str(n.target)] = calls.get(str(n.target), -1) + 1
                expected = theirs.get(str(n.target), [])[number : number + 1]
                limit = ROUNDING * max(1.0, float(result.abs().max()))
                if not expected or (expected[0] - result).abs().max() > limit:
                    different.append(n)
            return result

    x = images.double()
    with deterministic():
        for part in (network.stem, *network.blocks, *network.classifier.children()):
            x = Compared(part).run(x) if isinstance(part, fx.GraphModule) else part(x)
            if different:
                return place_of(different[0])
    return place_of(result_of(traced_of(spec).graph))
