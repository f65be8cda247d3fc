"""Search spaces, what is drawn of them, and who wins."""

import fcntl
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pbkd.errors import UserError
from pipelines.recipe_file import load_recipe
from pipelines.store import Store
from tests.integration.pbkd_process import until
from tune_spaces.objective import Objective, objective_of
from tune_spaces.quiet import Quiet
from tune_spaces.record import SearchRecord, Trial, reached
from tune_spaces.results import importances
from tune_spaces.sampling import Drawn, Listed, dealt, open_trials
from tune_spaces.searcher import METRIC, TIME, scheduler_of
from tune_spaces.space import Parameter, Space, open_space
from tune_spaces.subject import Subject
from tune_spaces.trial import Watcher

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "pipelines" / "recipes" / "digits.yaml"
CIFAR10 = ROOT / "pipelines" / "recipes" / "compare_cifar10.yaml"
VALIDATION = "data.val_fraction=0.2"


def subject_of(path: Path = DIGITS, *overrides: str, cache: Path) -> Subject:
    return Subject.of(path, load_recipe(path, [VALIDATION, *overrides]), None, cache)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject_of(cache=tmp_path_factory.mktemp("cache"))


def file_of(folder: Path, text: str) -> str:
    (folder / "own.yaml").write_text(text)
    return str(folder / "own.yaml")


def described(name: str, subject: Subject) -> dict[str, Any]:
    return open_space(name, subject).described()


def test_the_named_spaces_find_what_a_recipe_has(digits: Subject) -> None:
    widths = described("student_widths", digits)
    assert list(widths) == [f"stages.blocks.width.{block}" for block in (1, 2, 3)]
    assert list(described("pruning_ratios", digits)) == ["stages.pruned.macs"]
    lengths = described("stabilization_lengths", digits)
    assert lengths == {
        "stages.stabilized.epochs": [0, 1, 2, 4, 8],
        "stages.restabilized.epochs": [0, 1, 2, 4, 8],
    }
    assert described("joint", digits).keys() == {*widths, "stages.pruned.macs", *lengths}


RECIPES = sorted((ROOT / "pipelines" / "recipes").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in RECIPES if p.stem != "imagenet_resnet50"], ids=lambda p: p.stem)
def test_the_joint_space_fits_every_recipe_and_can_be_planned(path: Path, tmp_path: Path) -> None:
    subject = subject_of(path, cache=tmp_path)
    space = open_space("joint", subject)
    plan = subject.plan({parameter.key: parameter.values[-1] for parameter in space.parameters})
    assert plan.refusal is None and plan.graph is not None


def test_a_recipe_is_cut_down_to_what_its_student_needs_and_keeps_its_keys(digits: Subject) -> None:
    plan = digits.plan({})
    assert plan.graph is not None
    assert "scratch" not in plan.recipe.stages and not plan.recipe.baselines
    assert plan.keys == tuple(node.key for node in digits.graph.nodes.values())


def test_a_trial_is_what_its_overrides_make_of_the_recipe(digits: Subject) -> None:
    plan = digits.plan(
        {"stages.blocks.width.2": 0.25, "stages.pruned.ratio": 0.3, "stages.stabilized.steps": 7}
    )
    typed = ["stages.blocks.width=[0.5,0.25,0.5]", "stages.pruned.macs=null", "stages.pruned.ratio=0.3"]
    typed += ["stages.stabilized.epochs=null", "stages.stabilized.steps=7"]
    assert plan.overrides == typed
    again = subject_of(DIGITS, *typed, cache=digits.cache)
    assert plan.keys == tuple(node.key for node in again.graph.nodes.values())


def test_only_stages_behind_a_searched_key_differ(digits: Subject) -> None:
    touched = open_space("pruning_ratios", digits).touches(digits)
    assert touched == {"pruned": 1, "restabilized": 2, "recovered": 14}


