"""A real browser on a real pipeline: the demo's, shrunk, as `pbkd run` and `pbkd ui` leave and serve it."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from tests.integration.pbkd_process import ROOT
from tests.reference_stores import Demo

SCREENSHOTS = ROOT / "build" / "screenshots"
SECONDS = 120_000.0  # milliseconds: of a busy machine


@dataclass
class Seen:
    """A page, and what went on while it was looked at.

    Attributes:
        complaints: errors and warnings on its console.
        broken: what its scripts raised.
        asked: addresses it asked for.
    """

    page: Page
    complaints: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def hear(self, said: ConsoleMessage) -> None:
        """Keep an error or a warning."""
        if said.type in ("error", "warning"):
            self.complaints.append(said.text)

    @property
    def hosts(self) -> set[str]:
        """Whom it asked over a network."""
        return {urlsplit(url).netloc for url in self.asked if url.startswith(("http", "ws"))}

    def keep(self, name: str, full: bool = True) -> None:
        """Keep a screenshot."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=full)


Look = Callable[..., Seen]


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Root, as in containers, cannot have Chromium's sandbox.
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        yield playwright.chromium.launch(executable_path=shutil.which("chromium"), args=sandbox)


@pytest.fixture
def look(browser: Browser) -> Iterator[Look]:
    """Open an address in a window of so many pixels, in a light or a dark room."""
    contexts = []

    def look(url: str, width: int = 1440, height: int = 1000, dark: bool = False) -> Seen:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        contexts.append(context)
        context.set_default_timeout(SECONDS)
        seen = Seen(context.new_page())
        seen.page.on("console", seen.hear)
        seen.page.on("pageerror", lambda error: seen.broken.append(str(error)))
        seen.page.on("request", lambda request: seen.asked.append(request.url))
        seen.page.goto(url)
        return seen

    yield look
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def mlflow_pages(demo: Demo) -> Iterator[dict[str, str]]:
    """The addresses that `pbkd ui` prints, by what it says of them, while it serves."""
    program, *arguments = demo.ui
    assert (program, arguments[0]) == ("pbkd", "ui")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pipelines.cli", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "Ctrl-C ends the server\n")
        yield dict(line.strip().split(": ", 1) for line in lines)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
