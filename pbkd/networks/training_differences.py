"""How a network trains otherwise than its copy does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from pbkd.networks.dropout import is_dropout, keep_dropout
from pbkd.networks.equality import deterministic, random_copy, with_tensors_of
from pbkd.networks.mistakes import place_of
from pbkd.networks.partition import original_name
from pbkd.networks.spec import TracedSpec
from pbkd.networks.trace import Reference, traced_in_training
from pbkd.networks.tracer import NetworkTracer
from pbkd.networks.weights import few

ROUNDING = 1e-6
"""Of a tensor's largest gradient, in float64."""


def trained_otherwise(spec: TracedSpec) -> list[str]:
    """What the network of `spec` does while it trains and its copy does not, a sentence for each kind."""
    found = {
        "it runs {} in training alone; no student has it": run_in_training_only(Reference.of(spec)),
        "it runs {} in eval mode alone; students do so in training too": run_in_eval_only(Reference.of(spec)),
        "its own train() leaves {} in eval mode; here they train": kept_in_eval_mode(Reference.of(spec)),
        "in eval mode {} get other gradients than in your module, whose forward detaches, writes into .data, "
        "turns gradients off or has an autograd.Function": with_other_gradients(spec),
    }
    return [sentence.format(few(names)) for sentence, names in found.items() if names]


def run_in_training_only(reference: Reference) -> list[str]:
    """What the forward runs while it trains alone, modules and operations: a copy has nothing of it.

    Functional dropout is none of them: it is kept (`keep_dropout`).
    """
    ran = _ran(reference)
    return ["what cannot be traced"] if ran is None else _places(ran[0] - ran[1])


def run_in_eval_only(reference: Reference) -> list[str]:
    """What the forward runs in eval mode, and nothing like it in training."""
    ran = _ran(reference)
    return (
        [] if ran is None else [place for place in _places(ran[1] - ran[0]) if place not in _places(ran[0])]
    )


def _places(ran: Counter[tuple[str, str]]) -> list[str]:
    return list(dict.fromkeys(place for place, _ in ran))


def _ran(reference: Reference) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]] | None:
    """In training and in eval mode: each operation by its place and what it is given but tensors."""
    trained = traced_in_training(reference)
    if trained is None:
        return None
    evaluated = NetworkTracer().trace(reference.build_meta().eval())
    is_kept = keep_dropout(evaluated, trained)

    def ran(graph: fx.Graph) -> Counter[tuple[str, str]]:
        return Counter(
            (place_of(node), repr(fx.node.map_arg((node.args, node.kwargs), lambda _: None)))
            for node in graph.nodes
            if node.op.startswith("call") and not (is_kept and is_dropout(node))
        )

    return ran(trained), ran(evaluated)


def kept_in_eval_mode(reference: Reference) -> list[str]:
    """The modules that the network's own `train` leaves in eval mode, such as frozen norms."""
    network = reference.build_meta()
    try:
        network.train()
    except Exception:  # noqa: BLE001  # whatever its own train() raises
        return []
    return [name for name, part in network.named_modules() if not part.training]


def with_other_gradients(spec: TracedSpec) -> list[str]:
    """The tensors whose gradients in a copy are not those in the user's own module, the last first.

    Compared in eval mode, on one image of noise; empty for a module that cannot be trained.
    """
    copied = random_copy(spec)
    original = with_tensors_of(copied, spec)
    image = torch.randn(1, *spec.input_shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    try:
        expected = _gradients(original.double(), image)
        gradients = _gradients(copied.double(), image)
    except Exception:  # noqa: BLE001  # whatever the user's forward raises in float64
        return []
    found = {original_name(name): value for name, value in gradients.items()}
    return [name for name in reversed(found) if not _near(expected.get(name), found[name])]


def _gradients(network: nn.Module, image: Tensor) -> Mapping[str, Tensor | None]:
    with deterministic(), torch.enable_grad():
        logits = network(image.clone())
        (logits * torch.linspace(-1.0, 1.0, logits.numel(), dtype=logits.dtype)).sum().backward()
    return {name: tensor.grad for name, tensor in network.named_parameters()}


def _near(expected: Tensor | None, found: Tensor | None) -> bool:
    if expected is None or found is None:
        known = found if expected is None else expected
        return known is None or not bool(known.any())
    return bool((expected - found).abs().max() <= ROUNDING * expected.abs().max())
