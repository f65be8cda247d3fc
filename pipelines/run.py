"""The driver: runs a recipe's unfinished stages, each once, and leaves store, journal and MLflow complete."""

from __future__ import annotations

import logging
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pbkd import artifact
from pbkd.errors import StageError, UserError
from pbkd.measure import measure_latency
from pipelines.executors import Executor, RayExecutor, make_executor
from pipelines.graph import Graph, Node, finished, pipeline_id
from pipelines.jobs import Job, StageJob, failure, job_name, processor, versions
from pipelines.journal import Journal
from pipelines.lease import Heartbeat, LeaseWatcher, try_acquire
from pipelines.schedule import next_chain
from pipelines.store import Manifest, Store
from pipelines.tracking import Tracker, default_uri

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
MLFLOW_SECONDS = 60.0
Outcome = Literal["ran", "reused"]


class Display(Protocol):
    """Who watches a run."""

    def started(self, node: Node) -> None:
        """A stage has begun."""

    def progress(self, node: Node, row: dict[str, Any]) -> None:
        """A stage has reported."""

    def finished(self, node: Node, outcome: Outcome, manifest: Manifest) -> None:
        """A stage is finished."""


@dataclass
class PipelineResult:
    """What a run leaves: manifests, outcomes and latencies (milliseconds) by stage name; ids in MLflow."""

    id: str
    graph: Graph
    store: Store
    manifests: dict[str, Manifest]
    outcomes: dict[str, Outcome]
    latencies: dict[str, float]
    seconds: float
    ids: dict[str, Any]


@dataclass
class _Running:
    chain: list[Node]
    leases: list[Any]
    since: float = field(default_factory=time.monotonic)


def run_pipeline(graph: Graph, store: Store, display: Display) -> PipelineResult:
    """Run what is not finished.

    Raises:
        UserError: data or weights are missing, or a stage refused what it got.
        StageError: a stage failed for good. What was finished before stays finished.
    """
    started = time.monotonic()
    for node in graph.nodes.values():
        if node.key is None:
            raise UserError(f"stages.{node.name}: {node.reason}")
    driver = _Driver(graph, store, display)
    tracker = Tracker(graph.recipe.tracking.uri or default_uri(store), store, driver.id)
    try:
        driver.begin()
        tracker.start()
        status = "failed"
        try:
            driver.run()
            latencies = driver.measure()
            status = "finished"
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            driver.record("ended", status=status)
    finally:
        tracker.close(MLFLOW_SECONDS)
    ids = tracker_ids(store, driver.id)
    seconds = time.monotonic() - started
    return PipelineResult(driver.id, graph, store, driver.manifests, driver.outcomes, latencies, seconds, ids)


def tracker_ids(store: Store, identity: str) -> dict[str, Any]:
    """Ids in MLflow of a pipeline and its stages, as far as they are known."""
    from pipelines.tracking import read_ids

    return {"pipeline_run": None, "stages": {}} | read_ids(store, identity)


