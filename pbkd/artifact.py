"""An artifact is a network on disk: `weights.safetensors` and `spec.json`. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from pbkd.errors import StageError, UserError
from pbkd.networks import AnySpec, BlockNetwork, load_weights, read_spec, weights_digest
from pbkd.networks.weights import empty
from pbkd.weight_files import read_safetensors, read_tensors

__all__ = ["Artifact", "load", "probe_input", "read", "read_tensors", "save"]

FORMAT = 1
FILES = WEIGHTS, SPEC = "weights.safetensors", "spec.json"
PROBE_SEED = 20180713
PROBE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Artifact:
    """A saved network.

    Attributes:
        path: its folder.
        digest: sha256 of spec and weights; names the artifact.
        weights_digest: sha256 of the weights alone.
        spec: its architecture.
    """

    path: Path
    digest: str
    weights_digest: str
    spec: AnySpec


def save(network: BlockNetwork, folder: Path) -> Artifact:
    """Write `network` into `folder`, which is created; leaves it on the CPU and in eval mode.

    The logits of a seeded input are written too, and checked at loading.

    Raises:
        StageError: they are not finite; nothing is written.
    """
    network = network.cpu().eval()
    probe = _probe(network)
    if not all(map(math.isfinite, probe)):
        raise StageError(
            "the network's logits are not finite: its training diverged, or its given weights are damaged\n"
            "lower the rate, clip the gradient, or give other weights"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    places: set[int] = set()
    for name, tensor in network.state_dict().items():  # safetensors refuses tied ones
        is_tied = tensor.untyped_storage().data_ptr() in places
        tensors[name] = tensor.contiguous().clone() if is_tied else tensor.contiguous()
        places.add(tensor.untyped_storage().data_ptr())
    weights = weights_digest(tensors)
    spec = network.spec.model_dump(mode="json")
    digest = _digest(spec, weights)
    description = {
        "format": FORMAT,
        "network": spec,
        "weights_digest": weights,
        "digest": digest,
        "probe": probe,
    }
    save_file(tensors, folder / WEIGHTS)
    (folder / SPEC).write_text(json.dumps(description, indent=1) + "\n")
    return Artifact(folder, digest, weights, network.spec)


def read(folder: Path) -> Artifact:
    """The artifact in `folder`, its weights unread.

    Raises:
        UserError: there is none, or its spec is not one of pbkd's.
    """
    path = folder / SPEC
    try:
        description = json.loads(path.read_text())
        weights, digest = description["weights_digest"], description["digest"]
        if digest != _digest(description["network"], weights):
            raise ValueError("contents do not match their digest")
        return Artifact(folder, digest, weights, read_spec(description["network"]))
    except OSError as error:
        raise UserError(
            f"{path}: no artifact here ({error.strerror}); give a folder that pbkd wrote"
        ) from error
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{path}: not a pbkd architecture spec; the file was edited or damaged") from error


def load(folder: Path) -> BlockNetwork:
    """The network of an artifact, on the CPU, in eval mode, without gradients.

    Raises:
        UserError: weights are missing, do not match their digest, or do not give the stored logits; or those
            are not finite.
    """
    artifact = read(folder)
    path = folder / WEIGHTS
    tensors = read_safetensors(path)
    if weights_digest(tensors) != artifact.weights_digest:
        raise UserError(f"{path}: the weights do not match their digest; the file was edited or damaged")
    network = empty(artifact.spec)
    load_weights(network, tensors, str(path))
    network.eval().requires_grad_(False)
    stored = torch.tensor(json.loads((folder / SPEC).read_text())["probe"])
    found = torch.tensor(_probe(network))
    if not stored.isfinite().all():
        raise UserError(
            f"{folder}: the network's logits are not finite: its training diverged; train it again"
        )
    atol = PROBE_TOLERANCE * float(stored.abs().max())
    if not torch.allclose(found, stored, rtol=PROBE_TOLERANCE, atol=atol):
        raise UserError(
            f"{folder}: the network does not compute what it did when it was saved; use its pbkd version"
        )
    return network


def _digest(spec: object, weights: str) -> str:
    return hashlib.sha256(json.dumps([FORMAT, spec, weights], sort_keys=True).encode()).hexdigest()


def probe_input(spec: AnySpec) -> torch.Tensor:
    """The seeded input (1, C, H, W) whose first logits are stored with every artifact, in `spec.json`."""
    return torch.randn(1, *spec.input_shape, generator=torch.Generator().manual_seed(PROBE_SEED))


@torch.inference_mode()
def _probe(network: BlockNetwork) -> list[float]:
    logits = network(probe_input(network.spec))
    return [float(value) for value in logits[0, :16]]
