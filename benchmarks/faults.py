"""Kills a pipeline at random moments and asks whether anything was lost.

    python -m benchmarks.faults --kills 50 [--seed 0] [--json] [compute.executor=ray]

Runs benchmarks/faults.yaml once undisturbed, then once for each kill, in a store of its own. A worker or, in
turn, the driver with all its processes gets SIGKILL: a random moment after a random number of the pipeline's
steps; or where, after so many, a worker next has written half of a checkpoint, has reported its last row but
not waited for its last checkpoint, or has published a stage; or once two workers at a time have trained.
After the driver, the same command is typed again. A run has survived if every stage ends with the weights of
the undisturbed run and no stage that was finished at the kill has run again. Recovery is the time until a
process that began after the kill has made a step. Steps are logged, and places reached, by hooks that exist
only here. Appends a row to benchmarks/results/faults.csv.
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
    "worker_recovery_seconds_median", "worker_recovery_seconds_max",
    "driver_recovery_seconds_median", "driver_recovery_seconds_max",
    "executor", "seed", "processor", "torch", "date",
)  # fmt: skip
AIMS = ("moment", "save", "report", "publish", "branches")
"""Where a kill is to hit: anywhere, at one of the places of `PLACES`, or while two workers train."""
ATTEMPTS = 20
"""How often a pipeline may end before it is hit."""
POLL_SECONDS = 0.02
LONGEST_SECONDS = 600.0
WORKERS = {"local": "spawn_main", "ray": "ray::RayTrainWorker"}
LOG_STEPS = """
import os, threading

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

def is_due():
    if os.path.exists(os.environ["PBKD_FAULTS_REACHED"]):
        return False
    try:
        with open(os.environ["PBKD_FAULTS_LOG"]) as log:
            return sum(1 for _ in log) >= int(os.environ["PBKD_FAULTS_STEPS"])
    except FileNotFoundError:
        return False

def reach():  # the first that is here waits for its end
    try:
        with open(os.environ["PBKD_FAULTS_REACHED"], "x") as place:
            place.write(str(os.getpid()))
    except FileExistsError:
        return
    threading.Event().wait()
"""
PLACES = {
    "save": """
