"""What the training loop is handed: the parts of a step, the objective, and a reader of batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from pbkd.engine.mask import Mask
from pbkd.engine.watch import Watch


class Reader(Protocol):
    """The training data (docs/architecture.md, data contract)."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch the next iteration goes through."""

    def resume_at(self, batch: int) -> None:
        """Let the next iteration start at this batch."""

    def global_count(self, batch: int) -> int:
        """Samples of this batch over all ranks."""


class Objective(Protocol):
    """What is minimized: one value per sample for `loss`, and for whatever else is worth reporting."""

    def __call__(self, output: Any, logits: Any, target: Any, labels: Tensor) -> Mapping[str, Tensor]:
        """Trained part's output, suffix's, teacher's, labels (N,) -> {"loss": (N,), ...}.

        Outputs are what the parts give: a tensor, or a tuple of features; without a suffix, `logits` is
        `output`.
        """


@dataclass(frozen=True)
class Task:
    """The parts of a step: teacher(...) -> target; prefix -> trained -> suffix -> logits.

    The frozen parts are copied before anything is changed, so they may share modules with each other and with
    the network that `trained` belongs to.

    Attributes:
        trained: the only module whose weights change, and the only one wrapped for data parallelism.
        objective: compares output and logits with target and labels.
        prefix: frozen part before `trained`; images go in. None: images go straight to `trained`.
        suffix: frozen part behind `trained`, through which gradients pass. None: its output is the logits.
        teacher: frozen; gives the target. None: the target is what `trained` gets.
        teacher_input: what the teacher gets: the `images`, or the `prefix` output that `trained` gets too.
        training_mode: False keeps BatchNorm statistics and dropout of the trained part off (LP-FT).
        mask: weights of the trained part that are to be zero; None: none.
        watch: what to record step by step, in the history alone; None: nothing.
    """

    trained: nn.Module
    objective: Objective
    prefix: nn.Module | None = None
    suffix: nn.Module | None = None
    teacher: nn.Module | None = None
    teacher_input: Literal["images", "prefix"] = "images"
    training_mode: bool = True
    mask: Mask | None = None
    watch: Watch | None = None
