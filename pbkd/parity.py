"""Whether an exported file computes what its network does: judged by the network in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from pbkd.errors import StageError
from pbkd.measure.modes import evaluating
from pbkd.networks import BlockNetwork

ROUNDING = 4.0
"""How many times float32's own rounding, on these images, a file's logits may be off."""
TOLERANCE = {False: 1e-5, True: 5e-3}
"""But at least this share of the largest logit, or of 10 if that is more, in fp32 and fp16."""
OF_SPREAD = {False: 1e-4, True: 5e-3}
"""And no more than this share of `Parity.spread`: of small logits the above would pass anything."""

MULTIPLY_ACCUMULATES = 100e9
FEWEST, MOST = 16, 1000


@dataclass(frozen=True)
class Parity:
    """How a file's logits compare with the network's in float64, over `images` images.

    Attributes:
        max_abs_diff: the largest difference of a logit.
        rounding: the same of the network itself in float32.
        max_abs_logit: the largest logit of the network.
        spread: how far apart the largest and the smallest logit of an image are, at most.
        agreement: percent of images for which both say the same class.
        tolerance: what `max_abs_diff` may be.
    """

    images: int
    max_abs_diff: float
    rounding: float
    max_abs_logit: float
    spread: float
    agreement: float
    tolerance: float


@torch.inference_mode()
def compare(
    network: nn.Module,
    exported: nn.Module,
    images: Iterable[Tensor],
    *,
    one_by_one: bool,
    fp16: bool,
    tolerance: float | None = None,
) -> Parity:
    """Compare logits on batches of `images` (N, C, H, W), which `exported` gets `one_by_one` if it must.

    A network that cannot be computed in float64 is compared in float32. `tolerance` replaces the limit that
    follows from the network's own rounding.

    Raises:
        StageError: they differ by more than the tolerance, are not numbers, or an image gets another class,
            which rounding may not decide.
    """
    exact, is_exact = _in_float64(network)
    count, agreeing = 0, 0
    difference, rounding, largest, spread, lost = 0.0, 0.0, 0.0, 0.0, 0.0
    with evaluating(network):
        for batch in images:
            expected = exact(batch.double() if is_exact else batch).double()
            parts = batch.split(1) if one_by_one else [batch]
            found = torch.cat([exported(part) for part in parts])
            # A maximum would pass NaN over where it is compared with a number.
            difference = max(difference, float((found - expected).abs().nan_to_num(nan=torch.inf).max()))
            rounding = max(rounding, float((network(batch) - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
            spread = max(spread, float((expected.amax(1) - expected.amin(1)).max()))
            differ = found.argmax(1) != expected.argmax(1)
            best, second = expected.topk(min(2, expected.shape[1]), 1).values.T[[0, -1]]
            lost = max([lost, *(best - second)[differ].tolist()])
            agreeing += int((~differ).sum())
            count += len(batch)
    if not count:
        raise ValueError("nothing to compare: no image was given")
    allowed = min(TOLERANCE[fp16] * max(10.0, largest), OF_SPREAD[fp16] * spread)
    parity = Parity(
        images=count,
        max_abs_diff=difference,
        rounding=rounding,
        max_abs_logit=largest,
        spread=spread,
        agreement=100 * agreeing / count,
        tolerance=max(allowed, ROUNDING * rounding) if tolerance is None else tolerance,
    )
    # Without float64 its rounding is not known: then the tolerance says what may be a tie.
    is_tie = fp16 or tolerance is not None or lost <= 2 * (ROUNDING * rounding if is_exact else allowed)
    if not (difference <= parity.tolerance and is_tie):
        raise StageError(_unlike(parity, fp16))
    return parity


def _in_float64(network: nn.Module) -> tuple[nn.Module, bool]:
    """The network in float64, and whether it is: one may make float32 tensors of its own."""
    exact = copy.deepcopy(network).cpu().eval().double()
    try:
        side = torch.zeros(1, *cast(BlockNetwork, network).spec.input_shape, dtype=torch.float64)
        return exact, exact(side).dtype == torch.float64
    except (RuntimeError, TypeError, AttributeError):
        return network, False


def _unlike(parity: Parity, fp16: bool) -> str:
    """Why a file is refused, in figures, and the cure."""
    cure = "export without --fp16" if fp16 else "--format pt2 or safetensors"
    if parity.agreement == 100:
        cure += f", or --tolerance {2 * parity.max_abs_diff:.1g} if that is close enough for you"
    return (
        "the exported file does not compute what the network does: logits differ by "
        f"{parity.max_abs_diff:.2g}, allowed are {parity.tolerance:.2g} (its own rounding: "
        f"{parity.rounding:.2g})\n"
        f"{parity.agreement:.2f} % of {parity.images} images get the same class\ncure: {cure}"
    )


def images_to_compare(macs: int) -> int:
    """How many images make a comparison that takes seconds, for a network of so many multiply-accumulates."""
    return max(FEWEST, min(MOST, int(MULTIPLY_ACCUMULATES // max(1, macs))))
