"""How long one waits for a report: `pbkd report` of a pipeline of 20 stages, and its page in a browser.

    python -m benchmarks.report_times [--rounds 5]

Runs the demo's smoke form and four stages more in a store of its own, which takes two minutes, then times the
whole command as it is typed, and the opening of the page, until all of it is loaded and painted, in a new
window of headless Chromium. Writes medians, and the processor's seconds of a report, to
benchmarks/results/report_times.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from pipelines.jobs import processor

RECIPE = Path(__file__).parents[1] / "pipelines" / "recipes" / "digits.yaml"
MORE = 4
OVERRIDES = (
    "smoke=true",
    "compute.executor=local",
    *(
        f"stages.more{number}.{setting}"
        for number in range(MORE)
        for setting in ("kind=distill", "from=distilled", "epochs=1", f"alpha=0.{number + 1}")
    ),
)
RESULTS = Path(__file__).parent / "results" / "report_times.csv"
COLUMNS = (
    "what", "stages", "seconds", "low", "high", "cpu_seconds", "rounds", "megabytes", "processor", "cores",
    "date",
)  # fmt: skip
PAINTED = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def main() -> None:
    """The command."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--rounds", type=int, default=5)
    rounds: int = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as store:
        ran = json.loads(pbkd("run", str(RECIPE), *OVERRIDES, "--store", store, "--json"))
        made, before = [], cpu_seconds()
        for _ in range(rounds):
            begun = time.perf_counter()
            page = Path(pbkd("report", "--store", store).strip())
            made.append(time.perf_counter() - begun)
        cpu = (cpu_seconds() - before) / rounds
        opened = openings(page, rounds)
        megabytes = page.stat().st_size / 1e6
    about = {"stages": len(ran["stages"]), "rounds": rounds, "megabytes": f"{megabytes:.2f}"}
    about |= {"processor": processor(), "cores": os.cpu_count()}
    about |= {"date": datetime.now(UTC).date().isoformat()}
    rows = []
    for what, seconds, cpu_time in (("pbkd report", made, f"{cpu:.2f}"), ("the page opens", opened, "")):
        times = {"seconds": statistics.median(seconds), "low": min(seconds), "high": max(seconds)}
        rows.append(
            {"what": what, "cpu_seconds": cpu_time}
            | {name: f"{value:.2f}" for name, value in times.items()}
            | about
        )
        sys.stdout.write(
            f"{what:<16}{times['seconds']:6.2f} s  ({times['low']:.2f} to {times['high']:.2f})\n"
        )
    sys.stdout.write(f"{about['stages']} stages, {megabytes:.2f} MB\n")
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def cpu_seconds() -> float:
    """Of all processes that this one has waited for: on a busy machine it says more than the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def pbkd(*arguments: str) -> str:
    """What a command says on stdout."""
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def openings(page: Path, rounds: int) -> list[float]:
    """Seconds from asking for the page to having it painted, each time in a new window."""
    from playwright.sync_api import sync_playwright

    found = []
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # root cannot have Chromium's
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=sandbox)
        for _ in range(rounds):
            window = browser.new_context(viewport={"width": 1440, "height": 1000}).new_page()
            begun = time.perf_counter()
            window.goto(page.as_uri(), wait_until="load")
            window.evaluate(PAINTED)
            found.append(time.perf_counter() - begun)
            window.context.close()
        browser.close()
    return found


if __name__ == "__main__":
    main()
