"""`pbkd slurm` on a real Slurm of two nodes: what a user gets, what happens to jobs, what is told before."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults import LOG_STEPS
from benchmarks.injected import injected
from benchmarks.slurm_faults import LOG_HOSTS, time_limit
from benchmarks.slurm_jobs import Bench, Job
from benchmarks.slurm_lab import SlurmLab
from pipelines.cli import main
from tests.integration.pbkd_process import ROOT, SMALL, run, with_database
from tests.unit.image_folders import save_folder

LOG_SAMPLES = """
import os

def log_samples(module):
    from hashlib import sha256
    take_step = module._Training.take_step
    def logged(training, images, *arguments):
        stage = os.path.basename(training.session._storage.location())  # its key
        names = [sha256(image.numpy().tobytes()).hexdigest() for image in images]
        step = training.step
        take_step(training, images, *arguments)  # one that is not taken on all nodes is not taken
        with open(os.environ["PBKD_FAULTS_LOG"] + ".samples", "a") as log:
            log.write(" ".join([stage, str(step), *names]) + "\\n")
    module._Training.take_step = logged

when_imported("pbkd.engine.loop", log_samples)
"""
EPOCHS = 5


@pytest.fixture(scope="module")
def bench(lab: SlurmLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Bench(lab, tmp_path_factory.mktemp("bench")) as bench:
        yield bench


@pytest.mark.parametrize("last", ["stabilized", pytest.param("recovered", marks=pytest.mark.proof)])
def test_two_nodes_train_as_two_processes_here_and_as_one_through_a_time_limit_and_nothing_is_left(
    last: str, bench: Bench, tmp_path: Path
) -> None:
    """As one: with a network without BatchNorm, which on CPUs knows only its rank's share, or dropout."""
    images = save_folder(tmp_path / "images", train=16)  # a VGG halves its images five times
    settings = [
        "stages.teacher.network={arch: vgg11, head: [], base_width: null}",
        f"data={{name: folder, root: {images}, num_classes: 3, image_size: 32, batch_size: 9}}",
        "data.augment=none", "data.val_fraction=0.125",
        "stages.teacher.steps=null", f"stages.teacher.epochs={EPOCHS}", "stages.teacher.optimizer={lr: 0.01}",
    ]  # fmt: skip
    two = ["compute.workers=2", "compute.fuse=true", "--until", last]
    alone, together = tmp_path / "alone" / "steps", tmp_path / "together" / "steps"
    one_here, two_here = (
        run(
            SMALL, *settings, *words, "compute.executor=local", "--store", with_database(log.parent / "runs"),
            **injected(LOG_STEPS + LOG_SAMPLES, log.parent / "hook"), PBKD_FAULTS_LOG=str(log),
        )
        for words, log in ((["--until", "teacher"], alone), (two, together))
    )  # fmt: skip
    store = bench.store()
    job = Job(
        bench, store, *settings, *two, "compute.placement=spread", recipe=SMALL, hook=LOG_SAMPLES + LOG_HOSTS
    )
    job.wait_for_steps(1)
    time_limit(job, bench)
    end = job.wait()
    assert (end["code"], end["begun"]) == (0, 2), job.logs()
    made = {path.stem: json.loads(path.read_bytes())["digest"] for path in store.glob("manifests/*.json")}
    assert made == {stage["key"]: stage["digest"] for stage in two_here["stages"]}
    assert len(job.steps()) == len(together.read_text().splitlines()), "no step was lost or repeated"
    assert set((store.parent / "steps.hosts").read_text().split()) == {"n1", "n2"}, "both trained"
    assert job.is_clean()

    teachers = [report["stages"][0]["key"] for report in (one_here, two_here)]
    histories = [
        json.loads((place / "manifests" / f"{key}.json").read_bytes())["history"]
        for place, key in zip((alone.parent / "runs", store), teachers, strict=True)
    ]
    assert [row["step"] for row in histories[0]] == [row["step"] for row in histories[1]]
    losses = [[row["train_loss"] for row in rows if "train_loss" in row] for rows in histories]
    assert losses[0][-1] < losses[0][0] - 0.03
    # Of the epoch that the time limit divided, the mean is without the second node's first losses.
    differ = [number for number, (a, b) in enumerate(zip(*losses, strict=True)) if abs(a - b) > 1e-4]
    assert len(differ) <= 1 and losses[1][-1] == pytest.approx(losses[0][-1], abs=1e-4)

    one, shared = samples(alone, teachers[0]), samples(store.parent / "steps", teachers[1])
    assert {len(shares) for shares in shared.values()} == {2}, "both nodes trained in every step"
    per_epoch = len(one) // EPOCHS
    for epoch in range(EPOCHS):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = Counter(image for step in steps for share in shared[step] for image in share)
        assert set(seen.values()) == {1}, "no sample twice in an epoch"
        assert seen == Counter(image for step in steps for share in one[step] for image in share)
        assert len(seen) == 42


