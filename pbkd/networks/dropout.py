"""Dropout by functions: in a graph that was traced in eval mode it would never train."""

from __future__ import annotations

from inspect import signature
from itertools import zip_longest
from typing import Any

import torch
from torch import fx, nn

BY_POSITION = (torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout)
"""Called with (images, probability, whether it trains)."""
BY_NAME = (
    nn.functional.dropout, nn.functional.dropout1d, nn.functional.dropout2d, nn.functional.dropout3d,
    nn.functional.alpha_dropout, nn.functional.feature_alpha_dropout,
)  # fmt: skip


def is_dropout(node: fx.Node) -> bool:
    """Whether it is a call of such a function."""
    return node.op == "call_function" and node.target in (*BY_POSITION, *BY_NAME)


def keep_dropout(graph: fx.Graph, trained: fx.Graph) -> bool:
    """Let the functions that drop out in `trained` ask in `graph` whether their part trains.

    Args:
        graph: traced in eval mode, changed in place.
        trained: the same network traced in training mode.

    Returns:
        False if the two graphs do not call the same of them; nothing is changed then.
    """
    pairs = list(zip_longest(filter(is_dropout, graph.nodes), filter(is_dropout, trained.nodes)))
    if any(a is None or b is None or a.target is not b.target for a, b in pairs):
        return False
    for node, other in pairs:
        drops, drops_in_training = (_settings(each) for each in (node, other))
        if drops_in_training["training"] is True and not _is_on(drops):
            with graph.inserting_before(node):
                training = graph.create_node("get_attr", "training")
            given = node.all_input_nodes[0]
            if node.target in BY_NAME:
                node.args, node.kwargs = (given, drops_in_training["p"]), {"training": training}
            else:
                node.args, node.kwargs = (given, drops_in_training["p"], training), {}
    return True


def _is_on(drops: dict[str, Any]) -> bool:
    return drops["training"] is True and drops["p"] != 0.0


def _settings(node: fx.Node) -> dict[str, Any]:
    """Its `p` and `training`."""
    if node.target in BY_POSITION:
        names = ("input", "p", "train")
        given = dict(zip(names, node.args, strict=False)) | node.kwargs
        return {"p": given["p"], "training": given["train"]}
    assert callable(node.target)
    bound = signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return {"p": bound.arguments["p"], "training": bound.arguments["training"]}
