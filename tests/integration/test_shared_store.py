"""Several pipelines, or names, for one stage: it runs once, and whoever comes second takes the result."""

from collections import Counter
from pathlib import Path

from pbkd.storage import Folder
from pipelines.lease import try_acquire
from tests.integration.pbkd_process import SMALL, digests, pbkd, run_here, states, until, with_database


def test_two_pipelines_at_once_run_each_stage_once(tmp_path: Path) -> None:
    arguments = ["--store", with_database(tmp_path), "--json"]
    with (
        pbkd("run", SMALL, "compute.executor=local", *arguments) as one,
        pbkd("run", SMALL, "compute.executor=local", "name=other", "baselines=[]", *arguments) as other,
    ):
        reports = [one.succeed(), other.succeed()]
    assert digests(reports[0]) == digests(reports[1])
    ran = Counter(name for report in reports for name, state in states(report).items() if state == "ran")
    assert ran == Counter(digests(reports[0]).keys())


def test_two_stages_of_one_recipe_with_one_key_run_once(tmp_path: Path) -> None:
    twin = ["stages.twin.kind=train", "stages.twin.from=pruned", "stages.twin.steps=8"]
    report = run_here(SMALL, "compute.executor=local", *twin, "--store", with_database(tmp_path))
    found = {stage["name"]: stage for stage in report["stages"]}
    assert found["twin"]["key"] == found["scratch"]["key"]
    assert found["twin"]["run_id"] == found["scratch"]["run_id"]
    assert sorted(found[name]["state"] for name in ("twin", "scratch")) == ["ran", "reused"]


def test_a_run_that_lost_a_lease_publishes_nothing_and_waits_for_the_new_owner(tmp_path: Path) -> None:
    steps = "stages.teacher.steps=100"
    store = with_database(tmp_path)
    with pbkd("run", SMALL, "compute.executor=local", steps, "--store", store, "--json") as command:
        until(lambda: any(tmp_path.glob("work/*/step-*")), "a checkpoint of the first stage")
        key = next(tmp_path.glob("work/*/step-*")).parent.name
        lease = try_acquire(Folder(tmp_path), key, dead=1)  # as another run that thought the first one dead
        assert lease is not None
        until(lambda: not command.processes("pbkd-rank"), "the end of the first one's work")
        assert not any(tmp_path.glob("manifests/*.json"))
        lease.release()  # the other run has failed: the first is to do the stage after all
        report = command.succeed()
    assert set(states(report).values()) == {"ran"}
