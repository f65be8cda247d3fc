"""Kills a pipeline at random moments and asks whether anything was lost.

    python -m benchmarks.faults --kills 50 [--seed 0] [--json] [compute.executor=ray]

Runs benchmarks/faults.yaml once undisturbed, then once for each kill, in a store of its own: after a random
number of its steps, and a random moment more, a worker or, in turn, the driver with all its processes gets
SIGKILL; after the driver, the same command is typed again. A run has survived if every stage ends with the
weights of the undisturbed run and no stage that was finished at the kill has run again. Steps are logged by
the processes themselves, by a hook that exists only here. Appends a row to benchmarks/results/faults.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from benchmarks.injected import injected
from benchmarks.marked_processes import MARK, marked_processes
from pbkd.data import DataSettings
from pbkd.networks import NetworkSettings, architecture, fresh
from pipelines.jobs import processor
from pipelines.tracking import connect

ROOT = Path(__file__).parents[1]
RECIPE = Path(__file__).with_suffix(".yaml")
RESULTS = Path(__file__).parent / "results" / "faults.csv"
COLUMNS = (
    "kills", "survived", "steps_repeated_max", "interval", "recovery_seconds_median",
    "executor", "seed", "processor", "torch", "date",
)  # fmt: skip
POLL_SECONDS = 0.02
LONGEST_SECONDS = 600.0
WORKERS = {"local": "pbkd-rank", "ray": "ray::RayTrainWorker"}
LOG_STEPS = """
import os

