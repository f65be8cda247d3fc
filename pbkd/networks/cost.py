"""What an architecture costs, from its spec alone."""

from __future__ import annotations

from functools import lru_cache

from pbkd.measure import Cost, count
from pbkd.networks.block_network import ConvLayer, on_meta
from pbkd.networks.spec import AnySpec


@lru_cache(maxsize=1024)
def cost_of(spec: AnySpec) -> Cost:
    """Parameters and multiply-accumulates for one image; BatchNorm counts for neither, so it is left out."""
    network = on_meta(spec)
    for layer in network.modules():
        if isinstance(layer, ConvLayer) and hasattr(layer, "norm"):
            del layer.norm
    return count(network, spec.input_shape)
