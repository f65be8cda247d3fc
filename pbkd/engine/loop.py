"""The only training loop. It knows nothing of stages: it is handed the parts of a step and an objective."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pbkd.engine.mask import Masking
from pbkd.engine.session import Session, Stopped
from pbkd.engine.settings import OptimizerSettings, Precision, TrainingSettings
from pbkd.engine.state import Row, apply, capture
from pbkd.engine.task import Reader, Task
from pbkd.engine.watch import StepRecord
from pbkd.errors import StageError, UserError
from pbkd.networks import fold_norms

NEVER = 2**62


def fit(
    task: Task,
    settings: TrainingSettings,
    reader: Reader,
    session: Session,
    seed: int,
    precision: Precision | None = None,
    validate: Callable[[], Mapping[str, float]] | None = None,
    ended: Callable[[Sequence[Row]], bool] | None = None,
) -> list[Row]:
    """Train `task.trained` in place and return the history, one row an epoch (or part of one).

    With `task.watch` there is a row a step, of which only those that end an epoch are reported.

    `ended` is asked after each epoch, of the history, whether that was the last one already.

    Killed and started again with the same session folder, it goes on from the last checkpoint and ends with
    the same weights and history.

    Raises:
        UserError: a mask would come into force after the last step.
        StageError: the loss or a weight is not finite; names the step. The checkpoints before it are kept.
        Stopped: the session asked for it; the state is saved.
        OSError: a checkpoint could not be written; those before it are kept.
    """
    steps_per_epoch = len(reader)
    steps = settings.total_steps(steps_per_epoch)
    if steps == 0:
        return []
    if task.mask is not None and task.mask.from_step >= steps:
        raise UserError(f"rewind={task.mask.from_step}: the training is over after {steps} steps; lower it")
    training = _Training(task, settings.optimizer, session, precision or Precision(), seed)
    training.restore()
    try:
        while training.step < steps and not (ended is not None and ended(training.history)):
            epoch, batch = divmod(training.step, steps_per_epoch)
            reader.set_epoch(epoch)
            reader.resume_at(batch)
            for images, labels in reader:
                if session.due(training.step):
                    training.save()
                if session.should_stop():
                    training.save()
                    raise Stopped(f"stopped at step {training.step} of {steps}")
                count = reader.global_count(training.step - epoch * steps_per_epoch)
                training.take_step(images, labels, count, settings.optimizer.rate(training.step, steps))
                if training.step == steps:
                    break
            *between, row = training.end_epoch(steps_per_epoch)
            session.pause()
            if validate is not None:
                row.update(validate())
            training.history += [*between, row]
            session.report(row)
        training.save()  # killed in the evaluation that follows, the stage repeats no step
    finally:
        session.commit()
    training.finish()
    return training.history


class _Training:
    """One training under way: its parts on the device, the optimizer, and the position `step`.

    `sums` and `counted` are this epoch's sums of the objective's values and the samples they are over.
    """

    def __init__(
        self, task: Task, optimizer: OptimizerSettings, session: Session, precision: Precision, seed: int
    ) -> None:
        self.task, self.session, self.precision, self.seed = task, session, precision, seed
        self.device = session.device
        self.layout = torch.channels_last if precision.channels_last else torch.contiguous_format
        self.trained = _placed(task.trained, self.device, self.layout).requires_grad_(True)
        self.prefix = self._frozen(task.prefix)
        self.suffix = self._frozen(task.suffix)
        self.teacher = self._frozen(task.teacher)
        self.clip = optimizer.clip
        self.optimizer = optimizer.build(self.trained)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.precision == "fp16")
        self.step = 0
        self.history: list[Row] = []
        self.sums: dict[str, Tensor] = {}
        self.counted = 0
        self.first_bad = torch.tensor(NEVER, device=self.device)
        self.masking = Masking(task.mask, self.trained) if task.mask is not None else None
        self.record = StepRecord(task.watch, self.device) if task.watch is not None else None

    def _frozen(self, part: nn.Module | None) -> nn.Module | None:
        """A private copy in eval mode, without gradients to its weights, BatchNorm folded."""
        if part is None:
            return None
        part = fold_norms(copy.deepcopy(part).eval())
        return _placed(part, self.device, self.layout).requires_grad_(False)

    def restore(self) -> None:
        """Go on from the session's newest checkpoint, if it has one; then join the other ranks."""
        if (state := self.session.restore()) is not None:
            apply(state, self.trained, self.optimizer, self.scaler)
            self.step, self.history = state.step, state.history
            if (
                self.session.rank == 0
            ):  # the sums of the other ranks are lost, which only shifts this epoch's mean
                self.counted = state.numbers["counted"]
                self.sums = {
                    name: torch.tensor(value, dtype=torch.float64, device=self.device)
                    for name, value in state.numbers["sums"].items()
                }
            if self.record is not None:
                self.record.restore(state.numbers["record"])
        self._require_one_step()
        self.norms = {
            name: module
            for name, module in self.trained.named_modules()
            if isinstance(module, nn.BatchNorm2d)
        }
        self.wrapped = _data_parallel(self.trained, self.session)
        self.trained.train(self.task.training_mode)

    def _require_one_step(self) -> None:
        """Fail if the ranks read different checkpoints, as a network file system may show them."""
        steps = torch.tensor([self.step, -self.step], device=self.device)
        last, first = self.session.max(steps).tolist()
        if last != -first:
            raise RuntimeError(f"the ranks found checkpoints of different steps, {-first} and {last}")

    def save(self) -> None:
        """Hand the state to the session."""
        self._check_finite()
        state = capture(self.step, self.trained, self.optimizer, self.scaler, self.history)
        state.numbers["counted"] = self.counted
        state.numbers["sums"] = {name: float(value) for name, value in self.sums.items()}
        if self.record is not None:
            state.numbers["record"] = self.record.numbers()
        self.session.save(state)

    def take_step(self, images: Tensor, labels: Tensor, global_count: int, rate: float) -> None:
        """One optimizer step on this rank's share of a batch of `global_count` samples; waits for nothing."""
        images = images.contiguous(memory_format=self.layout)
        _seed_generators(self.seed, self.step, self.session.rank, self.device)
        if self.masking is not None:
            self.masking.begin(self.step, self.optimizer)
        with self.precision.autocast(self.device):
            with torch.no_grad():
                inputs = self.prefix(images) if self.prefix is not None else images
                target = inputs
                if self.teacher is not None:
                    target = self.teacher(inputs if self.task.teacher_input == "prefix" else images)
            output = self.wrapped(inputs)
            logits = self.suffix(output) if self.suffix is not None else output
        losses = self.task.objective(output, logits, target, labels)
        # Gradients are averaged over ranks, so this makes them those of the mean over the global batch.
        loss = losses["loss"].sum() * (self.session.world_size / global_count)

        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.masking is not None:
            self.masking.gradients(self.step)
        if self.clip is not None or self.record is not None:
            self.scaler.unscale_(self.optimizer)
        if self.record is not None:
            self.record.gradient(self.step + 1)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.trained.parameters(), self.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()

        for name, values in losses.items():
            value = values.detach().double().sum()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counted += len(labels)
        bad = self.first_bad.clamp_max(self.step)
        self.first_bad = torch.where(torch.isfinite(loss.detach()), self.first_bad, bad)
        self.step += 1
        if self.record is not None:
            self.record.finished(self.step)

    def end_epoch(self, steps_per_epoch: int) -> list[Row]:
        """The rows of single steps, if there are any, and that of the epoch: means over it and all ranks."""
        self._check_finite()
        if (
            self.session.world_size > 1
        ):  # between steps, only rank 0 has the statistics that the next step starts from
            for buffer in self.trained.buffers():
                torch.distributed.broadcast(buffer, 0)
        names = sorted(self.sums)
        totals = torch.stack([self.sums[name] for name in names])
        *values, count = self.session.sum(torch.cat([totals, totals.new_tensor([self.counted])])).tolist()
        self.sums, self.counted = {}, 0
        row: Row = {
            "time": time.time(),
            "step": self.step,
            "epoch": round(self.step / steps_per_epoch, 4),
        }
        row |= {f"train_{name}": value / count for name, value in zip(names, values, strict=True)}
        if self.record is None:
            return [row]
        self.record.finished(self.step, epoch_ends=True)
        *between, last = self.record.rows(steps_per_epoch)
        return [*between, last | row]

    def finish(self) -> None:
        """Leave the trained part as it was found: frozen, in eval mode, in the usual layout."""
        for name, norm in self.norms.items():  # whose tensors a SyncBatchNorm in its place shares
            self.trained.set_submodule(name, norm)
        _placed(self.trained, self.device, torch.contiguous_format).eval().requires_grad_(False)

    def _check_finite(self) -> None:
        if (step := int(self.first_bad)) < NEVER:
            raise StageError(f"the loss is not finite at step {step}; lower the rate or clip the gradient")
        # A gradient may overflow where the loss did not, here or on another rank.
        if not all(bool(tensor.isfinite().all()) for tensor in self.trained.state_dict().values()):
            raise StageError(
                f"a weight is not finite after step {self.step - 1}; lower the rate or clip the gradient"
            )


def _placed(module: nn.Module, device: torch.device, layout: torch.memory_format) -> nn.Module:
    module.to(device)
    module.to(memory_format=layout)  # type: ignore[call-overload]  # an overload that torch does not declare
    return module


def _data_parallel(trained: nn.Module, session: Session) -> nn.Module:
    if session.world_size == 1:
        return trained
    if session.device.type == "cuda":  # there is none for the CPU
        trained = nn.SyncBatchNorm.convert_sync_batchnorm(trained)
    return DistributedDataParallel(trained)


def _seed_generators(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Make torch's own random numbers (dropout) a function of position: resuming needs no generator state."""
    number = (seed * 1_000_003 + step * 8_191 + rank) % 2**63
    # What torch.manual_seed does, at a hundredth of its cost: it formats a stack trace for absent devices.
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
