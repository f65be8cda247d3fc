"""Every code block and every command of README, CONTRIBUTING and docs: run, or listed here with the reason.

A document is worked through from top to bottom in a folder of its own, with the recipes and a store in
which the demo was run in small. Python blocks run as one program. Of commands, `RUN` are run as they are,
with what `SHORTENED` adds to keep them short, and what is printed below them is compared, as far as it lasts;
`PLANNED` are planned, with all their arguments; the rest is in `ELSEWHERE`, where pbkd's own and the
benchmarks have their arguments read. What is in none of them fails. Of commands within a sentence the
arguments are read, too.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from pipelines.cli import _add_registered, app, main
from tests.integration.document_blocks import DOCUMENTS, ROOT, Block, blocks_of, commands_within
from tests.integration.pbkd_process import LOCAL, SMOKE

DIGITS = "pipelines/recipes/digits.yaml"
WALK = ROOT / "docs" / "guides" / "walk.md"
SMALL = (*SMOKE, LOCAL)
FEW_IMAGES = (*SMALL, "data.limit=64", "stages.pruned.init_images=64", "stages.blocks.init_images=64")

RUN = ("pbkd inspect", "pbkd init", "pbkd plan", "pbkd run", "pbkd report", "pbkd lineage", "pbkd export",
       "pbkd store")  # fmt: skip
SHORTENED = {
    f"pbkd run {DIGITS}": SMALL,
    f"pbkd report {DIGITS}": SMALL,
    "pbkd run resnet18_photos.yaml": FEW_IMAGES,
    "pbkd report resnet18_photos.yaml": FEW_IMAGES,
}
WITHOUT = ("--open",)  # no test opens a browser on the desktop of whoever runs it
# Whole commands that differ from one that is run by what is tested on its own: planned, arguments and all.
PLANNED = {
    f"pbkd run {DIGITS} seed=1": "the same again",
    f"pbkd run {DIGITS} --until distilled": "test_run",
    f"pbkd run {DIGITS} compute.fuse=false": "Ray: test_run",
    f"pbkd run {DIGITS} compute.executor=local": "as the first run, here",
    "pbkd run pipelines/recipes/cifar10_vgg16.yaml smoke=true data.root=~/data": "test_recipes: needs data",
    "pbkd run small_digits.yaml --allow-import": "test_own_module runs such a network",
    "pbkd run resnet18_photos.yaml": "run in guides/walk.md, as it must be for digits",
    "pbkd report resnet18_photos.yaml": "the same",
}
ELSEWHERE = {
    "python own_network.py": "the fixture `own` runs it, for all documents",
    "git clone": "the checkout these tests are in",
    "sudo ": "installs for the whole machine",
    "pip install": "installs; make setup does in CI",
    "export ": "settings of the shell",
    "pbkd data ": "test_data_commands: needs a CIFAR, or betons",
    "pbkd ui": "test_ui: serves until it is ended",
    "pbkd run pipelines/recipes/digits.yaml --store s3://": "test_storage: needs a bucket",
    "pbkd tune": "test_tune: minutes",
    "mlflow models serve": "test_export_command",
    "curl ": "test_export_command",
}
# Of documents that may say them or not, as long as these are written.
CLUSTERS = {
    "pbkd slurm": "tests/slurm: needs a Slurm",
    "ray ": "test_run_ray_cluster",
    "sbatch": "tests/slurm",
    "squeue": "tests/slurm",
    "scancel": "tests/slurm",
    "pbkd bench": "test_bench",
    "python -m benchmarks.": "hours; test_bench, test_paired_seeds",
}
JSON_WITH_GAPS = "…"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stranger's images and network, by the program of the walk, trained for two steps."""
    folder = tmp_path_factory.mktemp("own")
    (program,) = [block for block in blocks_of(WALK) if block.file == "own_network.py"]
    text = program.text.replace("EPOCHS = 12", "EPOCHS = 1").replace("randperm(1297)", "randperm(128)")
    (folder / "own_network.py").write_text(text)
    subprocess.run([sys.executable, "own_network.py"], cwd=folder, env=_environment(), check=True)
    return folder


