"""The driver: gives stages that are ready to an executor, each under its lease; records what happens."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Literal, Protocol

from pbkd.errors import StageError
from pipelines.executors import Executor
from pipelines.graph import Graph, Node, finished, pipeline_id
from pipelines.jobs import PROGRESS, Job, StageJob, failure, job_name, processor, versions
from pipelines.journal import Journal
from pipelines.lease import Heartbeat, Lease, LeaseWatcher, try_acquire
from pipelines.manifest import Manifest
from pipelines.schedule import next_chain
from pipelines.store import Store

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
END_SECONDS = 20.0
Outcome = Literal["ran", "reused"]


class Display(Protocol):
    """Who watches a run."""

    def started(self, node: Node) -> None:
        """A stage has begun."""

    def progress(self, node: Node, row: Mapping[str, Any]) -> None:
        """A stage has reported."""

    def finished(self, node: Node, outcome: Outcome, manifest: Manifest) -> None:
        """A stage is finished."""


class Driver:
    """One run of one pipeline: what of it is finished, what runs here, and what runs elsewhere.

    What is finished already is taken over at once; nothing is recorded before `begin`.

    Attributes:
        manifests, outcomes: of the finished stages, by name.
    """

    def __init__(self, graph: Graph, store: Store, journal: Journal, display: Display) -> None:
        self.manifests: dict[str, Manifest] = {}
        self.outcomes: dict[str, Outcome] = {}
        self._graph, self._store, self._journal, self._display = graph, store, journal, display
        self._running: dict[Future[None], list[Node]] = {}
        self._held: dict[str, Lease] = {}  # by key
        self._mine: set[str] = set()  # stages given to the executor, by name
        self._elsewhere: dict[str, LeaseWatcher] = {}  # stages that somebody else had the lease of, by name
        self._offsets: dict[str, int] = {}  # into the progress files, by key
        # What earlier runs of this pipeline have recorded of a stage that is resumed is not recorded again.
        self._steps: dict[str, float] = {
            record["key"]: record["row"]["step"]
            for record in journal.read()[0]
            if record.get("type") == "progress"
        }
        for name, manifest in finished(graph, store).items():
            self._take_over(graph.nodes[name], manifest)

    @property
    def is_done(self) -> bool:
        """Whether every stage is finished."""
        return len(self.manifests) == len(self._graph.nodes)

    def record(self, type_: str, **content: Any) -> None:
        """Append to the journal."""
        self._journal.append({"type": type_, **content})

    def begin(self, **content: Any) -> None:
        """Record what is to be run, and what of it is finished; `content` is for the first record."""
        graph = self._graph
        known = {
            "id": pipeline_id(graph),
            "name": graph.recipe.name,
            "recipe": graph.recipe.model_dump(mode="json"),
            "teacher": graph.teacher,
            "student": graph.student,
            "baselines": list(graph.baselines),
            "stages": list(graph.nodes),
        }
        self.record("pipeline", **(known | content))
        for name in self.manifests:
            self._record_end(graph.nodes[name])

    def run(self, executor: Executor, is_stopped: Callable[[], bool] = lambda: False) -> None:
        """Run every stage that is not finished, then close `executor`.

        Raises:
            KeyboardInterrupt: `is_stopped`, asked every moment, said so; trainings have kept their state.
            UserError: a stage refused what it got.
            StageError: a stage failed for good. What was finished before stays finished.
        """
        try:
            with Heartbeat() as heartbeat:
                try:
                    # A stage is published before its job has ended, and Ray hangs if it is left in between.
                    while self._running or not self.is_done:
                        if is_stopped():
                            raise KeyboardInterrupt
                        self._launch(executor, heartbeat)
                        self._wait()
                except (KeyboardInterrupt, SystemExit):  # the latter is how Ray Tune ends a trial
                    for lease in self._held.values():
                        lease.ask_to_stop()
                    wait(self._running, timeout=STOP_SECONDS)  # trainings end after a step, with a checkpoint
                    raise
                finally:
                    executor.close()
                    wait(self._running, timeout=END_SECONDS)  # of a run that failed or was stopped
        finally:
            for lease in self._held.values():  # last: until here their stages may have been worked on
                lease.release()

    def _launch(self, executor: Executor, heartbeat: Heartbeat) -> None:
        """Start as many jobs as there is room for."""
        while len(self._running) < executor.concurrency:
            busy = {node.name for chain in self._running.values() for node in chain}
            busy |= {name for name, watcher in self._elsewhere.items() if not watcher.dead()}
            chain = self._leased(next_chain(self._graph, self.manifests, busy), heartbeat)
            if chain is None:
                return
            if not chain:
                continue  # what was ready belongs to somebody else: there may be more
            self._mine.update(node.name for node in chain)
            name = job_name(self._graph.recipe.name, [(node.name, _key(node)) for node in chain])
            self._announce(chain[0])
            self._running[_in_thread(executor, self._job(chain), name)] = chain

    def _leased(self, chain: list[Node], heartbeat: Heartbeat) -> list[Node] | None:
        """The first nodes of `chain` whose leases are to be had; None if there was nothing to begin with."""
        if not chain:
            return None
        leased = []
        for node in chain:
            key = _key(node)
            watcher = self._elsewhere.setdefault(node.name, LeaseWatcher(self._store.storage, key))
            lease = try_acquire(self._store.storage, key, dead=watcher.dead())
            if lease is None:
                break
            self._held[key] = lease
            if (manifest := self._store.manifest(key)) is not None:  # its last owner had published after all
                self._release(node)
                self._finish(node, manifest)
                break
            heartbeat.add(lease)
            del self._elsewhere[node.name]
            leased.append(node)
        return leased

    def _job(self, chain: list[Node]) -> Job:
        recipe, data_digest = self._graph.recipe, self._graph.data_digest
        assert data_digest is not None, "keys were there, so the data were"
        stages = tuple(
            StageJob(
                key=_key(node),
                stage=node.stage,
                inputs=tuple(self._graph.key_inputs(node)),
                seed=node.seed,
                lease=self._held[_key(node)],
            )
            for node in chain
        )
        return Job(self._store.location, self._graph.data, data_digest, recipe.compute, stages)

    def _wait(self) -> None:
        """Let a moment pass, or a job end; then see what has come of it."""
        moment = self._store.storage.poll_seconds
        if self._running:
            ended, _ = wait(self._running, timeout=moment, return_when=FIRST_COMPLETED)
        else:
            time.sleep(moment)  # what is left is being run by somebody else
            ended = set()
        self._observe()
        for future in ended:
            self._conclude(self._running.pop(future), future)

    def _observe(self) -> None:
        """See what is in the store: reports of running stages, and stages finished here or elsewhere."""
        for chain in self._running.values():
            for position, node in enumerate(chain):
                if node.name in self.manifests:
                    continue
                self._read_progress(node)
                if (manifest := self._store.manifest(_key(node))) is None:
                    break
                self._finish(node, manifest)
                if position + 1 < len(chain):
                    self._announce(chain[position + 1])
        for name, node in self._graph.nodes.items():
            if name in self.manifests or name in self._mine:
                continue
            if (manifest := self._store.manifest(_key(node))) is not None:
                self._finish(node, manifest)

    def _conclude(self, chain: list[Node], future: Future[None]) -> None:
        """A job has ended: all of it is published, or somebody else does the rest, or something failed."""
        unfinished = [node for node in chain if node.name not in self.manifests]
        left = {node.name: failure(self._store, self._held[_key(node)]) for node in unfinished}
        is_lost = any(not self._held[_key(node)].is_current() for node in unfinished)
        for node in chain:
            self._release(node)
        for name, reason in left.items():
            if reason is not None:
                self.record("failed", name=name, key=self._graph.nodes[name].key, reason=str(reason))
                raise type(reason)(f"stages.{name}: {reason}")
        if is_lost:  # this machine slept, or lost the store, for so long that another run took over
            self._mine.difference_update(node.name for node in unfinished)
            return
        future.result()
        if unfinished:
            raise StageError(f"stages.{unfinished[0].name}: its job ended without a result")

    def _release(self, node: Node) -> None:
        self._held.pop(_key(node)).release()

    def _announce(self, node: Node) -> None:
        self._display.started(node)
        self.record(
            "started",
            name=node.name,
            key=node.key,
            kind=node.stage.kind,
            params=node.stage.model_dump(mode="json", exclude={"kind", "from_", "teacher"}),
            inputs=[given.model_dump() for given in self._graph.key_inputs(node)],
        )

    def _read_progress(self, node: Node) -> None:
        key = _key(node)
        progress = Journal(self._store.work(key), PROGRESS)
        rows, self._offsets[key] = progress.read(self._offsets.get(key, 0))
        for row in rows:
            if "warning" in row:
                log.warning("stage %s: %s", node.name, row["warning"])
                continue
            self._display.progress(node, row)
            if row["step"] > self._steps.get(key, -1):
                self._steps[key] = row["step"]
                self.record("progress", key=key, row=row)

    def _finish(self, node: Node, manifest: Manifest) -> None:
        self._take_over(node, manifest)
        self._record_end(node)

    def _take_over(self, node: Node, manifest: Manifest) -> None:
        outcome: Outcome = "ran" if node.name in self._mine else "reused"
        if outcome == "reused":
            _warn_of_differences(node.name, manifest)
        self._elsewhere.pop(node.name, None)
        self.manifests[node.name], self.outcomes[node.name] = manifest, outcome
        self._display.finished(node, outcome, manifest)

    def _record_end(self, node: Node) -> None:
        self.record("finished", name=node.name, key=node.key, state=self.outcomes[node.name])


def _in_thread(executor: Executor, job: Job, name: str) -> Future[None]:
    """Run a job in a thread that cannot keep this process from ending, as those of a pool would."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            executor.run(job, name)
        except BaseException as error:  # noqa: BLE001 - it is raised where the future is asked
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _key(node: Node) -> str:
    assert node.key is not None, "a pipeline with unknown keys is refused before it runs"
    return node.key


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
