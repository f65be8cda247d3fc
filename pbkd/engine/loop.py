"""The only training loop. It knows nothing of stages: it is handed the parts of a step and an objective."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pbkd.engine.session import Session, Stopped
from pbkd.engine.settings import Precision, TrainingSettings
from pbkd.engine.state import Row, apply, capture
from pbkd.errors import StageError
from pbkd.networks import fold_norms

NEVER = 2**62


class Reader(Protocol):
    """The training data (docs/architecture.md, data contract)."""

    def __len__(self) -> int: ...  # noqa: D105
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...  # noqa: D105
    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch the next iteration goes through."""

    def resume_at(self, batch: int) -> None:
        """Let the next iteration start at this batch."""

    def global_count(self, batch: int) -> int:
        """Samples of this batch over all ranks."""


class Objective(Protocol):
    """What is minimized: one value per sample for `loss`, and for whatever else is worth reporting."""

    def __call__(
        self, output: Tensor, logits: Tensor, target: Tensor, labels: Tensor
    ) -> Mapping[str, Tensor]:
        """Trained part's output, logits (N, K), teacher's output, labels (N,) -> {"loss": (N,), ...}."""


@dataclass(frozen=True)
class Task:
    """The parts of a step: teacher(...) -> target; prefix -> trained -> suffix -> logits.

    Attributes:
        trained: the only module whose weights change, and the only one wrapped for data parallelism.
        objective: compares output and logits with target and labels.
        prefix: frozen part before `trained`; images go in. None: images go straight to `trained`.
        suffix: frozen part behind `trained`, through which gradients pass. None: its output is the logits.
        teacher: frozen; gives the target.
        teacher_input: what the teacher gets: the `images`, or the `prefix` output that the trained part gets too.
        training_mode: False keeps BatchNorm statistics and dropout of the trained part off (LP-FT).
    """

    trained: nn.Module
    objective: Objective
    prefix: nn.Module | None = None
    suffix: nn.Module | None = None
    teacher: nn.Module | None = None
    teacher_input: Literal["images", "prefix"] = "images"
    training_mode: bool = True


def fit(
    task: Task,
    settings: TrainingSettings,
    reader: Reader,
    session: Session,
    seed: int,
    precision: Precision | None = None,
    validate: Callable[[], Mapping[str, float]] | None = None,
) -> list[Row]:
    """Train `task.trained` in place and return the history, one row an epoch (or part of one).

    Killed and started again with the same session folder, it goes on from the last checkpoint and ends with the same
    weights.

    Raises:
        StageError: the loss is not finite; names the step. The last checkpoint before it is kept.
        Stopped: the session asked for it; the state is saved.
    """
    precision = precision or Precision()
    device, layout = (
        session.device,
        torch.channels_last if precision.channels_last else torch.contiguous_format,
    )
    steps_per_epoch = len(reader)
    steps = settings.total_steps(steps_per_epoch)
    if steps == 0:
        return []
    trained = task.trained.to(device, memory_format=layout).requires_grad_(True)
    prefix, suffix, teacher = (
        _frozen(part, device, layout) for part in (task.prefix, task.suffix, task.teacher)
    )
    optimizer = settings.optimizer.build(trained)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.precision == "fp16")
    history: list[Row] = []
    step = 0
    sums: dict[str, Tensor] = {}
    counted = 0
    if (state := session.restore()) is not None:
        apply(state, trained, optimizer, scaler)
        step, history = state.step, state.history
        if (
            session.rank == 0
        ):  # the sums of the epoch so far; the other ranks' are lost, and only shift its mean
            counted = state.numbers["counted"]
            sums = {
                name: torch.tensor(value, dtype=torch.float64, device=device)
                for name, value in state.numbers["sums"].items()
            }
    wrapped = _data_parallel(trained, session)
    first_bad = torch.tensor(NEVER, device=device)

    def save() -> None:
        _check_finite(first_bad)
        state = capture(step, trained, optimizer, scaler, history)
        state.numbers["counted"] = counted
        state.numbers["sums"] = {name: float(value) for name, value in sums.items()}
        session.save(state)

    while step < steps:
        epoch, batch = divmod(step, steps_per_epoch)
        trained.train(task.training_mode)
        reader.set_epoch(epoch)
        reader.resume_at(batch)
        for images, labels in reader:
            images = images.contiguous(memory_format=layout)
            _seed_step(seed, step, session.rank)
            rate = settings.optimizer.rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with precision.autocast(device):
                with torch.no_grad():
                    inputs = prefix(images) if prefix is not None else images
                    target = inputs
                    if teacher is not None:
                        target = teacher(inputs if task.teacher_input == "prefix" else images)
                output = wrapped(inputs)
                logits = suffix(output) if suffix is not None else output
            losses = task.objective(output, logits, target, labels)
            share = session.world_size / reader.global_count(batch)
            loss = losses["loss"].sum() * share
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            if settings.optimizer.clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(trained.parameters(), settings.optimizer.clip)
            scaler.step(optimizer)
            scaler.update()
            for name, values in losses.items():
                value = values.detach().double().sum()
                sums[name] = sums[name] + value if name in sums else value
            first_bad = torch.where(torch.isfinite(loss.detach()), first_bad, first_bad.clamp_max(step))
            counted += len(labels)
            step, batch = step + 1, batch + 1
            if step >= steps:
                break
            if session.due():
                save()
            if session.should_stop():
                save()
                raise Stopped(f"stopped at step {step} of {steps}")
        _check_finite(first_bad)
        row = _row(step, step / steps_per_epoch, sums, counted, session)
        if validate is not None:
            row.update(validate())
        history.append(row)
        session.report(row)
        sums, counted = {}, 0
    trained.eval().requires_grad_(False)
    return history


def _frozen(part: nn.Module | None, device: torch.device, layout: torch.memory_format) -> nn.Module | None:
    """A private copy in eval mode, without gradients to its weights, BatchNorm folded into the convolutions."""
    if part is None:
        return None
    part = copy.deepcopy(part).eval().requires_grad_(False)
    return fold_norms(part).to(device, memory_format=layout).requires_grad_(False)


def _data_parallel(trained: nn.Module, session: Session) -> nn.Module:
    if session.world_size == 1:
        return trained
    if session.device.type == "cuda":
        trained = nn.SyncBatchNorm.convert_sync_batchnorm(trained)
    return DistributedDataParallel(trained)


def _seed_step(seed: int, step: int, rank: int) -> None:
    """torch's own generators (dropout) as a function of position, so that resuming needs no generator state."""
    torch.manual_seed((seed * 1_000_003 + step * 8_191 + rank) % 2**63)


def _check_finite(first_bad: Tensor) -> None:
    if (step := int(first_bad)) < NEVER:
        raise StageError(
            f"the loss is not finite at step {step}; lower the learning rate or clip the gradient"
        )


def _row(step: int, epoch: float, sums: Mapping[str, Tensor], counted: int, session: Session) -> Row:
    names = sorted(sums)
    totals = torch.stack([sums[name] for name in names] + [sums[names[0]].new_tensor(float(counted))])
    *values, count = session.sum(totals).tolist()
    row: Row = {"time": time.time(), "step": step, "epoch": round(epoch, 4)}
    row.update({f"train_{name}": value / count for name, value in zip(names, values, strict=True)})
    return row