MISTAKES = {
    "{}": "is empty",
    "stages.blocks.width: []": "at least one value",
    "stages.blocks.width: [0.5, 0.5]": "a value twice",
    "stages.blocks.widht: [0.5]": "did you mean 'width'",
    "stages.blokcs.width: [0.5]": "did you mean 'blocks'",
    "stages.scratch.epochs: [1, 2]": "needs no stage 'scratch'",
    "stages.blocks.width: [0.5, 1.5]": "stages.blocks.width=1.5",
    "stages.blocks.width.9: [0.5]": "has blocks 1, 2, 3",
    "stages.pruned.width.1: [0.5]": "only a progressive stage",
    "stages.blocks.width: [0.5]\nstages.blocks.width.1: [0.5]": "a part of it",
    "stages.pruned.macs: [0.5]\nstages.pruned.ratio: [0.5]": "of which a stage has one",
    "stages.distilled.temperature: {low: 4, high: 2}": "low=4 is not below high=2",
    "stages.distilled.temperature: {low: 0, high: 2, log: true}": "wants low above 0",
    "stages.distilled.temperature: {low: 1}": "expected a list of values, or",
    "stages.distilled.temperature: 3": "valid tuple",
    "compute.threads: [1, 2]": "'compute.threads' cannot be searched",
    "data.val_fraction: [0.1, 0.2]": "cannot be searched",
    "- a list": "expected keys of a recipe",
    "a: [": "cannot be read",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_space_that_does_not_fit_is_refused_by_name_and_key(
    text: str, digits: Subject, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"space .*own") as error:
        open_space(file_of(tmp_path, text), digits)
    assert MISTAKES[text] in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_a_space_that_is_not_there_is_told_with_the_nearest(digits: Subject) -> None:
    with pytest.raises(UserError, match="did you mean 'joint'"):
        open_space("jiont", digits)


def test_a_recipe_without_prunings_has_no_pruning_ratios(tmp_path: Path) -> None:
    subject = subject_of(DIGITS, "student=distilled", cache=tmp_path)
    with pytest.raises(UserError, match="has no prune stage"):
        open_space("pruning_ratios", subject)
    assert "stages.pruned.macs" not in described("joint", subject)


# Objectives


def test_without_a_validation_split_nothing_is_searched(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.val_fraction"):
        objective_of(subject_of(CIFAR10, "data.val_fraction=0", cache=tmp_path), None, None, None)


@pytest.mark.parametrize("goals", ["macs", "accuracy,accuracy", "speed", "accuracy,"])
def test_goals_that_say_nothing_are_refused(goals: str, digits: Subject) -> None:
    with pytest.raises(UserError, match="--objective"):
        objective_of(digits, goals, None, None)


def test_a_share_of_the_teachers_macs_becomes_their_number(digits: Subject) -> None:
    teacher = digits.graph.nodes["teacher"].cost
    assert teacher is not None
    objective = objective_of(digits, None, 0.5, None)
    assert (objective.goals, objective.max_macs) == (("accuracy",), teacher.macs / 2)
    assert objective_of(digits, None, None, None).goals == ("accuracy", "macs")


def ended(number: int, accuracy: float, macs: float, outcome: str = "finished") -> Trial:
    return Trial(number, {}, outcome=outcome, values={"val_accuracy": accuracy, "macs": macs})  # type: ignore[arg-type]


def test_winners_are_the_best_or_those_that_nothing_beats() -> None:
    trials = [ended(0, 90, 50), ended(1, 95, 90), ended(2, 95, 80), ended(3, 80, 60), ended(4, 90, 50)]
    trials += [ended(5, 99, 10, "over"), ended(6, 99, 10, "stopped")]
    assert [trial.number for trial in Objective(goals=("accuracy",)).winners(trials)] == [2]
    assert [trial.number for trial in Objective(goals=("accuracy", "macs")).winners(trials)] == [2, 0]


def test_the_key_that_matters_is_told_and_one_that_never_changed_is_left_out() -> None:
    trials = []
    for number in range(16):
        first, second = number % 4 / 4 + 0.25, number // 4 / 4 + 0.25
        trial = ended(number, 90 + 8 * first, 50 * second)
        trial.params = {"stages.a.width": first, "stages.b.width": second, "stages.c.width": 0.5}
        trials.append(trial)
    choices = (0.25, 0.5, 0.75, 1.0)
    space = Space("own", tuple(Parameter(key=f"stages.{name}.width", choices=choices) for name in "abc"))
    found = importances(trials, space, ALL)
    assert found["val_accuracy"]["stages.a.width"] > 0.9 and found["macs"]["stages.b.width"] > 0.9
    assert "stages.c.width" not in found["macs"]
    assert importances(trials[:7], space, ALL) == {}


# Drawing


SMALL = Space(
    "own",
    (
        Parameter(key="stages.blocks.width.1", choices=(0.5, 0.75)),
        Parameter(key="stages.blocks.width.3", choices=(0.5, 0.75)),
        Parameter(key="stages.recovered.temperature", choices=(2.0, 4.0)),
    ),
)
ALL = Objective(goals=("accuracy", "macs"))


def record_of(folder: Path, sampler: str, trials: int = 8, name: str = "own") -> SearchRecord:
    record = SearchRecord(Store(folder), name)
    record.begin({"sampler": sampler, "seed": 0, "trials": trials})
    return record


def drain(
    record: SearchRecord, subject: Subject, objective: Objective = ALL, space: Space = SMALL
) -> list[Trial]:
    trials, ran = open_trials(record, subject, space, objective), []
    trials.deal(2)
    while (found := trials.next()) is not None:
        trial, plan = found
        values = {"val_accuracy": 10.0 * trial.number, "macs": float(plan.macs or 0)}
        ran.append(record.add_result(trial.number, "finished", values=values))
        trials.tell(trial)
    return ran


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "fixed"])
def test_no_trial_is_drawn_twice_and_a_small_space_is_drawn_whole(
    sampler: str, digits: Subject, tmp_path: Path
) -> None:
    ran = drain(record_of(tmp_path, sampler, trials=20), digits)
    assert len({str(trial.params) for trial in ran}) == len(ran) == 8


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "fixed"])
def test_what_breaks_the_macs_limit_is_recorded_and_not_run(
    sampler: str, digits: Subject, tmp_path: Path
) -> None:
    sizes = sorted(
        digits.plan(params).macs or 0 for params in ({"stages.blocks.width.1": w} for w in (0.5, 0.75))
    )
    record = record_of(tmp_path, sampler, trials=8)
    ran = drain(record, digits, Objective(goals=("accuracy",), max_macs=(sizes[0] + sizes[1]) / 2))
    over = [trial for trial in record.trials.values() if trial.outcome == "over"]
    assert ran and over and not any(trial.is_counted for trial in over)
    assert {trial.params["stages.blocks.width.1"] for trial in ran} == {0.5}


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "fixed"])
def test_a_driver_that_was_killed_left_its_trials_to_the_next(
    sampler: str, digits: Subject, tmp_path: Path
) -> None:
    record = record_of(tmp_path, sampler)
    trials = open_trials(record, digits, SMALL, ALL)
    begun = [trials.next() for _ in range(3)]
    first = begun[0]
    assert first is not None
    record.add_result(first[0].number, "finished", values={"val_accuracy": 1.0, "macs": 2.0})
    again = SearchRecord(Store(tmp_path), "own")
    ran = drain(again, digits)
    assert [trial.number for trial in ran if trial.number < 3] == sorted(
        trial.number for found in begun[1:] if found is not None for trial in found[:1]
    ) or sampler == "fixed"
    assert {trial.outcome for trial in again.trials.values()} == {"finished"}
    assert len(ran) == 7 and len(again.trials) == 8


