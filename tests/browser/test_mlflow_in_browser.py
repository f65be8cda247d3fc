"""MLflow as a person meets it who types what the demo's last line says, and opens what that prints."""

import json

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import SECONDS, Look, Seen
from tests.reference_stores import Demo

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]  # the first one makes the demo


def sees(page: Page, text: str) -> None:
    """Wait until it is there."""
    expect(page.get_by_text(text, exact=True).first).to_be_visible(timeout=SECONDS)


def is_clean(seen: Seen, mlflow_pages: dict[str, str]) -> None:
    """Nobody but the server was asked for anything, and no script broke."""
    assert seen.hosts == {mlflow_pages["all of MLflow"].removeprefix("http://")}
    assert seen.broken == []


def test_the_compare_page_shows_every_stage_with_its_metrics(
    demo: Demo, mlflow_pages: dict[str, str], look: Look
) -> None:
    seen = look(mlflow_pages["compare the stages and baselines"], height=2400)
    sees(seen.page, "Comparing 16 Runs from 1 Experiment")
    for text in ("teacher", "blocks.1", "scratch", "MACs", "Parameters"):
        sees(seen.page, text)
    for metric in ("accuracy", "agreement", "ece", "feature_error_1"):
        link = seen.page.get_by_role("link", name=metric, exact=True)
        expect(link).to_be_visible(timeout=SECONDS)
    lines = demo.page.with_name("journal.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    key = next(record["key"] for record in records if record.get("name") == "teacher")
    teacher = json.loads((demo.store / "manifests" / f"{key}.json").read_text())["metrics"]
    sees(seen.page, f"{teacher['test_accuracy']:.4g}")
    expect(seen.page.locator(".js-plotly-plot").first).to_be_visible(timeout=SECONDS)
    axes = seen.page.locator(".js-plotly-plot .axis-title")
    expect(axes).to_have_text(["MACs", "Parameters", "Stage", "val_accuracy"], timeout=SECONDS)
    seen.keep("mlflow-compare", full=False)
    is_clean(seen, mlflow_pages)


def test_accuracy_against_macs_is_drawn_without_set_up(mlflow_pages: dict[str, str], look: Look) -> None:
    seen = look(mlflow_pages["accuracy against MACs"], width=1800)
    sees(seen.page, "macs vs. test_accuracy")
    points = seen.page.locator(".scatterlayer .point")
    expect(points).to_have_count(16, timeout=SECONDS)
    seen.keep("mlflow-scatter", full=False)
    is_clean(seen, mlflow_pages)


def test_the_pipelines_page_has_the_report_its_figures_and_the_data(
    mlflow_pages: dict[str, str], look: Look
) -> None:
    seen = look(mlflow_pages["the pipeline, its report and figures"])
    sees(seen.page, "report_figures")
    seen.page.get_by_text("report.html", exact=True).click()
    frame = seen.page.frame_locator("iframe").first
    expect(frame.get_by_role("heading", name="digits")).to_be_visible(timeout=SECONDS)
    seen.keep("mlflow-report", full=False)
    seen.page.get_by_role("tab", name="Overview").click()
    sees(seen.page, "recovered")
    expect(seen.page.get_by_text("digits (", exact=False).first).to_be_visible(timeout=SECONDS)
    expect(seen.page.get_by_text("The student, recovered,", exact=False).first).to_be_visible(timeout=SECONDS)
    seen.keep("mlflow-pipeline", full=False)
    is_clean(seen, mlflow_pages)


def test_the_registry_has_the_champion_with_a_description_and_what_goes_in_and_out(
    mlflow_pages: dict[str, str], look: Look
) -> None:
    seen = look(f"{mlflow_pages['all of MLflow']}/#/models/digits")
    sees(seen.page, "@ champion")
    seen.keep("mlflow-registry", full=False)
    seen.page.get_by_text("Version 1", exact=True).click()
    expect(seen.page.get_by_text("on the test set", exact=False).first).to_be_visible(timeout=SECONDS)
    sees(seen.page, "Inputs (1)")
    sees(seen.page, "Outputs (2)")
    seen.keep("mlflow-version", full=False)
    is_clean(seen, mlflow_pages)