def change_storage(module):
    write = module._write_temporary
    def torn(path, content, sync):
        if path.name.startswith("step-") and is_due():
            write(path, content[: len(content) // 2], sync)
            reach()
        return write(path, content, sync)
    module._write_temporary = torn

when_imported("pbkd.storage", change_storage)
""",
    "report": """
def change_session(module):
    commit = module.LocalSession.commit
    def late(session):
        if is_due():
            reach()
        commit(session)
    module.LocalSession.commit = late

when_imported("pbkd.engine.session", change_session)
""",
    "publish": """
def change_store(module):
    publish = module.Store.publish
    def published(*arguments):
        publish(*arguments)
        if is_due():
            reach()
    module.Store.publish = published

when_imported("pipelines.store", change_store)
""",
}


@dataclass(frozen=True)
class Outcome:
    """What came of one kill.

    Attributes:
        steps_repeated: of the stage that repeated the most.
        recovery_seconds: until training went on; None if nothing was left to train.
    """

    survived: bool
    steps_repeated: int
    recovery_seconds: float | None


class Command:
    """`pbkd run` of the recipe in `folder`/runs, with all its processes; they log to `folder`/steps.

    The first that comes to the place `aim` after `steps` steps stays there, and is named in `folder`/reached.
    """

    def __init__(self, folder: Path, overrides: list[str], aim: str = "moment", steps: int = 0) -> None:
        self._mark = uuid.uuid4().hex
        self._log, self._reached = folder / "steps", folder / "reached"
        recipe = prepared_recipe(folder.parent)
        arguments = ["run", str(recipe), *overrides, "--store", str(folder / "runs"), "--json"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *arguments],
            cwd=ROOT,
            env=os.environ
            | injected(LOG_STEPS + PLACES.get(aim, ""), folder / "hook")
            | {MARK: self._mark, "PBKD_FAULTS_LOG": str(self._log)}
            | {"PBKD_FAULTS_REACHED": str(self._reached), "PBKD_FAULTS_STEPS": str(steps)},
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

    def workers(self) -> list[int]:
        """Ids of the living workers."""
        return [pid for words in WORKERS.values() for pid in marked_processes(self._mark, words)]

    def is_at(self, aim: str, moment: int) -> bool:
        """Whether it is time for the kill: after `moment` steps, or where `aim` says."""
        if aim in PLACES:
            return bool(self._at_place())
        if aim == "branches":
            return len({str(pid) for pid in self.workers()} & {process for process, _ in self.steps()}) > 1
        return len(self.steps()) >= moment

    def _at_place(self) -> list[int]:
        """The id of the worker that is at the place, if one is."""
        return [int(pid) for pid in (self._reached.read_text().split() if self._reached.exists() else [])]

    def kill_worker(self, draw: random.Random) -> bool:
        """SIGKILL the worker that is at the place, or one of all; False if there is none at this moment."""
        workers = self._at_place() or self.workers()
        if not workers:
            return False
        try:
            os.kill(draw.choice(workers), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def kill_driver(self) -> None:
        """SIGKILL the driver and wait until the processes it left have noticed."""
        self._process.kill()
        self._process.communicate()
        while self.workers():
            time.sleep(POLL_SECONDS)

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
    aim: str = "moment",
) -> Outcome | None:
    """Run, kill after a random number of steps where `aim` says, and let it go on.

    None if the pipeline had ended before.
    """
    _prepare(folder)
    moment = draw.randrange(1, steps)
    command = Command(folder, overrides, aim, moment)
    commands = [command]
    try:
        while command.is_running() and not command.is_at(aim, moment):
            time.sleep(POLL_SECONDS)
        if aim == "moment":
            time.sleep(draw.random())
        finished = {path.name: path.stat().st_mtime_ns for path in (folder / "runs/manifests").glob("*.json")}
        known = {process for process, _ in command.steps()} | {str(pid) for pid in command.workers()}
        while command.is_running() and not (driver or command.kill_worker(draw)):
            time.sleep(POLL_SECONDS)
        if not command.is_running():
            return None
        killed_at = time.monotonic()
        if driver:
            command.kill_driver()
            command = Command(folder, overrides, aim, moment)
            commands.append(command)
        while (is_running := command.is_running()) and {process for process, _ in command.steps()} <= known:
            time.sleep(POLL_SECONDS)
        recovery = time.monotonic() - killed_at if is_running else None
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
    """The command. Exit code 1 if a run did not survive, or repeated more steps than the interval."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    outcomes: list[Outcome] = []
    recoveries: dict[str, list[float]] = {"worker": [], "driver": []}
    with tempfile.TemporaryDirectory(prefix="pbkd-faults-") as place:
        expected, steps = undisturbed(Path(place) / "undisturbed", arguments.overrides)
        for number in range(arguments.kills):
            victim, aim = ("worker", "driver")[number % 2], AIMS[number // 2 % len(AIMS)]
            for attempt in range(ATTEMPTS):
                folder = Path(place) / f"{number}-{attempt}"
                overrides, driver = arguments.overrides, victim == "driver"
                outcome = kill_once(folder, overrides, expected, steps, draw, driver=driver, aim=aim)
                shutil.rmtree(folder)
                if outcome is not None:
                    break
            else:
                raise SystemExit(f"{ATTEMPTS} times the pipeline ended before the kill: {aim}")
            outcomes.append(outcome)
            if outcome.recovery_seconds is not None:
                recoveries[victim].append(outcome.recovery_seconds)
            if not arguments.json:
                sys.stdout.write(f"{number + 1}: {victim}, {aim}: {outcome}\n")
                sys.stdout.flush()
    compute = settings(arguments.overrides)
    found = {
        "survived": sum(outcome.survived for outcome in outcomes),
        "total": len(outcomes),
        "steps_repeated_max": max(outcome.steps_repeated for outcome in outcomes),
        "interval": compute.checkpoint_steps,
        "recovery_seconds_median": _median(recoveries["worker"] + recoveries["driver"]),
        "worker_recovery_seconds_median": _median(recoveries["worker"]),
        "worker_recovery_seconds_max": _largest(recoveries["worker"]),
        "driver_recovery_seconds_median": _median(recoveries["driver"]),
        "driver_recovery_seconds_max": _largest(recoveries["driver"]),
    }
    sys.stdout.write(json.dumps(found) + "\n")
    row = found | {"kills": found["total"], "executor": compute.executor, "seed": arguments.seed}
    row |= {"processor": processor(), "torch": torch.__version__}
    row |= {"date": datetime.now(UTC).date().isoformat()}
    is_new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerow(row)
    if found["survived"] < found["total"] or found["steps_repeated_max"] > found["interval"]:
        raise SystemExit(1)


def settings(overrides: list[str]) -> Any:
    """How the recipe is to be computed."""
    return OmegaConf.merge(OmegaConf.load(RECIPE), OmegaConf.from_dotlist(overrides)).compute


def _median(seconds: list[float]) -> float | None:
    return round(statistics.median(seconds), 2) if seconds else None


def _largest(seconds: list[float]) -> float | None:
    return round(max(seconds), 2) if seconds else None


if __name__ == "__main__":
    main()