def test_a_list_is_the_same_again_and_the_beginning_of_a_longer_one(digits: Subject, tmp_path: Path) -> None:
    short, long = record_of(tmp_path, "fixed", 4, "short"), record_of(tmp_path, "fixed", 8, "long")
    drain(short, digits)
    drain(long, digits)
    assert [trial.params for trial in short.trials.values()] == [
        trial.params for trial in long.trials.values()
    ][:4]


def test_a_list_goes_through_the_tree_of_stages_a_part_for_each_hand(digits: Subject, tmp_path: Path) -> None:
    record = record_of(tmp_path, "fixed")
    drawn = Drawn(record, digits, SMALL, ALL)
    Listed(drawn, record)
    plans = [(trial, digits.plan(trial.params)) for trial in record.trials.values()]
    one = [plan.keys for _, plan in dealt(plans, 1)]
    assert all(one.count(keys) == 1 for keys in one)
    for depth in range(len(one[0])):  # equal beginnings stand together: no stage is left and come back to
        seen = [keys[: depth + 1] for keys in one]
        assert sum(here != before for here, before in zip(seen[1:], seen, strict=False)) == len(set(seen)) - 1
    two = [plan.keys for _, plan in dealt(plans, 2)]
    assert two[0::2] + two[1::2] == one


