"""Whatever is written in a recipe or an override: a plan, or exit code 2 with a few lines; nothing else."""

import contextlib
import io
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipelines.cli import main

pytestmark = pytest.mark.slow

SOUND: dict[str, Any] = {
    "name": "fuzz",
    "data": {"name": "digits", "limit": 100},
    "compute": {"executor": "local", "threads": 1},
    "teacher": "teacher",
    "student": "distilled",
    "stages": {
        "teacher": {"kind": "train", "network": {"arch": "resnet20", "base_width": 4}, "steps": 2},
        "blocks": {"kind": "progressive", "steps": 2},
        "pruned": {"kind": "prune", "macs": 0.8},
        "distilled": {"kind": "distill", "steps": 2},
    },
}
KEYS = [
    "name", "seed", "smoke", "data", "data.name", "data.batch_size", "data.limit", "data.root", "compute",
    "compute.workers", "compute.threads", "compute.precision", "compute.checkpoint_steps", "teacher",
    "student", "baselines", "tracking.uri", "stages", "stages.teacher", "stages.teacher.kind",
    "stages.teacher.steps", "stages.teacher.epochs", "stages.teacher.network", "stages.teacher.network.arch",
    "stages.blocks.blocks",
    "stages.teacher.network.base_width", "stages.blocks.width", "stages.blocks.from", "stages.pruned.ratio",
    "stages.pruned.macs", "stages.pruned.scope", "stages.distilled.from", "stages.distilled.teacher",
    "stages.distilled.optimizer.lr", "stages.new", "stages.new.kind", "no", "", ".", "a.b.c", "stages..kind",
]  # fmt: skip
WORDS = [
    "", "null", "true", "-1", "0", "1e400", "nan", "inf", "1e-9", "99999999999999999999", "[]", "{}", "[1,",
    "{a: }", "${oops}", "${name}", "${..}", "!!python/name:os.system", "&a [*a]", "*a", "teacher", "blocks",
    "blocks.1", "distilled", "prune", "load", "assemble", "resnet56", "vgg16", "../..", "/etc/passwd", "\x00",
    "\n", "😀", "[[[]]]",
]  # fmt: skip
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def outcome(text: bytes, overrides: list[str]) -> None:
    """See that there is a plan or a refusal, the same by `plan` and `run`, and that no store was begun."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, store = Path(folder) / "recipe.yaml", Path(folder) / "runs"
        recipe.write_bytes(text)

        def typed(command: str) -> tuple[int, str, str]:
            out, err, handlers = io.StringIO(), io.StringIO(), logging.getLogger().handlers
            before = handlers.copy()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main([command, str(recipe), "--store", str(store), "--json", "--", *overrides])
            handlers[:] = before
            assert not store.exists()
            return code, out.getvalue(), err.getvalue()

        code, out, err = typed("plan")
        if code == 0:
            stages = json.loads(out)["stages"]
            assert stages and err == ""
            if all(stage["key"] is not None for stage in stages):
                return  # it would run
        refusal = typed("run")
        assert refusal == (code, out, err) or code == 0
        code, out, err = refusal
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ") and len(err.splitlines()) <= 3, err


EXAMPLES = int(os.environ.get("PBKD_EXAMPLES", "20"))  # of each fuzzer; make proof: a thousand
bounded = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@bounded
@given(
    st.lists(
        st.tuples(st.sampled_from(KEYS), st.sampled_from(WORDS) | st.text(max_size=12)),
        min_size=1,
        max_size=3,
    )
)
def test_overrides(pairs: list[tuple[str, str]]) -> None:
    outcome(yaml.safe_dump(SOUND).encode(), [f"{key}={value}" for key, value in pairs])


@bounded
@given(st.sampled_from([key for key in KEYS if key.strip(".")]), values)
def test_values(key: str, value: object) -> None:
    recipe = json.loads(json.dumps(SOUND))
    *places, last = key.split(".")
    inner = recipe
    for place in places:
        inner = inner.setdefault(place, {})
    inner[last] = value
    outcome(yaml.safe_dump(recipe, allow_unicode=True).encode(errors="replace"), [])


@bounded
@given(
    st.binary(max_size=60)
    | st.text(max_size=60).map(lambda text: text.encode(errors="replace"))
    | values.map(lambda value: yaml.safe_dump(value).encode(errors="replace"))
)
@example(b"'true'")
def test_files(text: bytes) -> None:
    outcome(text, [])
