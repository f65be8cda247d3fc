"""What a network costs on paper: parameters and multiply-accumulates, counted without allocating a weight."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from pbkd.measure.modes import evaluating


@dataclass(frozen=True)
class Cost:
    """`params` with biases, without batch normalization's; `macs` of convolutions and linear layers for one
    image."""

    params: int
    macs: int


def count(network: nn.Module, input_shape: tuple[int, ...]) -> Cost:
    """Parameters and multiply-accumulates of `network` for one image of `input_shape` (C, H, W).

    Runs the forward pass on the meta device with shapes only; the network may be on any device, meta
    included, and keeps its weights and modes. Batch normalization is left out of both, as it folds into the
    convolution before it.
    """
    flops = _flop_counter(network, input_shape)
    params = sum(tensor.numel() for tensor in _weights(network))
    return Cost(params=params, macs=flops.get_total_flops() // 2)


def nonzero_macs(network: nn.Module, input_shape: tuple[int, ...]) -> int:
    """The multiply-accumulates `count` counts whose weight is not zero: an ideal sparse kernel's."""
    flops, root = _flop_counter(network, input_shape).get_flop_counts(), type(network).__name__
    total = 0.0
    for name, layer in network.named_modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and (found := flops.get(f"{root}.{name}" if name else root)):
            share = int(torch.count_nonzero(weight)) / weight.numel()
            total += share * sum(found.values()) / 2
    return round(total)


def nonzero_params(network: nn.Module) -> int:
    """How many of the parameters `count` counts are not zero."""
    return int(sum(torch.count_nonzero(tensor) for tensor in _weights(network)))


def _flop_counter(network: nn.Module, input_shape: tuple[int, ...]) -> FlopCounterMode:
    """The counter after a forward pass of one image on the meta device, module by module."""
    shapes = {name: _meta(tensor) for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    dtype = next((weight.dtype for weight in network.parameters()), torch.float32)
    image = torch.empty((1, *input_shape), dtype=dtype, device="meta")
    counter = FlopCounterMode(display=False)
    with evaluating(network), torch.no_grad(), counter:
        functional_call(network, shapes, (image,))
    return counter


def _weights(network: nn.Module) -> list[nn.Parameter]:
    norms = (module for module in network.modules() if isinstance(module, _BatchNorm))
    excluded = {id(tensor) for norm in norms for tensor in norm.parameters(recurse=False)}
    return [tensor for tensor in network.parameters() if id(tensor) not in excluded]


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")