def test_a_search_that_was_begun_differently_is_refused_once_something_ran(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = SearchRecord(store, "s")
    record.begin({"seed": 0, "trials": 4, "parameters": {"a": [1, 2]}})
    record.add_trial(0, {"a": 1}, [])
    SearchRecord(store, "s").begin({"seed": 1, "trials": 4, "parameters": {"a": [1, 2]}})
    record = SearchRecord(store, "s")
    assert record.trials == {}
    record.add_trial(0, {"a": 1}, [])
    store.journal("s.0000").append({"type": "pipeline"})
    record.begin({"seed": 1, "trials": 9, "parameters": {"a": [1, 2]}})  # it may grow
    with pytest.raises(UserError, match=r"parameters\.a was \[1,2\], is \[1,3\]"):
        SearchRecord(store, "s").begin({"seed": 1, "trials": 9, "parameters": {"a": [1, 3]}})


# Measuring alone


def is_locked(path: Path) -> bool:
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_trainings_of_all_searches_go_together_and_a_measurement_alone_and_in_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    order = list[str]()

    def measure() -> None:
        with Quiet().alone():
            order.append("measured")

    def train() -> None:
        with Quiet().together():
            order.append("trained")

    with Quiet().together():
        train()
        threads = [threading.Thread(target=measure)]
        threads[0].start()
        turnstiles = tmp_path / "pbkd"
        until(lambda: any(map(is_locked, turnstiles.glob(".turnstile-*"))), "the measurement to wait")
        with Quiet().briefly():
            order.append("written")
        threads.append(threading.Thread(target=train))
        threads[1].start()
        assert order == ["trained", "written"]
    for thread in threads:
        thread.join()
    assert order == ["trained", "written", "measured", "trained"]


# Stopping early


def stage_of(subject: Subject, name: str) -> Any:
    return subject.graph.nodes[name]


def manifest_of(history: list[dict[str, float]], accuracy: float) -> Any:
    return SimpleNamespace(history=history, metrics={"val_accuracy": accuracy})


def test_a_stage_that_somebody_else_ran_is_told_epoch_by_epoch_like_an_own_one(
    digits: Subject, tmp_path: Path
) -> None:
    touched = open_space("pruning_ratios", digits).touches(digits)
    rows = [{"step": 28.0 * epoch, "epoch": epoch, "val_accuracy": 50.0 + epoch} for epoch in (1, 2)]
    told = []
    for is_own in (True, False):
        watcher = Watcher(digits.graph, touched, Objective(goals=("accuracy",)), Store(tmp_path))
        watcher.finished(stage_of(digits, "distilled"), "reused", manifest_of(rows, 90.0))  # as in all trials
        watcher.finished(stage_of(digits, "pruned"), "ran", manifest_of([], 40.0))
        for row in rows if is_own else ():
            watcher.progress(stage_of(digits, "restabilized"), row)
        outcome: Any = "ran" if is_own else "reused"
        watcher.finished(stage_of(digits, "restabilized"), outcome, manifest_of(rows, 52.0))
        last = [{"step": 28.0 * epoch, "epoch": epoch, "val_accuracy": 60.0 + epoch} for epoch in (13, 14)]
        watcher.finished(stage_of(digits, "recovered"), outcome, manifest_of(last, 74.0))
        told.append([(report["progress"], report["val_accuracy"]) for report in watcher.untold])
    # Of the last stage not the end: then there is nothing left to stop.
    assert told[0] == told[1] == [(1.0, 40.0), (2.0, 51.0), (3.0, 52.0), (16.0, 73.0)]


def test_a_trial_that_falls_behind_what_earlier_drivers_saw_is_stopped_in_mid_stage(tmp_path: Path) -> None:
    record = record_of(tmp_path, "fixed")
    late: Any = SimpleNamespace(trial_id="late")
    nobody: Any = None

    def verdicts(*reports: tuple[float, float]) -> list[str]:
        asha = scheduler_of(record, 14, early_stop=True)
        asha.on_trial_add(nobody, late)
        told = [{TIME: progress, METRIC: accuracy} for progress, accuracy in reports]
        return [asha.on_trial_result(nobody, late, report) for report in told]

    falls_behind = [(2.5, 60.0), (3.5, 10.0), (4.5, 10.0)]
    assert verdicts(*falls_behind) == ["CONTINUE"] * 3
    for number, outcome in enumerate(("finished", "stopped", "running")):
        record.add_trial(number, {"a": number}, [])
        for progress in (1.0, 2.0, 3.0, 4.0):
            record.add_report(number, progress, 40.0 + 10.0 * number + progress)
        if outcome != "running":  # it will report again
            record.add_result(number, outcome)  # type: ignore[arg-type]
    record = SearchRecord(Store(tmp_path), "own")
    # Rungs are at 1, 2, 4, ...; what comes between two is held against nobody.
    assert verdicts(*falls_behind) == ["CONTINUE", "CONTINUE", "STOP"]
    assert verdicts((1.0, 45.9)) == ["STOP"] and verdicts((1.0, 46.1)) == ["CONTINUE"]


def test_a_stage_counts_as_run_if_any_attempt_of_the_trial_ran_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    journal = store.journal("own.0003")
    for first, second in (("ran", "reused"), ("reused", "ran")):
        journal.append({"type": "pipeline"})
        journal.append({"type": "finished", "name": "teacher", "key": "aa", "state": first})
        journal.append({"type": "finished", "name": "pruned", "key": "bb", "state": second})
    journal.append({"type": "finished", "name": "recovered", "key": "cc", "state": "reused"})
    stages = {"teacher": "aa", "pruned": "bb", "recovered": "cc"}
    assert reached(store, "own", 3) == (stages, ["teacher", "pruned"])
