"""What every stage is: settings that say what it does, the network it will give, and how it makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, Field
from torch import Tensor, nn

from pbkd.data import Data, DataInfo, Reader
from pbkd.engine import Precision, Row, Session, Task, TrainingSettings, Watch, fit
from pbkd.engine.settings import Settings
from pbkd.errors import UserError
from pbkd.measure import FeatureDrift, evaluate
from pbkd.networks import AnySpec, BlockNetwork
from pbkd.objectives import cross_entropy

SMOKE_STEPS = 4
SHOCK_IMAGES = 256
Role = str
"""What an input is to a stage: `from`, the network it starts with, or `teacher`."""


class Unplanned(Exception):  # noqa: N818  # not an error
    """What a stage gives cannot be known before it has run; the text says why."""


@dataclass
class Context:
    """What a running stage has at hand.

    Attributes:
        session: the machine.
        inputs: networks by role, on the CPU, frozen, in eval mode.
        data: the open data set.
        seed: of this stage.
        precision: of training.
        history: rows of the stage's training, for its manifest.
        metrics: what the stage itself measured.
    """

    session: Session
    inputs: Mapping[Role, BlockNetwork]
    data: Data
    seed: int
    precision: Precision
    history: list[Row] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)

    def reader(self, split: str, *, training: bool = False) -> Reader:
        """A reader of `split` for this rank: shuffled and augmented for training, else in fixed order."""
        settings = self.data.settings
        return self.data.reader(
            split,
            settings.batch_size if training else settings.eval_batch_size,
            self.seed,
            rank=self.session.rank,
            world=self.session.world_size,
            device=self.session.device,
            augment=training,
            shuffle=training,
            channels_last=training and self.precision.channels_last,
        )

    def images(self, count: int) -> Tensor:
        """The first `count` training images in this stage's order, unaugmented, the same on every rank."""
        reader = self.data.reader(
            "train", min(count, self.data.sizes["train"]), self.seed, device=self.session.device, shuffle=True
        )
        try:
            return next(iter(reader))[0]
        finally:
            reader.close()

    def train(
        self,
        network: BlockNetwork,
        task: Task,
        settings: TrainingStage,
        ended: Callable[[Sequence[Row]], bool] | None = None,
    ) -> None:
        """Train `task`, a part of `network`, in place; validate `network` after each epoch; see `fit`."""
        if settings.shock:
            task = replace(task, watch=self._features_of(network))
        reader = self.reader("train", training=True)
        try:
            self.history += fit(
                task,
                settings,
                reader,
                self.session,
                self.seed,
                self.precision,
                lambda: self.validate(network),
                ended,
            )
        finally:
            reader.close()
        if settings.shock:
            self._summarize_shock()

    def _features_of(self, network: BlockNetwork) -> Watch:
        """The feature extractor's gradient, and how like its features are to those at the start."""
        images = self.images(SHOCK_IMAGES)
        drift = FeatureDrift(network.to(self.session.device), network.features, images)
        return Watch(nn.ModuleList([network.stem, network.blocks]), drift)

    def _summarize_shock(self) -> None:
        for name, worst in (("gradient_norm", max), ("feature_cka", min)):
            if values := [row[name] for row in self.history if name in row]:
                self.metrics |= {name: values[-1], f"{name}_{worst.__name__}": worst(values)}

    def validate(self, network: BlockNetwork) -> dict[str, float]:
        """Accuracy (percent) and loss on the validation split, over all ranks; empty without one."""
        if not self.data.sizes["val"]:
            return {}
        device, reader = self.session.device, self.reader("val")
        try:
            found = evaluate(network.to(device), reader, device=device, reduce=self.session.sum)
        finally:
            reader.close()
        return {"val_accuracy": found.top1, "val_loss": found.loss}


class Stage(Settings):
    """Base of the stage kinds: a description, and how to carry it out.

    Attributes:
        from_: (`from` in a recipe) the stage whose network this one starts with; default: the one before it.
        teacher: the stage whose network teaches; default: the recipe's teacher.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    VERSION: ClassVar[int] = 1
    """Raised by hand when the same settings and inputs begin to give other weights; part of the stage key."""

    kind: str
    from_: str | None = Field(default=None, alias="from")
    teacher: str | None = None

    def needs_from(self) -> bool:
        """Whether the stage starts with another stage's network."""
        return True

    def semantic(self) -> dict[str, Any]:
        """The settings that change the result, for the stage key: no names of stages, no paths.

        Raises:
            UserError: something that belongs to the result, such as a weights file, is not there.
        """
        return self.model_dump(mode="json", exclude={"kind", "from_", "teacher"})

    def plan(self, inputs: Mapping[Role, AnySpec], info: DataInfo) -> AnySpec:
        """The architecture the stage will give, from those it gets.

        Raises:
            UserError: the settings do not fit the architecture.
            Unplanned: it depends on what only running the stage can tell.
        """
        raise NotImplementedError

    def compares_features(self) -> bool:
        """Whether it compares features of blocks with the teacher's, block by block."""
        return False

    def keeps_interfaces(self) -> bool:
        """Whether the blocks it gives have the interfaces of those it gets."""
        return True

    def check_lineage(self, since_teacher: Sequence[Stage]) -> None:
        """Refuse what the planned architectures cannot tell.

        Args:
            since_teacher: the stages the network went through since it was the teacher's, oldest first.

        Raises:
            UserError: features are compared, but a stage among them changed the blocks' interfaces.
        """
        if self.compares_features() and not all(stage.keeps_interfaces() for stage in since_teacher):
            raise UserError(
                f"{self.kind} compares features with the teacher's, but prune with scope=all changed the "
                "channels between blocks; prune with scope=interior, or compare logits alone"
            )

    def run(self, context: Context) -> BlockNetwork:
        """Carry the stage out; the network it gives. Every rank calls it and gets the same weights."""
        raise NotImplementedError

    def smoke(self) -> Self:
        """The same stage, shrunk to a few steps."""
        return self


class TrainingStage(Stage, TrainingSettings):
    """Base of the stages that train.

    Attributes:
        shock: record gradient shock: at every step the norm of the feature extractor's gradient; now and then
            linear CKA of its features with those at the start, on `SHOCK_IMAGES` training images.
    """

    shock: bool = False

    def smoke(self) -> Self:
        """At most `SMOKE_STEPS` steps."""
        if self.epochs == 0 or (self.steps is not None and self.steps <= SMOKE_STEPS):
            return self
        return self.model_copy(update={"epochs": None, "steps": SMOKE_STEPS})


def same_task(spec: AnySpec, info: DataInfo, what: str) -> AnySpec:
    """`spec`, if it takes the data's images and knows its classes.

    Raises:
        UserError: it does not.
    """
    if spec.num_classes != info.num_classes:
        raise UserError(f"{what} has {spec.num_classes} classes, but {info.name} has {info.num_classes}")
    if spec.input_shape != info.input_shape:
        raise UserError(f"{what} takes images {spec.input_shape}, but {info.name} has {info.input_shape}")
    return spec


def start_of(inputs: Mapping[Role, AnySpec], info: DataInfo, what: str) -> AnySpec:
    """The architecture of `from`, which `what` names in errors, if it and the teacher fit the data.

    Raises:
        UserError: one of them does not.
    """
    if "teacher" in inputs:
        same_task(inputs["teacher"], info, "the teacher")
    return same_task(inputs["from"], info, what)


def label_objective(output: Tensor, logits: Tensor, target: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Cross-entropy alone."""
    return {"loss": cross_entropy(logits, labels)}