class _Driver:
    """One run of one pipeline."""

    def __init__(self, graph: Graph, store: Store, display: Display) -> None:
        self.id = pipeline_id(graph)
        self.graph, self.store, self.display = graph, store, display
        self.journal = Journal(store.pipeline(self.id) / "journal.jsonl")
        self.manifests: dict[str, Manifest] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.running: dict[Future[None], _Running] = {}
        self.mine: set[str] = set()  # stages this run has started, by name
        self.foreign: dict[str, LeaseWatcher] = {}  # stages somebody else runs
        self.offsets: dict[str, int] = {}
        self.steps: dict[str, float] = {}

    def record(self, type_: str, **content: Any) -> None:
        """Append to the journal."""
        self.journal.append({"type": type_, "time": time.time(), **content})

    def begin(self) -> None:
        """Say in the journal what is to be run."""
        graph = self.graph
        self.record(
            "pipeline",
            id=self.id,
            name=graph.recipe.name,
            recipe=graph.recipe.model_dump(mode="json"),
            teacher=graph.teacher,
            student=graph.student,
            baselines=list(graph.baselines),
            stages=list(graph.nodes),
        )

    def run(self) -> None:
        """Run every stage that is not finished."""
        for name, manifest in finished(self.graph, self.store).items():
            self._finish(self.graph.nodes[name], manifest)
        if len(self.manifests) == len(self.graph.nodes):
            return
        executor = make_executor(self.graph.recipe.compute, self.store)
        try:
            if isinstance(executor, RayExecutor):
                executor.connect()
            with ThreadPoolExecutor(max_workers=executor.concurrency) as pool, Heartbeat() as heartbeat:
                try:
                    self._loop(executor, pool, heartbeat)
                except BaseException:
                    executor.close()  # before the pool waits for the jobs
                    raise
        finally:
            executor.close()

    def _loop(self, executor: Executor, pool: ThreadPoolExecutor, heartbeat: Heartbeat) -> None:
        try:
            while len(self.manifests) < len(self.graph.nodes):
                self._launch(executor, pool, heartbeat)
                done, _ = wait(self.running, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
                self._observe()
                for future in done:
                    self._conclude(self.running.pop(future), future)
                if not self.running:
                    time.sleep(0 if done else POLL_SECONDS)  # all that is left is being run by somebody else
        finally:
            for running in self.running.values():
                _release(running)

    def _launch(self, executor: Executor, pool: ThreadPoolExecutor, heartbeat: Heartbeat) -> None:
        while len(self.running) < executor.concurrency:
            busy = {node.name for running in self.running.values() for node in running.chain}
            chain = next_chain(self.graph, self.manifests, {*busy, *self.foreign})
            leases = []
            for position, node in enumerate(chain):
                if (lease := self._lease(node)) is None:
                    chain = chain[:position]
                    break
                heartbeat.add(lease)
                leases.append(lease)
            if not chain:
                if not self._retry_foreign():
                    return
                continue
            if any(
                self.store.manifest(lease.key) for lease in leases
            ):  # its last owner had published after all
                _release(_Running(chain, leases))
                self._observe()
                continue
            job = self._job(chain, leases)
            for node in chain:
                failure(self.store, _key(node))  # of an earlier run
            self.mine.update(node.name for node in chain)
            name = job_name(self.graph.recipe.name, [(node.name, _key(node)) for node in chain])
            self._announce(chain[0])
            self.running[pool.submit(executor.run, job, name)] = _Running(chain, leases)

    def _lease(self, node: Node) -> Any:
        key = _key(node)
        watcher = self.foreign.get(node.name) or LeaseWatcher(self.store.root, key)
        lease = try_acquire(self.store.root, key, dead=watcher.dead())
        if lease is None:
            self.foreign[node.name] = watcher
        else:
            self.foreign.pop(node.name, None)
        return lease

    def _retry_foreign(self) -> bool:
        """Whether a stage that somebody else had been running is free now."""
        free = [name for name, watcher in self.foreign.items() if watcher.dead()]
        for name in free:
            del self.foreign[name]
        return bool(free)

    def _job(self, chain: list[Node], leases: list[Any]) -> Job:
        assert self.graph.data_digest is not None, "keys were there, so the data were"
        stages = tuple(
            StageJob(_key(node), node.stage, tuple(self.graph.key_inputs(node)), node.seed, lease)
            for node, lease in zip(chain, leases, strict=True)
        )
        recipe = self.graph.recipe
        return Job(self.store.root, recipe.data, self.graph.data_digest, recipe.compute, stages)

    def _announce(self, node: Node) -> None:
        self.display.started(node)
        self.record(
            "started",
            name=node.name,
            key=node.key,
            kind=node.stage.kind,
            params=node.stage.model_dump(mode="json", exclude={"kind", "from_", "teacher"}),
            inputs=[given.model_dump() for given in self.graph.key_inputs(node)],
        )

    def _observe(self) -> None:
        """See what has happened in the store: reports of running stages, and stages that are finished."""
        for running in self.running.values():
            for position, node in enumerate(running.chain):
                if node.name in self.manifests:
                    continue
                self._read_progress(node)
                manifest = self.store.manifest(_key(node))
                if manifest is None:
                    break
                self._finish(node, manifest)
                if position + 1 < len(running.chain):
                    self._announce(running.chain[position + 1])
        for name in list(self.graph.nodes):
            node = self.graph.nodes[name]
            if (
                name not in self.manifests
                and name not in self.mine
                and (manifest := self.store.manifest(_key(node)))
            ):
                self.foreign.pop(name, None)
                self._finish(node, manifest)

    def _read_progress(self, node: Node) -> None:
        key = _key(node)
        progress = Journal(self.store.root / "work" / key / "progress.jsonl")
        rows, self.offsets[key] = progress.read(self.offsets.get(key, 0))
        for row in rows:
            if row["step"] > self.steps.get(key, -1):  # a stage that resumed may repeat some
                self.steps[key] = row["step"]
                self.record("progress", key=key, row=row)
                self.display.progress(node, row)

    def _finish(self, node: Node, manifest: Manifest) -> None:
        outcome: Outcome = "ran" if node.name in self.mine else "reused"
        if outcome == "reused":
            _warn_of_differences(node.name, manifest)
        self.manifests[node.name], self.outcomes[node.name] = manifest, outcome
        self.record("finished", name=node.name, key=node.key, state=outcome)
        self.display.finished(node, outcome, manifest)

    def _conclude(self, running: _Running, future: Future[None]) -> None:
        """A job has ended: all of it must be published, or something failed."""
        _release(running)
        unfinished = [node for node in running.chain if node.name not in self.manifests]
        for node in unfinished:
            if (left := failure(self.store, _key(node))) is not None:
                raise type(left)(f"stages.{node.name}: {left}")
        future.result()
        if unfinished:
            raise StageError(f"stages.{unfinished[0].name}: its job ended without a result")

    def measure(self) -> dict[str, float]:
        """Latency in milliseconds of every stage's network, one image at a time, now that all is quiet."""
        threads = self.graph.recipe.compute.worker_threads
        name_of_machine = f"{processor()} / {threads} threads / torch {versions()['torch']}"
        latencies = {}
        for name, manifest in self.manifests.items():
            known = self.store.latency(manifest.artifact, name_of_machine)
            if known is None:
                network = artifact.load(self.store.artifact(manifest.artifact))
                found = measure_latency(
                    network, network.spec.input_shape, threads=threads, repeats=30, seconds=0.2
                )
                known = found.median_ms
                self.store.set_latency(manifest.artifact, name_of_machine, known)
            latencies[name] = known
            self.record("latency", key=manifest.key, milliseconds=known)
        return latencies


def _key(node: Node) -> str:
    assert node.key is not None, "a pipeline with unknown keys is refused before it runs"
    return node.key


def _release(running: _Running) -> None:
    for lease in running.leases:
        lease.release()


def _warn_of_differences(name: str, manifest: Manifest) -> None:
    now = versions()
    changed = [
        f"{package} {then} -> {now[package]}"
        for package, then in manifest.versions.items()
        if package in ("torch", "numpy", "torch-pruning") and now.get(package, then) != then
    ]
    if manifest.machine.get("processor") != processor():
        changed.append(f"processor {manifest.machine.get('processor')} -> {processor()}")
    if changed:
        log.warning("stage %s is reused, but was made with other versions: %s", name, ", ".join(changed))