@pytest.fixture
def sandbox(small_demo: dict[str, Any], own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to type in, as if it were the checkout's, with a store of its own."""
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "pipelines" / "recipes").symlink_to(ROOT / "pipelines" / "recipes")
    shutil.copytree(small_demo["store"], tmp_path / "runs")
    (tmp_path / "photos").symlink_to(own / "photos")
    (tmp_path / "resnet18.pt").symlink_to(own / "resnet18.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PBKD_ALLOW_IMPORT", "0")  # so that what --allow-import sets is taken back
    monkeypatch.delenv("PBKD_STORE", raising=False)
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
@pytest.mark.timeout(900)
def test_every_block_does_what_it_says(
    document: Path, sandbox: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = blocks_of(document)
    program = "\n".join(block.text for block in blocks if block.language == "python" and block.file is None)
    if program:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program],
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{document.name}: {done.stderr[-2000:]}"
    for block in blocks:
        if block.file is not None:
            (sandbox / block.file).write_text(block.text)
        elif block.language == "console":
            for command, printed in block.transcript():
                _typed(command, printed, block, capsys)
        elif block.language == "yaml":
            _check_recipe(block, sandbox)
        elif block.language == "json" and JSON_WITH_GAPS not in block.text:
            json.loads(block.text)
        else:
            assert block.language in ("", "json", "python"), f"{block.place}: what is {block.language}?"
            assert not block.commands(), f"{block.place}: commands belong into a console block"


def _typed(command: str, printed: list[str], block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    """Type a command of a document and compare what it prints, or plan it, or find the reason not to."""
    words = [_meant(word) for word in shlex.split(command)]
    if words[0].startswith(".venv/bin/"):
        words[0] = words[0].removeprefix(".venv/bin/")
        command = command.removeprefix(".venv/bin/")
    if words[0] == "make":
        _arguments_are_known(words)
        return
    if any(command.startswith(known) for known in [*ELSEWHERE, *CLUSTERS]):
        if words[0] == "pbkd" or words[:2] == ["python", "-m"]:
            _arguments_are_known(words)
        return
    assert command.startswith(RUN), f"{block.place}: '{command}' is neither run nor listed; see ELSEWHERE"
    words = [word for word in words[1:] if word not in WITHOUT]
    if command in PLANNED:
        words[0] = "plan"
    else:
        known = max((start for start in SHORTENED if command.startswith(start)), key=len, default=None)
        words += SHORTENED[known] if known else ()
    code = main(words)
    out, err = capsys.readouterr()
    assert code == 0, f"{block.place}: '{command}' ended with {code}: {err[-2000:]}"
    assert out.strip(), f"{block.place}: '{command}' says nothing"
    said = [lasting for line in out.splitlines() if (lasting := _lasting(words[0], line))]
    shown = [lasting for line in printed if (lasting := _lasting(words[0], line))]
    assert not shown or shown == said, f"{block.place}: '{command}' prints something else"


def _lasting(command: str, line: str) -> list[str]:
    """What of a line that `command` printed does not depend on weights, places and times; [] if nothing."""
    words = line.split()
    if command == "init":
        return words
    if command == "plan":
        return words[:-1]  # but the key
    costs = next((number for number, word in enumerate(words) if re.fullmatch(r"\d+\.\d\dx", word)), None)
    return words[: costs + 3] if command == "run" and costs is not None else []  # but accuracies and times


def _arguments_are_known(words: list[str]) -> None:
    """Read the arguments of a command, unless it is only named; raises if there is no such thing."""
    program, *arguments = words
    if program == "make":
        targets = {word for word in arguments if "=" not in word}
        assert targets <= _targets(), f"the Makefile has no {targets - _targets()}"
    elif program == "pbkd":
        _parse(arguments)
    else:
        _parse_of_module(*arguments[1:])


def _parse(words: list[str]) -> None:
    """Read a command's arguments, as it would be run, if there are any."""
    _add_registered()
    command: Any = typer.main.get_command(app)
    named, words = list(words), list(words)
    while hasattr(command, "get_command") and words:
        command = command.get_command(None, words.pop(0))
        assert command is not None, f"there is no command 'pbkd {' '.join(named)}'"
    if words:
        command.make_context("pbkd", words)


class Parsed(Exception):  # noqa: N818  # not an error
    """The arguments were read; nothing is to be run."""


def _parse_of_module(name: str, *arguments: str) -> None:
    """Read the arguments of a program of ours, if there are any, and go no further."""
    module = importlib.import_module(name)
    if not arguments:
        return

    def stopping(method: str) -> Callable[..., None]:
        parse = getattr(argparse.ArgumentParser, method)

        def parse_and_stop(parser: argparse.ArgumentParser) -> None:
            raise Parsed(parse(parser, list(arguments)))

        return parse_and_stop

    with pytest.MonkeyPatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, method, stopping(method))
        with pytest.raises(Parsed):
            module.main()


