"""Weights into a network: fresh ones from a seed, or given ones, also under public checkpoints' names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from pbkd.errors import UserError
from pbkd.networks.block_network import BlockNetwork, ConvLayer
from pbkd.networks.partition import original_empty, original_fresh, original_name, traced_of, with_memory
from pbkd.networks.spec import AnySpec, NetworkSpec, TracedSpec


def empty(spec: AnySpec, device: torch.device | str = "cpu") -> BlockNetwork:
    """A network with memory for its weights, whose values are still undefined."""
    if isinstance(spec, TracedSpec):
        return BlockNetwork(spec, original_empty(spec)).to(device)
    with torch.device("meta"):
        network = BlockNetwork(spec)
    return with_memory(network, device)


def initialize_fresh(module: nn.Module, seed: int) -> None:
    """Fill `module` (on the CPU) in place.

    Convolutions: Kaiming normal, fan out (He et al. 2015); linear layers: uniform within +-1/sqrt(inputs);
    norms: gain 1, fresh statistics; biases: zero. The numbers depend on `seed` and the shapes alone, not on
    torch's global generator.
    """
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(part, nn.Linear):
            bound = part.in_features**-0.5
            nn.init.uniform_(part.weight, -bound, bound, generator=generator)
        elif isinstance(part, nn.BatchNorm2d) and part.affine:
            part.reset_running_stats()
            nn.init.ones_(part.weight)
        elif isinstance(part, nn.LayerNorm | nn.GroupNorm) and part.weight is not None:
            nn.init.ones_(part.weight)
        else:
            continue
        if part.bias is not None:
            nn.init.zeros_(part.bias)


def fresh(spec: AnySpec, seed: int) -> BlockNetwork:
    """A network on the CPU with fresh weights; what `initialize_fresh` does not know keeps its builder's."""
    if isinstance(spec, TracedSpec):
        network = BlockNetwork(spec, original_fresh(spec, seed))
    else:
        network = empty(spec)
    initialize_fresh(network, seed)
    return network


def maskable_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights of convolutions and linear layers, without biases, by name."""
    return {
        f"{name}.weight": module.weight
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def load_weights(network: BlockNetwork, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Copy `tensors` into `network`; the names are pbkd's own or those of public VGG and ResNet checkpoints.

    A foreign network's are also its own; what it has but does not use, such as auxiliary heads, is returned.

    Raises:
        UserError: a tensor is missing, is left over, or has another shape; names it, and both shapes.
    """
    expected = network.state_dict()
    given = _own_names(network, tensors)
    unused = _taken_unused(network.spec, given, expected.keys())
    for name in expected.keys() - given.keys():
        if _is_in_no_file(name, network.spec):
            given[name] = expected[name]
        elif name.endswith("num_batches_tracked"):
            given[name] = torch.zeros((), dtype=torch.long)
    for name, tensor in expected.items():
        if name not in given:
            raise UserError(f"{source}: no tensor for '{name}' {tuple(tensor.shape)} of {network.spec.arch}")
        if given[name].shape != tensor.shape:
            raise UserError(
                f"{source}: tensor '{name}' has shape {tuple(given[name].shape)}, but {network.spec.arch} "
                f"needs {tuple(tensor.shape)}; check the recipe's network and the data's classes"
            )
    if left := sorted(given.keys() - expected.keys()):
        raise UserError(
            f"{source}: {len(left)} tensors do not belong to {network.spec.arch}, first '{left[0]}'"
        )
    network.load_state_dict(given)
    return unused


def _taken_unused(spec: AnySpec, given: dict[str, Tensor], used: Container[str]) -> dict[str, Tensor]:
    """Take out of `given`, and return, what the original has but does not use."""
    if not isinstance(spec, TracedSpec):
        return {}
    original = traced_of(spec).module.state_dict()
    return {name: given.pop(name) for name in list(given) if name in original and name not in used}


def _is_in_no_file(name: str, spec: AnySpec) -> bool:
    """Whether the original keeps a tensor out of its state_dict: only its builder knows it."""
    return isinstance(spec, TracedSpec) and original_name(name) not in traced_of(spec).module.state_dict()


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of names; independent of any file format."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_RESNET_NAMES = (
    (r"^conv1\.", "stem.0.conv."),
    (r"^bn1\.", "stem.0.norm."),
    (
        r"^layer(\d+)\.(\d+)\.conv(\d+)\.",
        lambda m: f"blocks.{int(m[1]) - 1}.{m[2]}.branch.{int(m[3]) - 1}.conv.",
    ),
    (
        r"^layer(\d+)\.(\d+)\.bn(\d+)\.",
        lambda m: f"blocks.{int(m[1]) - 1}.{m[2]}.branch.{int(m[3]) - 1}.norm.",
    ),
    (
        r"^layer(\d+)\.(\d+)\.(?:downsample|shortcut)\.([01])\.",
        lambda m: f"blocks.{int(m[1]) - 1}.{m[2]}.shortcut.{'conv' if m[3] == '0' else 'norm'}.",
    ),
    (r"^(?:linear|fc)\.", "classifier.fc1."),
)

_DENSENET_NAMES = re.compile(r"(\.denselayer\d+\.(?:norm|conv))\.([12]\.)")
"""torchvision's published DenseNets are from when a module's name might have a dot: `norm.1` for `norm1`."""


def _own_names(network: BlockNetwork, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    given = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    if isinstance(network.spec, TracedSpec):
        return _partitioned_names(network, network.spec, given)
    if network.spec.arch.startswith("vgg"):
        table = _vgg_names(network)
        return {_renamed_vgg(name, table): tensor for name, tensor in given.items()}
    renamed = {}
    for name, tensor in given.items():
        for pattern, replacement in _RESNET_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _partitioned_names(
    network: BlockNetwork, spec: TracedSpec, given: dict[str, Tensor]
) -> dict[str, Tensor]:
    own = network.state_dict().keys()
    if own <= given.keys():
        return given
    given = {_DENSENET_NAMES.sub(r"\1\2", name): tensor for name, tensor in given.items()}
    table = {original_name(name): name for name in own}
    return {table.get(name, name): tensor for name, tensor in given.items()}


def _vgg_names(network: BlockNetwork) -> dict[str, str]:
    """torchvision numbers the layers of a VGG: `features.0`, ... and `classifier.0`, `.3`, `.6`."""
    assert isinstance(network.spec, NetworkSpec)
    table, number = {}, 0
    for block, modules in enumerate(network.blocks):
        for name, layer in modules.named_modules():
            if isinstance(layer, ConvLayer):
                for child, _ in layer.named_children():
                    table[f"features.{number}"] = f"blocks.{block}.{name}.{child}"
                    number += 1
        number += 1  # the pooling
    for layer_number in range(1, len(network.spec.classifier.widths)):
        table[f"classifier.{3 * (layer_number - 1)}"] = f"classifier.fc{layer_number}"
    if len(network.spec.classifier.widths) == 2:  # public CIFAR VGGs have a lone linear layer
        table["classifier"] = "classifier.fc1"
    return table


def _renamed_vgg(name: str, table: Mapping[str, str]) -> str:
    module, _, tensor = name.rpartition(".")
    return f"{table.get(module, module)}.{tensor}"
