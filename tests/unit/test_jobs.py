"""A worker that does not know yet that another run has taken its stage over costs that run nothing."""

import errno
import os
from pathlib import Path

import pytest

from pbkd.data import DataSettings, data_digest
from pbkd.stages.train import Train
from pipelines import guard as guard_module
from pipelines.guard import Guard
from pipelines.jobs import GaveUp, Job, StageJob, carry_out
from pipelines.lease import Lease, try_acquire
from pipelines.recipe import Compute
from pipelines.store import Store
from tests.integration.pbkd_process import until

KEY = "ab" * 32
STEPS, FALLS_ASLEEP, TAKEN_TO = 60, 20, "step-000000050"


def job(store: Store, lease: Lease) -> Job:
    data = DataSettings(name="digits", batch_size=20, limit=100, loader="torch")
    stage = Train.model_validate({"network": {"arch": "resnet20", "base_width": 4}, "steps": STEPS})
    # A checkpoint of every step is there before the next: what is seen of it does not depend on the disk.
    compute = Compute(executor="local", threads=1, checkpoint_steps=1)
    digest = data_digest(data, store.root / "cache")
    return Job(store.location, data, digest, compute, (StageJob(KEY, stage, (), 0, lease),))


def acquired(store: Store, dead: int = 0) -> Lease:
    lease = try_acquire(store.storage, KEY, dead=dead)
    assert lease is not None
    return lease


@pytest.mark.parametrize("wakes", ["and goes on", "to a full disk"])
def test_an_old_owner_that_wakes_up_costs_the_new_one_nothing(
    wakes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard_module, "LOOK_SECONDS", 0.01)
    store = Store(tmp_path / "runs")
    work, old = store.work(KEY), acquired(store)
    taken: dict[int, int] = {}  # steps, by the generation of their owner
    kept: list[str] = []
    step = Guard.step

    def observed(guard: Guard) -> bool:
        lease = guard._lease
        taken[lease.generation] = taken.get(lease.generation, 0) + 1
        if lease.generation == old.generation and taken[old.generation] == FALLS_ASLEEP:
            new = acquired(store, dead=old.generation)
            with pytest.raises(GaveUp):
                carry_out(job(store, new))
            new.release()  # killed, say: it took the training to step 50 and left its checkpoint
            kept.extend(name for name in work.names() if name >= TAKEN_TO)
            if wakes == "to a full disk":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), work.location())
        elif lease.generation > old.generation and any(name >= TAKEN_TO for name in work.names()):
            lease.ask_to_stop()
            until(lambda: step(guard), "the guard to see it")
        return step(guard)

    monkeypatch.setattr(Guard, "step", observed)
    with pytest.raises(GaveUp):
        carry_out(job(store, old))
    assert kept and set(kept) <= set(work.names())

    monkeypatch.setattr(Guard, "step", lambda guard: taken.update({3: taken.get(3, 0) + 1}) or step(guard))
    carry_out(job(store, acquired(store)))
    assert taken[3] <= STEPS - int(TAKEN_TO.partition("-")[2]), "what the second had done is not repeated"
    manifest = store.manifest(KEY)
    assert manifest is not None and manifest.history[-1]["step"] == STEPS
