"""Latency belongs to an architecture: measured once, with torch.compile where that works."""

import json
import os
from pathlib import Path

import pytest
import torch

from pbkd import artifact
from pbkd.networks import BlockSpec, ConvSpec, NetworkSpec, fresh
from pbkd.networks.spec import ClassifierSpec, PlainUnit
from pipelines.latency import TIMINGS, Latencies
from pipelines.manifest import Manifest
from pipelines.recipe import Compute
from pipelines.store import Store
from tests.unit.small_networks import small_resnet, small_vgg
from tests.unit.test_store import manifest_of

pytestmark = pytest.mark.slow

EAGER = {"latency_ms", "latency_ms_batch32"}


def stage_of(store: Store, spec: NetworkSpec, seed: int) -> Manifest:
    """A stage that gave a network of `spec` with weights of its own."""
    folder = store.scratch()
    saved = artifact.save(fresh(spec, seed), folder)
    store.add_artifact(folder, saved.digest)
    return manifest_of(artifact=saved.digest, digest=saved.weights_digest)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "runs")


def test_each_architecture_is_measured_once(store: Store) -> None:
    stages = [stage_of(store, small_vgg(norm=True), seed) for seed in (0, 1)]
    stages.append(stage_of(store, small_resnet(), 0))
    assert len({stage.artifact for stage in stages}) == 3
    latencies = Latencies(store, Compute(threads=1))
    assert latencies.of(stages[0]) == {} and not latencies.are_measured(stages)
    latencies.measure(stages[:1])
    assert latencies.are_measured(stages[:2]) and not latencies.are_measured(stages)
    latencies.measure(stages)
    files = {path: path.read_bytes() for path in (store.root / "latency").iterdir()}
    assert len(files) == 2
    for content in files.values():
        for timed in json.loads(content)["latencies"].values():
            assert timed["median_ms"] > 0 and timed["iqr_ms"] >= 0 and timed["repeats"] >= 5
    found = latencies.of(stages[0])
    assert found.keys() == EAGER and found == latencies.of(stages[1]) != latencies.of(stages[2])
    latencies.measure(stages)
    assert {path: path.read_bytes() for path in (store.root / "latency").iterdir()} == files


def test_with_other_threads_it_is_measured_anew(store: Store) -> None:
    stage = stage_of(store, small_vgg(norm=True), 0)
    Latencies(store, Compute(threads=1)).measure([stage])
    assert Latencies(store, Compute(threads=2)).of(stage) == {}


def tiny(channels: int) -> NetworkSpec:
    """One convolution and a classifier: what is quickly compiled."""
    layer = ConvSpec(in_channels=1, out_channels=channels, norm=False)
    block = BlockSpec(units=(PlainUnit(layers=(layer,)),))
    classifier = ClassifierSpec(widths=(channels, 10))
    return NetworkSpec(
        arch="tiny", input_shape=(1, 8, 8), blocks=(block,), poolings=(None,), classifier=classifier
    )


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch 2.13, when Inductor is imported
def test_compiled_networks_are_timed_or_it_is_said_once_why_not(
    store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = store.root.parent / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.delitem(TIMINGS, "latency_ms_batch32_compiled")  # one takes long enough
    latencies = Latencies(store, Compute(threads=1, measure_compiled=True))

    def measured(channels: int) -> float | None:
        caplog.clear()
        stage = stage_of(store, tiny(channels), 0)
        latencies.measure([stage])
        found = latencies.of(stage)
        assert found.keys() == EAGER | {"latency_ms_compiled"} and None not in [found[name] for name in EAGER]
        return found["latency_ms_compiled"]

    def reasons() -> list[str]:
        messages = [record.getMessage() for record in caplog.records if record.name == "pipelines.latency"]
        assert all("compile" in message for message in messages)
        return messages

    here = measured(channels=2)
    if here is None:  # no compiler on this machine
        assert len(reasons()) == 1
        return
    assert here > 0 and reasons() == []
    assert list((store.root / "cache" / "inductor").iterdir()) and not list(home.iterdir())
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/no/such/compiler"))
    assert measured(channels=3) is None
    assert len(reasons()) == 1 and "/no/such/compiler" in reasons()[0]
