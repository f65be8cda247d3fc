"""The report: one page with all a store knows of a pipeline; it loads nothing and says what is missing."""

import json
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.cli import main
from pipelines.manifest import Input, Manifest
from pipelines.reporting.facts import gather, shock_groups
from pipelines.reporting.page import NOTHING, compose, headline
from pipelines.reporting.tree import tree
from pipelines.reporting.write import write
from pipelines.store import Store
from tests.integration.recorded_pipeline import digest, journal_of, publish

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PIPELINE, EARLIER, START = "0a1b2c3d4e5f", "0a1b00000000", 1_763_000_000.25

# name, kind, from, test accuracy, multiply-accumulates
STAGES = [
    ("teacher", "train", None, 98.5, 2000),
    ("blocks.1", "block", "teacher", 97.0, 1000),
    ("stabilized", "stabilize", "blocks.1", 97.2, 1000),
    ("two_stage", "distill", "stabilized", 98.25, 1000),
    ("one_stage", "distill", "blocks.1", 98.0, 1000),
    ("pruned", "prune", "teacher", 11.5, 500),
    ("recovered", "distill", "pruned", 97.5, 500),
]
SHOCK = ("two_stage", "one_stage", "recovered")
UNTRAINED = ("pruned",)


def manifest_of(name: str) -> Manifest:
    _, kind, source, accuracy, macs = next(stage for stage in STAGES if stage[0] == name)
    history: list[dict[str, Any]] = [
        {"step": 14 * epoch, "epoch": float(epoch), "train_loss": 1 / epoch, "val_accuracy": 90.0}
        for epoch in ([] if name in UNTRAINED else [1, 2])
    ]
    if name in SHOCK:
        history += [{"step": step, "epoch": step / 14, "gradient_norm": 8.0 / step} for step in (1, 2, 3)]
        history += [{"step": step, "feature_cka": cka} for step, cka in ((1, 0.5), (28, 0.75))]
    if kind == "block":
        for row in history:
            row["train_local_loss"] = 0.1 / row["epoch"]
    return Manifest(
        key=digest("key", name),
        kind=kind,
        settings={},
        inputs=[Input(role="from", key=digest("key", source))] if source else [],
        data_digest=digest("data"),
        seed=0,
        compute={"precision": "fp32"},
        artifact=digest("artifact", name),
        digest=digest("weights", name),
        metrics={"test_accuracy": accuracy, "macs": macs, "params": macs // 10, "agreement": None}
        | ({"feature_error_1": 0.0125, "feature_error_2": 0.5} if source else {}),
        history=history,
        seconds=12.3,
        versions={"torch": "2"},
        machine={"cores": 2},
        git="c0ffee",
        created=START,
    )


def begin(store: Store, pipeline: str = PIPELINE, extra: tuple[str, ...] = (), **changes: Any) -> None:
    record = {"type": "pipeline", "id": pipeline, "name": "digits", "recipe": {"data": {"name": "digits"}}}
    record |= {"teacher": "teacher", "student": "two_stage", "baselines": ["one_stage"], "time": START}
    names = [name for name, *_ in STAGES] + list(extra)
    journal_of(store, pipeline).append(record | {"stages": names} | changes)


def finish(store: Store, name: str, called: str | None = None) -> None:
    manifest = manifest_of(name)
    publish(store, manifest)
    record = {"type": "finished", "name": called or name, "key": manifest.key, "state": "ran"}
    journal_of(store).append(record)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Of a finished pipeline, and one that has only begun."""
    store = Store(tmp_path_factory.mktemp("store") / "runs")
    begin(store, EARLIER)
    begin(store)
    for name, *_, macs in STAGES:
        finish(store, name)
        latencies = {"latency_ms": macs / 1000, "latency_ms_batch32": macs / 100, "latency_ms_compiled": None}
        journal_of(store).append({"type": "latency", "key": digest("key", name), "latencies": latencies})
    journal_of(store).append({"type": "ended", "status": "finished"})
    return store


@pytest.fixture(scope="module")
def html(store: Store) -> str:
    return compose(gather(store, PIPELINE)).html


class Page(HTMLParser):
    """What a browser would make of it: tags, attributes, text, and the stages whose points figures have."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.points: dict[tuple[str, str], list[str]] = {}
        self._figure, self._width = "", ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.attributes += list(found.items())
        if tag == "figure":
            self._figure, self._width = found["id"], "both"
        if tag == "div" and found.get("class") in ("wide", "narrow"):
            self._width = found["class"]
        if tag == "svg":
            self.points[self._figure, self._width] = []
        if "data-stage" in found:
            self.points[self._figure, self._width].append(found["data-stage"])

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def test_the_page_holds_every_stage_and_its_key(store: Store, html: str) -> None:
    page = Page(html)
    for name, kind, *_ in STAGES:
        assert f"\n{name}\n" in page.text and kind in page.text
        assert digest("key", name)[:12] in page.text and f"artifacts/{digest('artifact', name)}" in page.text
    assert "\n4.00x\n" in page.text, "multiply-accumulates, the pruned network's to the teacher's"
    assert digest("data") in page.text and "c0ffee" in page.text and "torch 2" in page.text
    assert f"pbkd run {store.root}/pipelines/{PIPELINE}/recipe.yaml --store {store.root}" in page.text


def test_charts_have_a_point_for_every_stage_on_every_screen(html: str) -> None:
    points, names = Page(html).points, sorted(name for name, *_ in STAGES)
    for chart in ("pipeline", "accuracy_macs", "accuracy_latency", "accuracy_latency_batch32"):
        assert sorted(points[chart, "wide"]) == sorted(points[chart, "narrow"]) == names
    # Nothing but the teacher's agreement and KL is known of these: see `manifest_of`.
    assert set(points["feature_error", "wide"]) == set()
    curves = {figure for figure, _ in points if figure.startswith("curves")}
    assert len(curves) == len(STAGES) - len(UNTRAINED)


def test_the_tree_forks_where_the_pipeline_does_and_follows_the_student_first(store: Store) -> None:
    placed = [(name, branch.lane, branch.source) for name, branch in tree(gather(store, PIPELINE)).items()]
    assert placed == [
        ("teacher", 0, None),
        ("blocks.1", 1, "teacher"),
        ("stabilized", 2, "blocks.1"),
        ("two_stage", 2, "stabilized"),
        ("one_stage", 2, "blocks.1"),
        ("pruned", 1, "teacher"),
        ("recovered", 1, "pruned"),
    ]


def test_every_figure_of_the_page_is_a_file_too(store: Store, tmp_path: Path) -> None:
    stale = tmp_path / "page_figures" / "of_an_earlier_report.png"
    stale.parent.mkdir()
    stale.touch()
    written = write(compose(gather(store, PIPELINE)), tmp_path / "page.html")
    names = ["pipeline", "accuracy_macs", "accuracy_latency", "accuracy_latency_batch32", "feature_error"]
    names += ["shock_1", "shock_2", "local_loss_1", "curves"]
    assert [path.name for path in written.figures] == [f"{name}.png" for name in names]
    assert sorted(stale.parent.iterdir()) == sorted(written.figures)
    for path in written.figures:
        with Image.open(path) as image:
            assert min(image.size) > 100 and len(image.convert("L").getcolors() or []) > 10, "not blank"


def test_the_page_loads_nothing(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    loaded = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert loaded and all(value.startswith("#") for value in loaded)
    assert "http" not in html and "@import" not in html
    assert html.count("url(") == html.count("url(#")


def test_figures_refer_to_their_own_parts_only(html: str) -> None:
    page = Page(html)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for name, value in page.attributes if name == "xlink:href"} <= set(ids)


def test_stages_with_and_without_stabilization_are_drawn_together(store: Store, html: str) -> None:
    groups = shock_groups(gather(store, PIPELINE))
    found = [[(shock.stage.name, shock.origin, shock.stabilized) for shock in group] for group in groups]
    assert found == [
        [("two_stage", "blocks.1", 28), ("one_stage", "blocks.1", 0)],
        [("recovered", "pruned", 0)],
    ]
    page = Page(html)
    for label in ("two_stage: with stabilization (28 steps)", "one_stage: without stabilization"):
        assert page.text.count(label) == 2, "in the legends for wide screens and for phones"
    for cell in ("8.000", "0.5000", "0.7500"):  # of the table: norms, and least and final CKA
        assert f"\n{cell}\n" in page.text
    assert "Recorded with stabilization alone" not in page.text


def test_of_gradient_shock_what_was_not_recorded_is_said_with_what_would_bring_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    begin(store)
    assert "Not recorded: no stage of the recipe has shock: true" in compose(gather(store, PIPELINE)).html
    begin(store, recipe={"stages": {"two_stage": {"kind": "distill", "shock": True}}})
    assert "Not recorded yet: two_stage will, once begun." in compose(gather(store, PIPELINE)).html
    for name in ("teacher", "blocks.1", "stabilized", "two_stage"):
        finish(store, name)
    assert "by a stage with from: blocks.1 and shock: true" in compose(gather(store, PIPELINE)).html


def test_the_student_is_compared_with_the_teacher(store: Store) -> None:
    said = headline(gather(store, PIPELINE)).replace("\N{NO-BREAK SPACE}", " ")
    assert "two_stage, reaches 98.25 % on the test set, the teacher 98.50 % (−0.25)" in said
    assert "2.00x fewer multiply-accumulates and 2.00x fewer parameters" in said
    assert "2.00x as fast (one image in 1.00 ms instead of 2.00 ms)" in said


def test_values_that_were_not_measured_are_missing_and_what_is_there_shows(store: Store, html: str) -> None:
    teacher = gather(store, PIPELINE).stages["teacher"]
    names = ("latency_ms_batch32", "latency_ms_compiled", "nll", "agreement", "memory_peak_mb")
    assert [teacher.value(name) for name in names] == [20.0, None, None, None, None]
    assert f"<td>{NOTHING}</td>" in html and "compiled" not in html


def test_exported_files_are_listed_with_their_parity_and_latency(tmp_path: Path, html: str) -> None:
    assert "Exported files" not in html
    store = Store(tmp_path / "runs")
    begin(store)
    finish(store, "teacher")
    facts: dict[str, Any] = {"stage": "teacher", "stage_key": digest("key", "teacher"), "bytes": 1_234_567}
    facts |= {"max_abs_diff": 2e-6, "agreement": 99.5, "images": 100, "compared_on": "test images"}
    facts |= {"path": "/e/model.onnx", "format": "onnx", "fp16": False, "dynamic_batch": True, "threads": 2}
    for latency in ({"file": 9.0, "pytorch": 9.0}, {"file": 0.31, "pytorch": 1.72}):
        journal_of(store).append({"type": "export", **facts, "latency_ms": latency})
    other = facts | {"path": "/e/model.safetensors", "format": "safetensors", "fp16": True}
    journal_of(store).append({"type": "export", **other, "latency_ms": None})
    cells = Page(compose(gather(store, PIPELINE)).html).text.partition("Exported files")[2].split("\n")
    said = [cell for cell in cells if cell]
    row = ["teacher", "onnx", "1.23", "0.31", "1.72", "2.0e-06", "99.50", "test images", "/e/model.onnx"]
    first = said.index("teacher")
    assert said[first : first + 9] == row
    assert said[first + 9 : first + 14] == ["teacher", "safetensors, fp16", "1.23", NOTHING, NOTHING]
    assert said.count("/e/model.onnx") == 1, "another export to the same folder replaces the first"


def test_what_the_user_named_is_text_never_markup(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    odd = "<i>a&b</i>$x$"
    begin(store, name="<b>R&D</b>", extra=(odd,), baselines=[odd], recipe={"data": {"name": "<u>&</u>"}})
    finish(store, "teacher")
    finish(store, "one_stage", called=odd)
    page = Page(compose(gather(store, PIPELINE)).html)
    assert not {"i", "b", "u"} & set(page.tags)
    assert all(text in page.text for text in ("<b>R&D</b>", "<u>&</u>", f"98.00  {odd}"))
    assert f"Training loss and validation accuracy of {odd} over epochs" in dict.fromkeys(
        value for name, value in page.attributes if name == "aria-label"
    )


def test_an_unfinished_pipeline_is_reported_as_far_as_it_is(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    begin(store, recipe={"stages": {"blocks": {"kind": "progressive"}, "pruned": {"kind": "prune"}}})
    journal, times = journal_of(store), count(1)
    finish(store, "teacher")
    for name in ("stabilized", "two_stage"):
        key = digest("key", name)
        started = {"type": "started", "name": name, "key": key, "kind": "distill", "params": {}, "inputs": []}
        journal.append(started)
        if name == "stabilized":
            journal.append({"type": "ended", "status": "stopped"})
            begin(store, recipe={"stages": {"pruned": {"kind": "prune"}}})
        row = {"time": START, "step": 7 * next(times), "epoch": 0.5, "train_loss": 2.0}
        journal.append({"type": "progress", "key": key, "row": row})
    finish(store, "one_stage")
    (store.root / "manifests" / f"{digest('key', 'one_stage')}.json").unlink()
    facts = gather(store, PIPELINE)
    states = {stage.name: stage.state for stage in facts.stages.values()}
    assert states == {
        "teacher": "finished",
        "blocks.1": "not begun",
        "stabilized": "interrupted",
        "two_stage": "running",
        "one_stage": "removed",
        "pruned": "not begun",
        "recovered": "not begun",
    }
    assert facts.status is None and facts.stages["pruned"].kind == "prune"
    page = Page(compose(facts).html)
    assert "This pipeline is not finished:" in page.text and "1 of 7 stages" in page.text
    assert "at epoch 0.5" in page.text and "The student, two_stage, is not finished yet" in page.text
    curves = [figure for figure, _ in page.points if figure.startswith("curves")]
    assert len(curves) == 3, "of the teacher and of what has begun"


def test_a_pipeline_that_failed_at_its_first_stage_has_a_page_that_says_why(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    begin(store)
    journal, key = journal_of(store), digest("key", "teacher")
    journal.append(
        {"type": "started", "name": "teacher", "key": key, "kind": "train", "params": {}, "inputs": []}
    )
    journal.append({"type": "failed", "name": "teacher", "key": key, "reason": "the loss is not finite"})
    journal.append({"type": "ended", "status": "failed", "reason": "stages.teacher: the loss is not finite"})
    facts = gather(store, PIPELINE)
    assert [stage.state for stage in facts.stages.values()] == ["failed"] + ["not begun"] * 6
    page = Page(compose(facts).html)
    assert "0 of 7 stages" in page.text and "failed: the loss is not finite" in page.text
    assert "The latest run failed: stages.teacher: the loss is not finite" in page.text
    assert sorted(page.points["pipeline", "wide"]) == sorted(name for name, *_ in STAGES)
    assert "there is nothing to draw" in page.text
    begin(store)
    assert gather(store, PIPELINE).stages["teacher"].state == "interrupted", "a new run has not come to it"


def test_what_the_store_has_lost_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    begin(store)
    for name in ("teacher", "blocks.1", "stabilized", "two_stage"):
        finish(store, name)
    store.artifact(digest("artifact", "blocks.1")).rmdir()
    (store.root / "manifests" / f"{digest('key', 'stabilized')}.json").write_text("{}")
    facts = gather(store, PIPELINE)
    assert [stage.name for stage in facts.finished if not stage.has_artifact] == ["blocks.1"]
    assert facts.stages["stabilized"].state == "damaged"
    page = Page(compose(facts).html)
    assert "The store has lost the networks of blocks.1:" in page.text
    assert "its manifest cannot be read: " in page.text and "delete it: the stage will run again" in page.text
    assert "Latency was measured of no stage" in page.text
    assert "The recipe is gone from the store" in page.text
    assert sorted(page.points["accuracy_macs", "wide"]) == ["blocks.1", "teacher", "two_stage"]
    assert ("accuracy_latency", "wide") not in page.points


def test_the_command_writes_the_latest_pipeline_or_the_named_one(
    store: Store, html: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    here = ["--store", str(store.root)]
    assert main(["report", *here]) == 0
    written = Path(capfd.readouterr().out.strip())
    assert written == store.root / "pipelines" / PIPELINE / "report.html"
    assert written.read_text("utf-8") == html
    out = tmp_path / "page.html"
    assert main(["report", PIPELINE[:6], "--out", str(out), "--json", *here]) == 0
    said = json.loads(capfd.readouterr().out)
    assert (said["path"], said["pipeline"]) == (str(out), PIPELINE)
    assert said["figures"][0] == str(tmp_path / "page_figures" / "pipeline.png")
    assert out.read_text("utf-8") == html


MISTAKES = {
    "no store": (["--store", "nowhere"], "store nowhere: there is none"),
    "no pipeline": (["--store", "empty"], "no pipeline was run in it yet; start one: pbkd run RECIPE"),
    "unknown id": (["ffff"], f"no single pipeline 'ffff'; it has {PIPELINE}, {EARLIER}"),
    "two fit": (["0a1b"], "no single pipeline '0a1b'; it fits 2 of them"),
    "recipe not run": (
        [str(ROOT / "pipelines/recipes/digits.yaml"), "seed=7"],
        "was not run in it; it has ",
    ),
    "no recipe": (["recipes/none.yaml"], "recipes/none.yaml: cannot be read"),
    "override alone": (["seed=1"], "name its recipe before it: pbkd report RECIPE seed=1"),
    "override of an id": (["0a1b", "seed=1"], "'0a1b' is no recipe"),
    "nowhere to write": ([PIPELINE, "--out", "no/such/folder/a.html"], "folder/a.html: cannot be written"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_cure(
    mistake: str, store: Store, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.root.parent)
    Store(Path("empty"))
    arguments, message = MISTAKES[mistake]
    where = [] if "--store" in arguments else ["--store", str(store.root)]
    before = set(store.root.glob("pipelines/*"))
    assert main(["report", *arguments, *where]) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err and len(err.splitlines()) <= 3
    assert set(store.root.glob("pipelines/*")) == before
