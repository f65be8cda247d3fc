"""The report: one page with all a store knows of a pipeline; it loads nothing and says what is missing."""

import json
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from pipelines.cli import main
from pipelines.report import gather, shock_groups
from pipelines.report_page import NOTHING, headline, render
from pipelines.store import Input, Manifest, Store
from tests.integration.recorded_pipeline import digest, journal_of, publish

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
        metrics={"test_accuracy": accuracy, "macs": macs, "params": macs // 10, "agreement": None},
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
    return render(gather(store, PIPELINE))


class Page(HTMLParser):
    """What a browser would make of it: tags, attributes, text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += f"{data}\n"


def test_the_page_holds_every_stage_its_key_and_every_figure(store: Store, html: str) -> None:
    page = Page(html)
    for name, kind, *_ in STAGES:
        assert f"\n{name}\n" in page.text and kind in page.text
        assert digest("key", name)[:12] in page.text and f"artifacts/{digest('artifact', name)}" in page.text
    assert "\n4.00x\n" in page.text, "multiply-accumulates, the pruned network's to the teacher's"
    curves = len(STAGES) - len(UNTRAINED)
    assert page.tags.count("svg") == 1 + 2 * len(shock_groups(gather(store, PIPELINE))) + curves
    assert digest("data") in page.text and "c0ffee" in page.text and "torch 2" in page.text
    assert f"pbkd run {store.root}/pipelines/{PIPELINE}/recipe.yaml --store {store.root}" in page.text


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
        assert page.text.count(label) == 2, "in the legends of both figures"
    for cell in ("8.000", "0.5000", "0.7500"):  # of the table: norms, and least and final CKA
        assert f"\n{cell}\n" in page.text


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


def test_what_the_user_named_is_text_never_markup(tmp_path: Path) -> None:
    store = Store(tmp_path / "runs")
    odd = "<i>a&b</i>$x$"
    begin(store, name="<b>R&D</b>", extra=(odd,), baselines=[odd], recipe={"data": {"name": "<u>&</u>"}})
    finish(store, "teacher")
    finish(store, "one_stage", called=odd)
    page = Page(render(gather(store, PIPELINE)))
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
        row = {"step": 7 * next(times), "epoch": 0.5, "train_loss": 2.0}
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
    page = Page(render(facts))
    assert "This pipeline is not finished:" in page.text and "1 of 7 stages" in page.text
    assert "at epoch 0.5" in page.text and "The student, two_stage, is not finished yet" in page.text
    assert page.tags.count("svg") == 1 + 3, "curves of the teacher and of what has begun"


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
    assert json.loads(capfd.readouterr().out) == {"path": str(out), "pipeline": PIPELINE}
    assert out.read_text("utf-8") == html


MISTAKES = {
    "no store": (["--store", "nowhere"], "store nowhere: there is none"),
    "no pipeline": (["--store", "empty"], "no pipeline was run in it yet; start one: pbkd run RECIPE"),
    "unknown id": (["ffff"], f"no single pipeline 'ffff'; it has {PIPELINE}, {EARLIER}"),
    "two fit": (["0a1b"], "no single pipeline '0a1b'; it fits 2 of them"),
    "nothing finished": ([EARLIER], f"pipeline {EARLIER} (digits) has no finished stage yet, of 7"),
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
