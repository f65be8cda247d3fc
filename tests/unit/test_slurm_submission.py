"""What is asked of Slurm, without one: the script, as recorded; times; a site's profiles."""

import os
import sys
from pathlib import Path

import pytest

from pbkd.errors import UserError
from pipelines.cli import main
from slurm.allocation import load_allocation, parse_minutes
from slurm.fingerprint import Fingerprint
from slurm.records import End, JobRecord, read_end, read_job, state, write_end, write_job

pytestmark = pytest.mark.slow

VALIDATION = "data.val_fraction=0.2"
RECORDED = Path(__file__).with_name("slurm_submission.sh")
PROFILES = """
default: {partition: gpu, account: vision, time: 4:00:00, gpus_per_node: 4}
container:
  setup: [module load cuda/12]
  python: /opt/venv/bin/python
  srun: [--container-image=/images/pbkd.sqsh]
  sbatch: {constraint: a100}
"""


@pytest.fixture(autouse=True)
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "profiles.yaml"
    path.write_text(PROFILES)
    monkeypatch.setenv("PBKD_SLURM_PROFILES", str(path))
    return path


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Of a search of the digits recipe: exit code, stdout and stderr."""
    recipe = "pipelines/recipes/digits.yaml"
    code = main(["slurm", "tune", words[0], recipe, VALIDATION, *words[1:], "--dry-run", "--store", "/s"])
    return code, *capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["jiont"], "space 'jiont': there is none; did you mean 'joint'?"),
        (["joint", "--trails", "8"], "No such option: --trails (Possible options: --trials)"),
        (["joint", "--trials", "0"], "Invalid value for '--trials'"),
        (["joint", "--sampler", "best"], "'best' is not one of 'tpe', 'nsga2', 'fixed'"),
        (["joint", "--max-macs", "-1"], "--max-macs -1: expected a number above 0"),
        (["joint", "--objective", "macs"], "--objective macs: without accuracy"),
        (["joint", "--early-stop"], "--early-stop: goes by accuracy alone"),
        (["joint", "--name", "a/b"], "'a/b' names none of the searches"),
        (["joint", "sed=1"], "unknown key 'sed'; did you mean 'seed'?"),
        (["joint", "--sweep=--sed=0,1"], "No such option: --sed"),
        (["joint", "--sweep", "sed=0,1"], "unknown key 'sed'"),
        (["joint", "--sweep", "seed=0,"], "--sweep seed=0,: expected KEY=VALUE,VALUE"),
    ],
)
def test_mistakes_in_a_search_are_told_before_it_waits_in_a_queue(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = dry_run(capsys, *words)
    assert (code, out) == (2, "") and said in err and len(err.splitlines()) <= 3


def test_a_sweep_of_a_search_is_an_array_of_searches_each_with_a_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = dry_run(capsys, "joint", "--trials", "4", "--sweep=--seed=0,1")
    assert code == 0 and "#SBATCH --array=0-1%2" in out
    assert out.splitlines()[-2:] == [
        f"# {seed}: pbkd tune joint pipelines/recipes/digits.yaml {VALIDATION} --trials 4 --seed={seed} "
        f"--name=digits-joint-seed-{seed} --store /s"
        for seed in (0, 1)
    ]


def test_the_script_is_as_recorded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [
        "tests/integration/small.yaml",
        "--nodes",
        "2",
        "--cpus-per-node",
        "8",
        "--dry-run",
        "--store",
        "/s",
    ]
    said = ""
    for more in (["--qos", "high"], ["--profile", "container", "--sweep", "seed=0,1,2"]):
        assert main(["slurm", "run", *words, *more]) == 0
        said += capsys.readouterr().out
    said = said.replace(sys.executable, "PYTHON")
    if "PBKD_RECORD" in os.environ:
        RECORDED.write_text(said)
    assert said == RECORDED.read_text()


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90), ("90:30", 90), ("4:00:00", 240), ("1-12", 2160), ("1-12:30", 2190), ("2-0:0:59", 2880),
        ("", None), ("soon", None), ("1:2:3:4", None), ("x-1", None), ("-5", None),
    ],
)  # fmt: skip
def test_times_are_read_as_slurm_reads_them(text: str, minutes: int | None) -> None:
    assert parse_minutes(text) == minutes


def test_what_is_typed_wins_over_the_profile() -> None:
    allocation = load_allocation(None, {"partition": "debug"})
    assert (allocation.partition, allocation.account, allocation.minutes) == ("debug", "vision", 240)


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (PROFILES, "a100", "no profile 'a100'; there are: default, container"),
        ("default: {partitoin: x}", None, "'default.partitoin'"),
        ("default: {nodes: many}", None, "'default.nodes': "),
        ("[1, 2]", None, "expected a mapping of profiles"),
        ("default: [", None, "not a YAML mapping of profiles"),
    ],
)
def test_a_mistake_in_the_profiles_names_file_and_key(
    content: str, name: str | None, said: str, profiles: Path
) -> None:
    profiles.write_text(content)
    with pytest.raises(UserError) as raised:
        load_allocation(name, {})
    assert str(raised.value).startswith(str(profiles)) and said in str(raised.value)


def test_an_environment_that_differs_is_told_in_words() -> None:
    here = Fingerprint.here()
    assert here.differences(Fingerprint.here()) == []
    other = Fingerprint("3.9.1", here.packages | {"torch": "1.0"}, "0")
    assert here.differences(other) == [
        f"Python 3.9.1 instead of {here.python}",
        f"torch 1.0 instead of {here.packages['torch']}",
        "another version of pbkd's code",
    ]


def test_the_first_who_declares_the_end_is_believed(tmp_path: Path) -> None:
    record = JobRecord("77_0", "slurm", ("run", "r.yaml"), 2, 3)
    (tmp_path / "77_0").mkdir()
    write_job(tmp_path, record)
    assert read_job(tmp_path, "77_0") == record and read_end(tmp_path / "77_0") is None
    write_end(tmp_path / "77_0", End(0))
    write_end(tmp_path / "77_0", End(1, "too late"))
    assert read_end(tmp_path / "77_0") == End(0) and state(tmp_path, record) == "finished"
    with pytest.raises(UserError, match=r"job '78': not one of .* the latest: 77_0"):
        read_job(tmp_path, "78")


def test_more_nodes_than_this_machine_are_refused_without_slurm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tests/integration/small.yaml", "--nodes", "2", "--store", str(tmp_path / "runs")]
    for executor in ("local", "debug"):
        assert main(["slurm", "run", *words, "--executor", executor]) == 2
        assert f"--nodes 2: --executor {executor} has this machine alone" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