def _targets() -> set[str]:
    """What make can make. Not even a dry run: that calls make again, and so the tests."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    return set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _meant(word: str) -> str:
    """What stands for something of the reader's own, in the store of these tests."""
    keys = _keys()
    if word in ("RUN_OR_ARTIFACT", "STAGE_KEY", "5efe06138d9c", "91613d260ec4"):
        return keys["recovered"]
    return keys["scratch"] if word == "0123abcd4567" else word


def _keys() -> dict[str, str]:
    """Stage key by name, of the latest pipeline."""
    journals = sorted(Path("runs").glob("pipelines/*/journal.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = journals[-1].read_text().splitlines()
    return {row["name"]: row["key"] for row in map(json.loads, lines) if row["type"] == "finished"}


def _check_recipe(block: Block, sandbox: Path) -> None:
    content = yaml.safe_load(block.text)
    assert isinstance(content, dict), f"{block.place}: a part of a recipe"
    if "stages" in content:
        path = sandbox / "block.yaml"
        path.write_text(block.text)
        assert main(["plan", str(path)]) == 0, block.place


def test_a_command_that_nobody_listed_is_noticed(sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("pbkd frobnicate", "rm -rf runs"):
        block = Block("console", None, f"$ {command}   # a comment\noutput\n", "here:1")
        assert block.commands() == [command]
        with pytest.raises(AssertionError, match="neither run nor listed"):
            _typed(command, [], block, capsys)
    here = Block("console", None, "", "here:1")
    with pytest.raises(AssertionError, match="ended with 2"):
        _typed("pbkd plan nowhere.yaml", [], here, capsys)
    with pytest.raises(typer.TyperException, match="--noodes"):
        _typed("pbkd slurm run RECIPE --noodes 2", [], here, capsys)
    with pytest.raises(AssertionError, match="the Makefile has no"):
        _typed("make nonsense", [], here, capsys)
    said = ["teacher  train  pending  5.22 k 1.000x  97.4 k 1.000x 0123456"]
    with pytest.raises(AssertionError, match="prints something else"):
        _typed(f"pbkd plan {DIGITS}", said, here, capsys)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_within_sentences_exist_and_have_the_options_named(document: Path) -> None:
    for command in commands_within(document):
        with suppress(typer.BadParameter):  # a sentence may leave arguments out
            _arguments_are_known(shlex.split(command))


def test_a_command_within_a_sentence_that_does_not_exist_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.md"
    path.write_text("```console\n$ make test\n```\nType `HERE=1 pbkd frobnicate\nnow`, or `make nothing`.\n")
    assert commands_within(path) == ["pbkd frobnicate now", "make nothing"]
    for words in (["pbkd", "frobnicate"], ["make", "nothing"]):
        with pytest.raises(AssertionError, match=f"no .*{words[1]}"):
            _arguments_are_known(words)
    with pytest.raises(typer.TyperException, match="--opne"):
        _arguments_are_known(["pbkd", "report", "--opne"])
    with pytest.raises(ModuleNotFoundError):
        _arguments_are_known(["python", "-m", "benchmarks.nothing"])
    with pytest.raises(SystemExit):
        _arguments_are_known(["python", "-m", "benchmarks.report_times", "--rouns", "3"])
    assert "--rouns" in capsys.readouterr().err


def test_nothing_is_listed_that_no_document_says() -> None:
    said = [command.removeprefix(".venv/bin/") for path in DOCUMENTS for block in blocks_of(path)
            for command in block.commands()]  # fmt: skip
    listed: Sequence[str] = [*RUN, *SHORTENED, *PLANNED, *ELSEWHERE]
    assert [start for start in listed if not any(command.startswith(start) for command in said)] == []
