"""The latency of a pipeline's networks: each architecture measured once, when everything else is quiet."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass

from pbkd import artifact
from pbkd.errors import first_line
from pbkd.measure import compiled, measure_latency
from pbkd.networks import AnySpec, BlockNetwork, fresh
from pipelines.jobs import processor, versions
from pipelines.manifest import Manifest
from pipelines.recipe import Compute
from pipelines.store import Store

log = logging.getLogger(__name__)

Milliseconds = dict[str, float | None]
"""By name of the timing; None: it was tried, and does not work here."""


@dataclass(frozen=True)
class Timing:
    """What is timed: batches of so many images, at least so often and for so many seconds."""

    batch: int
    is_compiled: bool
    warm_up: int
    repeats: int
    seconds: float = 0.2


TIMINGS = {
    "latency_ms": Timing(1, is_compiled=False, warm_up=5, repeats=30),
    "latency_ms_batch32": Timing(32, is_compiled=False, warm_up=1, repeats=5),
    "latency_ms_compiled": Timing(1, is_compiled=True, warm_up=5, repeats=30),
    "latency_ms_batch32_compiled": Timing(32, is_compiled=True, warm_up=1, repeats=5),
}


class Latencies:
    """The latencies of the networks of one store, on this machine, with a recipe's `compute`.

    A latency belongs to an architecture, not to weights: stages, seeds and recipes that share it share what
    was measured, in the store.
    """

    def __init__(self, store: Store, compute: Compute) -> None:
        self._store, self._threads = store, compute.worker_threads
        self._machine = f"{processor()} / {self._threads} threads / torch {versions()['torch']}"
        self._wanted = {
            name: timing
            for name, timing in TIMINGS.items()
            if compute.measure_compiled or not timing.is_compiled
        }
        self._has_warned = False

    def of(self, manifest: Manifest) -> Milliseconds:
        """What is known of a stage's network: medians, in milliseconds."""
        return self._known(self._spec(manifest))

    def are_measured(self, manifests: Iterable[Manifest]) -> bool:
        """Whether all that is wanted is known of the networks of `manifests`."""
        return all(self._wanted.keys() <= self.of(manifest).keys() for manifest in manifests)

    def measure(self, manifests: Iterable[Manifest]) -> None:
        """Measure what is not known yet. Nothing else should run on this machine."""
        for spec in dict.fromkeys(map(self._spec, manifests)):
            known = self._known(spec)
            missing = {name: timing for name, timing in self._wanted.items() if name not in known}
            if missing:
                network = fresh(spec, 0).eval().requires_grad_(False)
                found = {name: self._time(network, timing) for name, timing in missing.items()}
                self._store.add_latencies(spec.digest, self._machine, found)

    def _known(self, spec: AnySpec) -> Milliseconds:
        found = self._store.latencies(spec.digest, self._machine)
        return {name: None if latency is None else latency["median_ms"] for name, latency in found.items()}

    def _spec(self, manifest: Manifest) -> AnySpec:
        return artifact.read(self._store.artifact(manifest.artifact)).spec

    def _time(self, network: BlockNetwork, timing: Timing) -> dict[str, float] | None:
        cache = self._store.root / "cache" / "inductor"
        try:
            with compiled(network, cache) if timing.is_compiled else nullcontext(network) as timed:
                latency = measure_latency(
                    timed,
                    network.spec.input_shape,
                    timing.batch,
                    self._threads,
                    timing.warm_up,
                    timing.repeats,
                    timing.seconds,
                )
        except RuntimeError as error:
            if not timing.is_compiled:
                raise
            if not self._has_warned:
                log.warning("torch.compile does not work here, no latency by it: %s", first_line(error))
            self._has_warned = True
            return None
        return asdict(latency)