def change(module):
    take_step = module._Training.take_step
    def logged(training, *arguments):
        take_step(training, *arguments)
        stage = training.session._storage.location()  # its work folder, named by its key
        line = f"{os.getpid()} {stage} {training.step}\\n".encode()
        log = os.open(os.environ["PBKD_FAULTS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log, line)
        os.close(log)
    module._Training.take_step = logged

when_imported("pbkd.engine.loop", change)
"""


@dataclass(frozen=True)
class Outcome:
    """What came of one kill; the steps are those of the stage that repeated the most."""

    survived: bool
    steps_repeated: int
    recovery_seconds: float


class Command:
    """`pbkd run` of the recipe in `folder`/runs, with all its processes; they log to `folder`/steps."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self._mark = uuid.uuid4().hex
        self._log = folder / "steps"
        recipe = prepared_recipe(folder.parent)
        arguments = ["run", str(recipe), *overrides, "--store", str(folder / "runs"), "--json"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *arguments],
            cwd=ROOT,
            env=os.environ
            | injected(LOG_STEPS, folder / "hook")
            | {MARK: self._mark, "PBKD_FAULTS_LOG": str(self._log)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def steps(self) -> list[tuple[str, str]]:
        """(process, step) of every step logged so far; a step names its stage too."""
        if not self._log.exists():
            return []
        lines = (line.partition(" ") for line in self._log.read_text().splitlines())
        return [(process, step) for process, _, step in lines]

    def is_running(self) -> bool:
        """Whether the command has not ended."""
        return self._process.poll() is None

    def finish(self) -> dict[str, Any] | None:
        """Wait for the end; the report, or None if the command failed."""
        out, err = self._process.communicate(timeout=LONGEST_SECONDS)
        if self._process.returncode != 0:
            sys.stderr.write(err)
            return None
        report: dict[str, Any] = json.loads(out)
        return report

    def kill_driver(self) -> None:
        """SIGKILL the driver and wait until the processes it left have noticed."""
        self._process.kill()
        self._process.communicate()
        while any(marked_processes(self._mark, words) for words in WORKERS.values()):
            time.sleep(POLL_SECONDS)

    def kill_worker(self, draw: random.Random) -> bool:
        """SIGKILL one worker; False if there is none at this moment."""
        workers = [pid for words in WORKERS.values() for pid in marked_processes(self._mark, words)]
        if not workers:
            return False
        try:
            os.kill(draw.choice(workers), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def end(self) -> None:
        """End all that is left."""
        for pid in marked_processes(self._mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.communicate()


def undisturbed(folder: Path, overrides: list[str]) -> tuple[dict[str, str], int]:
    """The weights' digest of every stage, and the number of steps, of a run that nobody kills."""
    _prepare(folder)
    command = Command(folder, overrides)
    try:
        report = command.finish()
        if report is None:
            raise SystemExit("the undisturbed run failed")
        return _digests(report), len(command.steps())
    finally:
        command.end()


def kill_once(
    folder: Path,
    overrides: list[str],
    expected: dict[str, str],
    steps: int,
    draw: random.Random,
    *,
    driver: bool,
) -> Outcome:
    """Run, kill at a random moment, and let it go on."""
    _prepare(folder)
    command = Command(folder, overrides)
    commands = [command]
    try:
        moment, more = draw.randrange(1, steps), draw.random()
        while command.is_running() and len(command.steps()) < moment:
            time.sleep(POLL_SECONDS)
        time.sleep(more)
        finished = {path.name: path.stat().st_mtime_ns for path in (folder / "runs/manifests").glob("*.json")}
        killed_at = time.monotonic()
        if driver:
            command.kill_driver()
        else:
            while command.is_running() and not command.kill_worker(draw):
                time.sleep(POLL_SECONDS)
        before = command.steps()
        if driver:
            command = Command(folder, overrides)
            commands.append(command)
        while command.is_running() and len(command.steps()) == len(before):
            time.sleep(POLL_SECONDS)
        recovery = time.monotonic() - killed_at
        report = command.finish()
        is_untouched = all(
            (folder / "runs/manifests" / name).stat().st_mtime_ns == mtime for name, mtime in finished.items()
        )
        survived = report is not None and _digests(report) == expected and is_untouched
        if report is not None and driver:
            reused = {stage["key"] for stage in report["stages"] if stage["state"] == "reused"}
            survived = survived and {name.removesuffix(".json") for name in finished} <= reused
        times = Counter(step for _, step in command.steps())
        repeated = Counter(step.rpartition(" ")[0] for step, count in times.items() if count > 1)
        return Outcome(survived, max(repeated.values(), default=0), recovery)
    finally:
        for started in commands:
            started.end()


def prepared_recipe(folder: Path) -> Path:
    """The recipe, in `folder`, with the weights it begins with beside it; made once."""
    recipe, weights = folder / RECIPE.name, folder / "given.safetensors"
    if not recipe.exists():
        content = OmegaConf.load(RECIPE)
        settings = NetworkSettings.model_validate(content.stages.given.network)
        data = DataSettings.model_validate(content.data).describe()
        save_file(fresh(architecture(settings, data.input_shape, data.num_classes), 0).state_dict(), weights)
        content.stages.given.weights = str(weights)
        OmegaConf.save(content, recipe)
    return recipe


def _prepare(folder: Path) -> None:
    """A store with an empty MLflow database, which takes MLflow seconds to make."""
    database = folder / "runs" / "mlflow" / "mlflow.db"
    database.parent.mkdir(parents=True)
    template = folder.parent / "mlflow.db"
    if not template.exists():
        connect(f"sqlite:///{template}").search_experiments()
    shutil.copy(template, database)


def _digests(report: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["digest"] for stage in report["stages"]}


def main() -> None:
    """The command. Exit code 1 if a run did not survive."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="pbkd-faults-") as place:
        expected, steps = undisturbed(Path(place) / "undisturbed", arguments.overrides)
        for number in range(arguments.kills):
            folder = Path(place) / str(number)
            outcome = kill_once(folder, arguments.overrides, expected, steps, draw, driver=number % 2 == 1)
            outcomes.append(outcome)
            if not arguments.json:
                sys.stdout.write(f"{number + 1}: {outcome}\n")
            shutil.rmtree(folder)
    recipe = OmegaConf.merge(OmegaConf.load(RECIPE), OmegaConf.from_dotlist(arguments.overrides))
    found = {
        "survived": sum(outcome.survived for outcome in outcomes),
        "total": len(outcomes),
        "steps_repeated_max": max(outcome.steps_repeated for outcome in outcomes),
        "interval": recipe.compute.checkpoint_steps,
        "recovery_seconds_median": round(
            statistics.median(outcome.recovery_seconds for outcome in outcomes), 2
        ),
    }
    sys.stdout.write(json.dumps(found) + "\n")
    row = (
        found["total"], found["survived"], found["steps_repeated_max"], found["interval"],
        found["recovery_seconds_median"], recipe.compute.executor, arguments.seed, processor(),
        torch.__version__, datetime.now(UTC).date().isoformat(),
    )  # fmt: skip
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        writer.writerow(row)
    if found["survived"] < found["total"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
