"""The report as a person sees it: on a wide screen and a phone, in light and in dark, with no network."""

import json

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import Look
from tests.reference_stores import Demo

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]  # the first one makes the demo

PHONE, DESKTOP = 390, 1440
CHARTS = ("pipeline", "accuracy_macs", "accuracy_latency", "accuracy_latency_batch32")


def stages(demo: Demo) -> list[str]:
    """What the demo is made of, by its journal."""
    first, *_ = demo.page.with_name("journal.jsonl").read_text().splitlines()
    return sorted(json.loads(first)["stages"])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_stage_is_to_be_seen_on_any_screen(demo: Demo, look: Look, width: int, dark: bool) -> None:
    seen = look(demo.page.as_uri(), width, 900, dark)
    page = seen.page
    names = stages(demo)
    assert len(names) == 16, "of the demo"
    for chart in CHARTS:
        points = page.locator(f"#{chart} .point").filter(visible=True)
        assert sorted(points.evaluate_all("found => found.map(one => one.dataset.stage)")) == names
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing sticks out to the right"
    texts = page.locator("#pipeline svg text").filter(visible=True)
    heights = texts.evaluate_all("found => found.map(text => text.getBoundingClientRect().height)")
    assert min(heights) >= 9, "pixels; smaller letters cannot be read"
    ink, paper = (
        page.evaluate(f"getComputedStyle(document.body).{what}") for what in ("color", "backgroundColor")
    )
    assert (brightness(ink) > brightness(paper)) == dark
    colour = page.locator("#pipeline svg text").filter(visible=True, has_text="blocks.1").first
    assert colour.evaluate("text => getComputedStyle(text).fill") == ink, "figures follow the page"
    assert seen.asked == [demo.page.as_uri()], "nothing else is fetched"
    assert seen.complaints + seen.broken == []
    seen.keep(f"report-{'phone' if width == PHONE else 'desktop'}-{'dark' if dark else 'light'}")


def test_gradient_shock_of_the_distilled_stage_is_shown(demo: Demo, look: Look) -> None:
    page = look(demo.page.as_uri()).page
    page.get_by_role("link", name="Gradient shock").click()
    shock = page.locator("#shock")
    expect(shock.get_by_role("heading", name="Gradient shock")).to_be_in_viewport()
    expect(shock.locator("svg").filter(visible=True)).to_have_count(1)
    titles = [title.strip() for title in shock.locator("th").all_text_contents()]
    (row,) = shock.locator("tbody tr").all()
    said = dict(zip(titles, row.locator("td").all_text_contents(), strict=True))
    assert (said["stage"], said["before it"]) == ("distilled", "with stabilization (4 steps)")
    assert float(said["largest norm"]) >= float(said["first-step norm"]) > 0
    assert 0 < float(said["smallest CKA"]) <= float(said["final CKA"]) <= 1
    expect(shock.get_by_text("Recorded with stabilization alone.", exact=False)).to_be_visible()


def brightness(colour: str) -> int:
    """Of `rgb(1, 2, 3)`."""
    return sum(int(part) for part in colour.strip("rgb()").split(","))


def test_pointing_at_a_chart_and_following_a_link_tell_more(demo: Demo, look: Look) -> None:
    page = look(demo.page.as_uri()).page
    student = page.locator('#accuracy_macs .wide .point[data-stage="recovered"]')
    assert "recovered: " in (student.locator("title").text_content() or "")
    page.get_by_role("link", name="Reproduce").click()
    expect(page.get_by_role("heading", name="Reproduce")).to_be_in_viewport()
    page.get_by_text("The recipe as it ran").click()
    assert page.get_by_text("student: recovered").is_visible()
    assert page.get_by_text(f"--store {demo.store}").first.is_visible()
