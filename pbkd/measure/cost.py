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
    shapes = {name: _meta(tensor) for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    dtype = next((weight.dtype for weight in network.parameters()), torch.float32)
    image = torch.empty((1, *input_shape), dtype=dtype, device="meta")
    with evaluating(network), torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(network, shapes, (image,))
    params = sum(tensor.numel() for tensor in _weights(network))
    return Cost(params=params, macs=counter.get_total_flops() // 2)


def nonzero_params(network: nn.Module) -> int:
    """How many of the parameters `count` counts are not zero."""
    return int(sum(torch.count_nonzero(tensor) for tensor in _weights(network)))


def _weights(network: nn.Module) -> list[nn.Parameter]:
    norms = (module for module in network.modules() if isinstance(module, _BatchNorm))
    excluded = {id(tensor) for norm in norms for tensor in norm.parameters(recurse=False)}
    return [tensor for tensor in network.parameters() if id(tensor) not in excluded]


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")