@pytest.mark.proof  # on every run without Slurm: tests/integration/test_run.py
def test_a_finished_pipeline_submitted_again_trains_nothing(bench: Bench) -> None:
    store = bench.store()
    first = Job(bench, store, "--until", "teacher", recipe=SMALL)
    assert first.wait()["code"] == 0
    taken = len(first.steps())
    again = Job(bench, store, "--until", "teacher", recipe=SMALL)
    assert again.wait()["code"] == 0 and len(again.steps()) == taken > 0 and again.is_clean()


def samples(steps: Path, key: str) -> dict[int, list[list[str]]]:
    """What was logged by `LOG_SAMPLES` of a stage: for each step, of each rank, the images."""
    found: dict[int, list[list[str]]] = {}
    for line in steps.with_name("steps.samples").read_text().splitlines():
        stage, step, *images = line.split()
        if stage == key:
            found.setdefault(int(step), []).append(images)
    return found


def complaint(capfd: pytest.CaptureFixture[str], *words: object) -> str:
    """What `pbkd slurm run WORDS` says of a mistake, before anything waits in the queue."""
    code = main(["slurm", "run", str(SMALL), *map(str, words)])
    out, err = capfd.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and len(err.splitlines()) <= 3 and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--partition", "gpu"], "--partition gpu: unknown; there are: main, urgent"),
        (["--nodes", 3], "--nodes 3: partition main has 2"),
        (["--time", 2], "--time 2: too short to start, train and keep the state"),
        (["--time", "1-0", "--partition", "urgent"], "--time 1-0: partition urgent allows 10 minutes"),
        (["--time", "soon"], "--time soon: expected minutes, H:MM:SS or D-HH[:MM[:SS]]"),
        (["sed=1"], "unknown key 'sed'; did you mean 'seed'?"),
        (["--profile", "a100"], "so there is no profile 'a100'"),
    ],
)
def test_mistakes_are_told_before_submission(
    words: list[object], said: str, store: Path, lab: SlurmLab, capfd: pytest.CaptureFixture[str]
) -> None:
    assert said in complaint(capfd, *words, "--store", store)
    assert not lab.ask("squeue", "--noheader")
    assert not store.exists()


def test_a_store_that_compute_nodes_do_not_see_is_refused(
    lab: SlurmLab, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "compute node n1 does not see it" in complaint(
        capfd, "--store", lab.folder / "login-only" / "runs"
    )


def test_compute_nodes_with_other_packages_are_refused(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other" / "numpy-1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    profiles = tmp_path / "profiles.yaml"
    profiles.write_text(f"default: {{setup: ['export PYTHONPATH={other.parent}']}}\n")
    monkeypatch.setenv("PBKD_SLURM_PROFILES", str(profiles))
    said = complaint(capfd, "--store", store)
    assert "compute node n1 has numpy 1.0 instead of" in said
    profiles.write_text("default: {python: /opt/other/bin/python}\n")
    assert "compute nodes cannot start Python (/opt/other/bin/python)" in complaint(capfd, "--store", store)


def test_without_slurm_it_says_what_to_do(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "slurm", "run", SMALL, "--store", store],
        cwd=ROOT, env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 2
    assert "this machine is no login node of a Slurm cluster" in found.stderr
