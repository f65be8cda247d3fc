"""Accuracy, calibration and fidelity to a teacher, over a whole split in one pass."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, nll_loss

from pbkd.measure.modes import evaluating

_BINS = 15
_COUNT, _TOP1, _TOP5, _LOSS, _AGREEMENT, _KL, _FIRST_BIN = range(7)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found over `count` samples.

    top1, top5: percent correct; top5 counts the best min(5, classes).
    loss: mean cross-entropy in nats.
    ece: expected calibration error in percent, 15 bins of equal width.
    agreement: percent of samples for which the teacher predicts the same class; None without a teacher.
    kl: mean KL(teacher || network) at temperature 1, in nats; None without a teacher.
    """

    count: int
    top1: float
    top5: float
    loss: float
    ece: float
    agreement: float | None = None
    kl: float | None = None

    @property
    def nll(self) -> float:
        """Negative log-likelihood in nats: what the calibration literature calls `loss`."""
        return self.loss


def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    teacher: nn.Module | None = None,
    device: torch.device | str = "cpu",
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Evaluation:
    """Evaluate `network` on `batches` of (images (N, C, H, W), labels (N,)), without autocast, in eval mode.

    Sums are kept on `device` in float64 and read once at the end. `reduce` is called once with the vector of
    sums and returns their total over all ranks; every rank calls it, even one that had no batch. Each
    module's training mode is restored. Raises ValueError when there was no sample at all.
    """
    device = torch.device(device)
    sums = torch.zeros(_FIRST_BIN + _BINS, dtype=torch.float64, device=device)
    networks = (network,) if teacher is None else (network, teacher)
    with evaluating(*networks), torch.inference_mode(), torch.autocast(device.type, enabled=False):
        for images, labels in batches:
            images = images.to(device, torch.float32, non_blocking=True)
            labels = labels.to(device, non_blocking=True)
            sums += _sums(network(images), labels, None if teacher is None else teacher(images))
        if reduce is not None:
            sums = reduce(sums)
        totals: list[float] = sums.tolist()
    count = totals[_COUNT]
    if not count:
        raise ValueError("nothing to evaluate: the batches hold no sample")
    gaps = sum(abs(gap) for gap in totals[_FIRST_BIN:])
    return Evaluation(
        count=round(count),
        top1=100 * totals[_TOP1] / count,
        top5=100 * totals[_TOP5] / count,
        loss=totals[_LOSS] / count,
        ece=100 * gaps / count,
        agreement=None if teacher is None else 100 * totals[_AGREEMENT] / count,
        kl=None if teacher is None else totals[_KL] / count,
    )


def _sums(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None) -> Tensor:
    """What one batch adds to the vector of sums. Nothing here waits for the device."""
    log_p = log_softmax(logits.double(), dim=1)
    confidence, predicted = log_p.max(dim=1)
    confidence = confidence.exp()
    correct = (predicted == labels).double()
    best = log_p.topk(min(5, log_p.shape[1]), dim=1).indices
    values = [
        torch.full_like(confidence, 1.0),
        correct,
        (best == labels[:, None]).any(dim=1).double(),
        nll_loss(log_p, labels, reduction="none"),
    ]
    if teacher_logits is None:
        values += [torch.zeros_like(confidence)] * 2
    else:
        log_t = log_softmax(teacher_logits.double(), dim=1)
        values.append((log_t.argmax(dim=1) == predicted).double())
        values.append((log_t.exp() * (log_t - log_p)).sum(dim=1))
    # Of a bin only sum(confidence) - sum(correct) is needed: its size cancels in the mean over all samples.
    bins = (confidence * _BINS).ceil().long().sub_(1).clamp_(0, _BINS - 1)
    members = (bins[:, None] == torch.arange(_BINS, device=bins.device)).double()
    return torch.cat([torch.stack(values).sum(dim=1), (confidence - correct) @ members])
