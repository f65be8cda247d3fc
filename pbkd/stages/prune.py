"""`prune`: remove the least important channels, on Torch-Pruning's dependency graph (Fang et al. 2023).

With `sparsity` single weights are set to zero instead, which makes nothing faster: it is for lottery tickets.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self, cast

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from pbkd.data import DataInfo
from pbkd.errors import UserError
from pbkd.networks import AnySpec, BlockNetwork, NetworkSpec, TracedSpec, cost_of, maskable_weights, spec_of
from pbkd.networks.block_network import ConvLayer, Residual, path_of
from pbkd.networks.channels import narrowed_by_count
from pbkd.networks.spec import BlockSpec, ConvSpec, PadShortcut, ResidualUnit, Unit, layers_of
from pbkd.stages.base import Context, Role, Stage, Unplanned, start_of
from pbkd.stages.prune_foreign import ForeignPruning, prunable_groups, solve_pruned
from pbkd.students import initialize_least_squares

Criterion = Literal["l1", "group_norm", "bn_scale"]
LARGEST_RATIO = 0.95
SEARCH_STEPS = 211
"""Ratios that a target of multiply-accumulates is searched over, `SEARCH_STEP` apart; the last one is 1."""
SEARCH_STEP = LARGEST_RATIO / 200


class Prune(Stage):
    """Prune channels by `ratio`, or until at most the share `macs` of the multiply-accumulates is left.

    Attributes:
        ratio: share of the channels each layer (or, with `ranking: global`, the network) loses.
        macs: share of the multiply-accumulates that may be left; the smallest ratio that reaches it is taken.
        sparsity: share of the weights that are not zero yet that is set to zero, those of smallest magnitude
            in the whole network; channels, biases and norms stay. The next six have no meaning then.
        criterion: `l1` (Li et al. 2017), `group_norm` (L2 norm of the whole coupled group), `bn_scale` (Liu
            et al. 2017; layers without BatchNorm by `l1`).
        ranking: `uniform`: every layer loses the same share; `global`: layers compete.
        scope: `interior` keeps the interface of every block, so that its features can still be compared with
            the teacher's; `all` prunes those channels too.
        round_to: channels left are a multiple of it, for speed; layers not larger than it are left alone.
        init: `inherit`: the channels that are left keep their weights; `least_squares`: the pruned blocks are
            solved in closed form to give the features they had (`pbkd.students.initialize`), on `init_images`
            training images; which channels stay is then its choice, how many of each layer is not.
        recalibrate_images: training images on which BatchNorm statistics are estimated anew; 0: none.
    """

    kind: Literal["prune"] = "prune"
    ratio: Annotated[float, Field(gt=0.0, le=LARGEST_RATIO)] | None = None
    macs: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    sparsity: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    criterion: Criterion = "l1"
    ranking: Literal["uniform", "global"] = "uniform"
    scope: Literal["interior", "all"] = "interior"
    round_to: PositiveInt = 8
    init: Literal["inherit", "least_squares"] = "inherit"
    init_images: PositiveInt = 512
    recalibrate_images: NonNegativeInt = 512

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if [self.ratio, self.macs, self.sparsity].count(None) != 2:
            raise ValueError(
                "give one of ratio (share of channels removed), macs (share of MACs left) and sparsity "
                "(share of single weights set to zero)"
            )
        of_channels = ("criterion", "ranking", "scope", "round_to", "init", "init_images")
        fields = type(self).model_fields
        if self.sparsity is not None and any(getattr(self, n) != fields[n].default for n in of_channels):
            raise ValueError(f"sparsity sets single weights to zero; leave out {', '.join(of_channels)}")
        if self.init == "least_squares" and self.scope == "all":
            raise ValueError(
                "init=least_squares fits the features that blocks had, but scope=all changes their channels; "
                "prune with scope=interior"
            )
        if self.recalibrate_images == 1:
            raise ValueError("recalibrate_images is 0 or at least 2: one image has no variance")
        return self

    def smoke(self) -> Self:
        """Few images."""
        images = {name: min(getattr(self, name), 32) for name in ("init_images", "recalibrate_images")}
        return self.model_copy(update=images)

    def plan(self, inputs: Mapping[Role, AnySpec], info: DataInfo) -> AnySpec:
        """The pruned architecture, where it does not depend on the weights."""
        spec = start_of(inputs, info, "the network to prune")
        if self.sparsity is not None:
            return spec
        self._check(spec)
        if self.ranking == "global":
            if self.macs is not None:
                self._check_least(cost_of(self._narrowed(spec, 1.0)).macs, cost_of(spec).macs)
            raise Unplanned("which layers lose channels depends on the weights")
        return self._narrowed(spec, self._uniform_ratio(spec))

    def keeps_interfaces(self) -> bool:
        """With `scope: interior`."""
        return self.scope == "interior"

    def run(self, context: Context) -> BlockNetwork:
        """Prune, then estimate BatchNorm statistics anew; both steps are judged on the validation split."""
        given = context.inputs["from"]
        context.metrics.update(_named(context.validate(given), "before"))
        if self.sparsity is None and isinstance(given.spec, TracedSpec):
            network = self._pruned_foreign(given.cpu(), given.spec, context)
        elif self.sparsity is None:
            self._check(given.spec)
            network = self._pruned(given.cpu())
            if self.init == "least_squares":
                solve_blocks(network, given, context.images(self.init_images).cpu(), context.seed)
        else:
            network = copy.deepcopy(given.cpu())
            zero_smallest(network, self.sparsity)
        context.metrics.update(_named(context.validate(network), "pruned"))
        if self.recalibrate_images:
            estimate_norms(network, context.images(self.recalibrate_images), context.data.settings.batch_size)
        return network.eval().requires_grad_(False)

    def _pruned_foreign(self, given: BlockNetwork, spec: TracedSpec, context: Context) -> BlockNetwork:
        pruning = ForeignPruning.of(given, spec, self.scope, self.criterion)
        ratio = self.ratio or self._smallest_ratio(
            cost_of(spec).macs,
            lambda ratio: (
                cost_of(pruning.spec(pruning.removed(self._channels_left(pruning.scores, ratio)))).macs
            ),
        )
        removed = pruning.removed(self._channels_left(pruning.scores, ratio))
        network = pruning.without(removed)
        if self.init == "least_squares":
            images = context.images(self.init_images).cpu()
            solve_pruned(network, given, removed, images, context.seed)
        return network

    def _check(self, spec: AnySpec) -> None:
        if isinstance(spec, TracedSpec):
            prunable_groups(spec, self.scope)
            return
        units = [unit for block in spec.blocks for unit in block.units]
        if self.criterion == "bn_scale" and not any(
            layer.norm for unit in units for layer in layers_of(unit)
        ):
            raise UserError(f"criterion=bn_scale: {spec.arch} has no BatchNorm; use l1 or group_norm")
        padded = any(
            isinstance(unit, ResidualUnit) and isinstance(unit.shortcut, PadShortcut) for unit in units
        )
        if self.scope == "all" and padded:
            raise UserError(
                f"scope=all: {spec.arch} pads channels in its shortcuts (option A), which fixes them; "
                "use scope=interior, or network.shortcut=B"
            )

    def _uniform_ratio(self, spec: AnySpec) -> float:
        if self.ratio is not None:
            return self.ratio
        return self._smallest_ratio(
            cost_of(spec).macs, lambda ratio: cost_of(self._narrowed(spec, ratio)).macs
        )

    def _narrowed(self, spec: AnySpec, ratio: float) -> AnySpec:
        """What uniform pruning leaves, from the spec alone."""

        def left(channels: int) -> int:
            return _left(channels, ratio, self.round_to)

        if isinstance(spec, TracedSpec):
            return narrowed_by_count(spec, prunable_groups(spec, self.scope), left)
        return _narrowed(spec, left, left if self.scope == "all" else int)

    def _smallest_ratio(self, macs: int, macs_left: Callable[[float], int]) -> float:
        assert self.macs is not None
        low, high = 0, SEARCH_STEPS
        self._check_least(macs_left(1.0), macs)
        while high - low > 1:
            middle = (low + high) // 2
            if macs_left(middle * SEARCH_STEP) <= self.macs * macs:
                high = middle
            else:
                low = middle
        return min(1.0, high * SEARCH_STEP)

    def _check_least(self, least: int, macs: int) -> None:
        assert self.macs is not None
        if least > self.macs * macs:
            raise UserError(
                f"macs={self.macs:g}: pruning with scope={self.scope}, round_to={self.round_to} can leave no "
                f"less than {least / macs:.3f} of the MACs; raise macs, or lower round_to"
            )

    def _pruned(self, given: BlockNetwork) -> BlockNetwork:
        if self.ratio is not None:
            return self._pruned_by(given, self.ratio)
        if self.ranking == "uniform":
            return self._pruned_by(given, self._uniform_ratio(given.spec))
        ratio = self._smallest_ratio(
            cost_of(given.spec).macs, lambda ratio: cost_of(self._pruned_by(given, ratio).spec).macs
        )
        return self._pruned_by(given, ratio)

    def _pruned_by(self, given: BlockNetwork, ratio: float) -> BlockNetwork:
        import torch_pruning

        network = copy.deepcopy(given).eval().requires_grad_(True)  # the graph is traced through autograd
        kept_interfaces = list(_interfaces(network)) if self.scope == "interior" else [_last_linear(network)]
        graph = torch_pruning.DependencyGraph().build_dependency(
            network, torch.zeros(1, *given.spec.input_shape)
        )
        groups = list(
            graph.get_all_groups(ignored_layers=kept_interfaces, root_module_types=[nn.Conv2d, nn.Linear])
        )
        scores = [self._scores(group) for group in groups]
        for group, score, left in zip(groups, scores, self._channels_left(scores, ratio), strict=True):
            if left < len(score):
                weakest = score.argsort(stable=True)[: len(score) - left].sort().values.tolist()
                root = group[0].dep
                graph.get_pruning_group(root.target.module, root.handler, weakest).prune()
        network.spec = spec_of(network)
        return network.requires_grad_(False)

    def _channels_left(self, scores: list[Tensor], ratio: float) -> list[int]:
        if self.ranking == "uniform":
            return [_left(len(score), ratio, self.round_to) for score in scores]
        normalized = [score / score.mean().clamp_min(1e-12) for score in scores]
        everything = torch.cat(normalized)
        threshold = everything.sort().values[min(len(everything) - 1, int(ratio * len(everything)))]
        shares = [float((score < threshold).double().mean()) for score in normalized]
        return [_left(len(score), share, self.round_to) for score, share in zip(scores, shares, strict=True)]

    def _scores(self, group: Any) -> Tensor:
        """Importance of each channel of a coupled group (torch_pruning's), (channels,)."""
        from torch_pruning.pruner.importance import BNScaleImportance, GroupMagnitudeImportance

        by_filter = GroupMagnitudeImportance(p=1, group_reduction="first", normalizer=None)
        match self.criterion:
            case "l1":
                scores = by_filter(group)
            case "group_norm":
                scores = GroupMagnitudeImportance(p=2, normalizer=None)(group)
            case "bn_scale":
                scores = BNScaleImportance(normalizer=None)(group)
                scores = by_filter(group) if scores is None else scores
        return cast(Tensor, scores).detach()


@torch.no_grad()
def solve_blocks(network: BlockNetwork, given: BlockNetwork, images: Tensor, seed: int) -> None:
    """Solve the blocks of `network`, in place, one after the other, for those of `given`, on `images`."""
    mine, others = network.stem(images), given.stem(images)
    for block, old, pool in zip(network.blocks, given.blocks, given.poolings, strict=True):
        initialize_least_squares(block, old, mine, others, seed)
        mine, others = pool(block(mine)), pool(old(others))


@torch.no_grad()
def zero_smallest(network: BlockNetwork, share: float) -> None:
    """Of the n weights of `network` that are not zero, set the floor(`share` * n) smallest to zero."""
    weights = list(maskable_weights(network).values())
    flat = nn.utils.parameters_to_vector(weights)
    alive = int(torch.count_nonzero(flat))
    order = flat.abs().argsort(stable=True)  # those that are zero already come first
    flat[order[: len(flat) - alive + int(share * alive)]] = 0.0
    nn.utils.vector_to_parameters(flat, weights)


@torch.no_grad()
def estimate_norms(network: BlockNetwork, images: Tensor, batch_size: int) -> None:
    """Estimate the BatchNorm statistics of `network`, in place: means over batches of `images`."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    network.to(images.device).eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    for batch in images.split(max(2, batch_size)):
        if len(batch) > 1:  # one image has no variance
            network(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _left(channels: int, ratio: float, round_to: int) -> int:
    """Channels left of `channels`: the nearest multiple of `round_to`, never none."""
    if channels <= round_to:
        return channels
    return min(channels, max(round_to, math.floor((1 - ratio) * channels / round_to + 0.5) * round_to))


def _narrowed(spec: NetworkSpec, left: Callable[[int], int], joint: Callable[[int], int]) -> NetworkSpec:
    """`spec` with `left(n)` of n channels everywhere, but `joint(n)` where blocks and branches meet."""

    def path(
        layers: tuple[ConvSpec, ...], given: int, inside: Callable[[int], int] = left
    ) -> tuple[ConvSpec, ...]:
        narrowed = []
        for number, layer in enumerate(layers, 1):
            gives = (joint if number == len(layers) else inside)(layer.out_channels)
            narrowed.append(layer.model_copy(update={"in_channels": given, "out_channels": gives}))
            given = gives
        return tuple(narrowed)

    def unit(before: Unit, given: int) -> Unit:
        if not isinstance(before, ResidualUnit):
            return before.model_copy(update={"layers": path(before.layers, given)})
        shortcut = before.shortcut
        if isinstance(shortcut, ConvSpec):
            (shortcut,) = path((shortcut,), given)
        return before.model_copy(update={"branch": path(before.branch, given), "shortcut": shortcut})

    stem = path(spec.stem.layers, spec.input_shape[0], inside=joint)
    channels = stem[-1].out_channels if stem else spec.input_shape[0]
    blocks = []
    for block in spec.blocks:
        units = []
        for before in block.units:
            units.append(unit(before, channels))
            channels = layers_of(units[-1])[-1].out_channels
        blocks.append(BlockSpec(units=tuple(units)))
    first, *hidden, last = spec.classifier.widths
    features = first // spec.blocks[-1].out_channels * channels
    widths = (features, *map(left, hidden), last)
    return spec.model_copy(
        update={
            "stem": spec.stem.model_copy(update={"layers": stem}),
            "blocks": tuple(blocks),
            "classifier": spec.classifier.model_copy(update={"widths": widths}),
        }
    )


def _interfaces(network: BlockNetwork) -> Iterator[nn.Module]:
    """The layers whose outputs are an interface: the stem's, every unit's last, shortcuts, logits."""
    yield from (layer.conv for layer in network.stem.children() if isinstance(layer, ConvLayer))
    for unit in (unit for block in network.blocks for unit in block.children()):
        yield path_of(unit)[-1].conv
        if isinstance(unit, Residual) and isinstance(unit.shortcut, ConvLayer):
            yield unit.shortcut.conv
    yield _last_linear(network)


def _last_linear(network: BlockNetwork) -> nn.Module:
    return [module for module in network.classifier if isinstance(module, nn.Linear)][-1]


def _named(metrics: Mapping[str, float], moment: str) -> dict[str, float]:
    return {f"{name}_{moment}": value for name, value in metrics.items()}
