"""What a network's forward does in training alone."""

from __future__ import annotations

from collections import Counter

from torch import fx

from pbkd.networks.dropout import is_dropout, keep_dropout
from pbkd.networks.mistakes import place_of
from pbkd.networks.trace import NetworkTracer, Reference, traced_in_training


def run_in_training_only(reference: Reference) -> list[str]:
    """What the forward runs while it trains alone, modules and operations: a copy has nothing of it.

    Functional dropout is none of them: it is kept (`keep_dropout`).
    """
    trained = traced_in_training(reference)
    if trained is None:
        return ["what cannot be traced"]
    evaluated = NetworkTracer().trace(reference.build_meta().eval())
    is_kept = keep_dropout(evaluated, trained)

    def ran(graph: fx.Graph) -> Counter[tuple[str, str]]:
        """Each operation by its place and what it is given but tensors."""
        return Counter(
            (place_of(node), repr(fx.node.map_arg((node.args, node.kwargs), lambda _: None)))
            for node in graph.nodes
            if node.op.startswith("call") and not (is_kept and is_dropout(node))
        )

    return list(dict.fromkeys(place for place, _ in ran(trained) - ran(evaluated)))
