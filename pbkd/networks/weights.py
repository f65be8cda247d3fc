"""Weights into a network: fresh ones from a seed, or given ones, also under public checkpoints' names."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from pbkd.errors import UserError
from pbkd.networks.block_network import BlockNetwork, ConvLayer
from pbkd.networks.partition import original_empty, original_fresh, original_name, traced_of, with_memory
from pbkd.networks.spec import AnySpec, NetworkSpec, TracedSpec

COMPILED = "_orig_mod."
"""What torch.compile puts before the names of a module's tensors."""
AVERAGED = "n_averaged"
"""What torch's AveragedModel counts beside the averaged weights."""


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
    What DDP, torch.compile, Lightning or AveragedModel put before all names is removed, unless the network's
    own names have it too.

    Raises:
        UserError: tensors are missing, are left over, or have another shape; or weights are complex, NaN or
            infinite, or variances negative. Names them as in the file.
    """
    names, unused = _divided(network, tensors)
    if misfit := _misfit(network, tensors, names):
        raise UserError(f"{source}: {misfit}")
    values = {}
    parameters = {name for name, _ in network.named_parameters()}
    for name, own in network.state_dict().items():
        if name not in names:
            values[name] = own if _is_in_no_file(name, network.spec) else torch.zeros((), dtype=torch.long)
            continue
        values[name] = tensors[names[name]]
        if damage := _damage(name, values[name], own, name in parameters):
            raise UserError(
                f"{source}: tensor '{names[name]}' {damage}\n"
                "its training diverged or the file is damaged; give weights that were saved earlier"
            )
    network.load_state_dict(values)
    return {name: tensors[file_name] for name, file_name in unused.items()}


def _divided(network: BlockNetwork, tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """Names in the file, by the network's own, and by the original's where the network does not use it."""
    names = _own_names(network, tensors)
    if not isinstance(network.spec, TracedSpec):
        return names, {}
    used, original = network.state_dict().keys(), traced_of(network.spec).module.state_dict()
    unused = {name: names.pop(name) for name in list(names) if name in original and name not in used}
    return names, unused


def _is_in_no_file(name: str, spec: AnySpec) -> bool:
    """Whether the original keeps a tensor out of its state_dict: only its builder knows it."""
    return isinstance(spec, TracedSpec) and original_name(name) not in traced_of(spec).module.state_dict()


def fits(network: BlockNetwork, tensors: Mapping[str, Tensor]) -> bool:
    """Whether `load_weights` finds all it needs in `tensors`, by names and shapes, and nothing else."""
    return not _misfit(network, tensors, _divided(network, tensors)[0])


def few(names: Iterable[object], most: int = 3) -> str:
    """List the first names for a message."""
    listed = [f"'{name}'" for name in names]
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def _misfit(network: BlockNetwork, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> str:
    """Say how `tensors`, whose names in the file `names` gives by ours, differ from the network's; or ""."""
    expected = network.state_dict()
    needed = [
        name
        for name in expected
        if not (name.endswith("num_batches_tracked") or _is_in_no_file(name, network.spec))
    ]
    missing = [_shown(network, name) for name in needed if name not in names]
    left = [file_name for name, file_name in names.items() if name not in expected]
    shapes = [
        f"'{names[name]}' has shape {tuple(tensors[names[name]].shape)}, but {network.spec.arch} needs "
        f"{tuple(own.shape)}"
        for name, own in expected.items()
        if name in names and tensors[names[name]].shape != own.shape
    ]
    found = [f"{len(missing)} of {len(needed)} tensors missing: {few(missing)}"] if missing else []
    found += [f"{len(left)} left over: {few(left)}"] if left else []
    found += [f"{len(shapes)} of another shape: {', '.join(shapes[:2])}"] if shapes else []
    if not found:
        return ""
    cure = f"check the recipe's network and the data's classes, which are {network.spec.num_classes}"
    if missing or left:
        cure = "give the network that the file was saved from, or name a part of the file: weights: FILE::KEY"
    return f"does not hold the weights of {network.spec.arch}\n{'; '.join(found)}\n{cure}"


def _shown(network: BlockNetwork, name: str) -> str:
    """The name by which the user knows one of our tensors."""
    return original_name(name) if isinstance(network.spec, TracedSpec) else name


def _damage(name: str, given: Tensor, own: Tensor, is_parameter: bool) -> str:
    """Say what makes `given` no weights of a trained network, or ""."""
    if given.layout is not torch.strided or given.is_quantized:
        return f"is {given.layout} of {given.dtype}, expected a dense tensor of numbers"
    if given.is_complex() and not own.is_complex():
        return f"is complex ({given.dtype}), expected real numbers"
    given = given.to(own.dtype)
    if name.endswith("running_var") and bool((given < 0).any()):
        return "holds negative variances"
    if is_parameter or name.endswith(("running_mean", "running_var")):  # a mask may be infinite
        if bool(given.isnan().any()):
            return "holds NaN"
        if bool(given.isinf().any()):
            return "holds infinite values"
    return ""


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


def _own_names(network: BlockNetwork, file_names: Iterable[str]) -> dict[str, str]:
    """The names in the file by ours, with as many wrappers removed as give most of our names."""
    own = network.state_dict().keys()
    candidates = [_renamed(network, names) for names in _unwrapped(file_names)]
    return max(candidates, key=lambda names: len(own & names.keys()))


def _unwrapped(file_names: Iterable[str]) -> Iterator[dict[str, str]]:
    """The names in the file by themselves; then, one by one, without what wrappers put before all of them."""
    names = {name: name for name in file_names}
    yield names
    if any(COMPILED in name for name in names):  # also where only a module inside was compiled
        names = {name.replace(COMPILED, ""): file_name for name, file_name in names.items()}
        yield names
    while True:
        names = {name: file_name for name, file_name in names.items() if name != AVERAGED}
        wrappers = {name.partition(".")[0] if "." in name else "" for name in names}
        if len(wrappers) != 1 or "" in wrappers:
            return
        names = {name.partition(".")[2]: file_name for name, file_name in names.items()}
        yield names


def _renamed(network: BlockNetwork, names: dict[str, str]) -> dict[str, str]:
    """`names` with its keys, from the file, replaced by ours where they are known."""
    if isinstance(network.spec, TracedSpec):
        return _partitioned_names(network, network.spec, names)
    if network.spec.arch.startswith("vgg"):
        table = _vgg_names(network)
        return {_renamed_vgg(name, table): file_name for name, file_name in names.items()}
    renamed = {}
    for name, file_name in names.items():
        for pattern, replacement in _RESNET_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = file_name
    return renamed


def _partitioned_names(network: BlockNetwork, spec: TracedSpec, given: dict[str, str]) -> dict[str, str]:
    own = network.state_dict().keys()
    if own <= given.keys():
        return given
    given = {_DENSENET_NAMES.sub(r"\1\2", name): file_name for name, file_name in given.items()}
    ours = {name: original_name(name) for name in own}  # several of ours may be one of the original
    names = {name: given[original] for name, original in ours.items() if original in given}
    left = given.keys() - set(ours.values())
    return names | {name: file_name for name, file_name in given.items() if name in left}


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
