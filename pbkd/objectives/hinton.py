"""Knowledge distillation from soft targets (Hinton, Vinyals, Dean 2015)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) of each sample: logits (N, K), labels (N,) int64 -> (N,)."""
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def hinton(
    logits: Tensor, teacher_logits: Tensor, labels: Tensor, alpha: float, temperature: float
) -> Tensor:
    """(1 - a) CE + a T^2 KL(p_t^T || p_s^T) of each sample.

    Args:
        logits: the student's, (N, K).
        teacher_logits: (N, K).
        labels: (N,), int64.
        alpha: weight a of the soft targets, in [0, 1].
        temperature: T > 0 that softens both distributions.

    Returns:
        (N,), float32.
    """
    soft_student = functional.log_softmax(logits.float() / temperature, 1)
    soft_teacher = functional.log_softmax(teacher_logits.float() / temperature, 1)
    divergence = functional.kl_div(soft_student, soft_teacher, reduction="none", log_target=True).sum(1)
    if alpha == 1.0:
        return temperature**2 * divergence
    return (1 - alpha) * cross_entropy(logits, labels) + alpha * temperature**2 * divergence
