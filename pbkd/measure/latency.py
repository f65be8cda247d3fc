"""How long a forward pass takes on this machine."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pbkd.measure.modes import evaluating

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass: median and interquartile range over `repeats` passes."""

    median_ms: float
    iqr_ms: float
    repeats: int


def measure_latency(
    network: nn.Module,
    input_shape: tuple[int, ...],
    batch: int = 1,
    threads: int | None = None,
    warm_up: int = 5,
    repeats: int = 50,
    seconds: float = 1.0,
) -> Latency:
    """Time forward passes of `batch` random images of `input_shape` (C, H, W) on the network's device.

    After `warm_up` passes, measures at least `repeats` passes and for at least `seconds`, in eval mode. On a
    CPU with `threads` threads (default: as many as torch is set to), restored afterwards; on CUDA between
    events on the device. Only a machine that does nothing else gives numbers worth comparing.
    """
    if repeats < 1 or batch < 1:
        raise ValueError(f"repeats={repeats} and batch={batch} must be at least 1")
    weight = next((tensor for tensor in network.parameters() if tensor.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *input_shape, generator=generator).to(weight.device, weight.dtype)
    passes = _time_on_cuda if weight.device.type == "cuda" else _time_on_cpu
    times: list[float] = []
    with evaluating(network), torch.inference_mode(), _threads(threads):
        passes(network, images, warm_up)
        start = time.perf_counter()
        while not times or time.perf_counter() - start < seconds:
            times += passes(network, images, repeats)
    low, median, high = np.percentile(times, [25, 50, 75]).tolist()
    return Latency(median_ms=median, iqr_ms=high - low, repeats=len(times))


@contextmanager
def compiled(network: nn.Module, cache: Path) -> Iterator[nn.Module]:
    """`network` as torch.compile makes it, by Inductor, at its first pass; that takes tens of seconds.

    The first pass raises RuntimeError where it does not work: there is no C++ compiler, or it fails. What
    Inductor keeps goes to the folder `cache`, unless the user names one (TORCHINDUCTOR_CACHE_DIR); what torch
    keeps in this process is dropped at the end.
    """
    is_given = _CACHE in os.environ
    os.environ.setdefault(_CACHE, str(cache))
    fast: nn.Module = torch.compile(network, dynamic=False)  # type: ignore[assignment]
    try:
        yield fast
    finally:
        torch.compiler.reset()
        if not is_given:
            del os.environ[_CACHE]


def _time_on_cpu(network: nn.Module, images: Tensor, repeats: int) -> list[float]:
    marks = [time.perf_counter_ns()]
    for _ in range(repeats):
        network(images)
        marks.append(time.perf_counter_ns())
    return [(after - before) / 1e6 for before, after in pairwise(marks)]


def _time_on_cuda(network: nn.Module, images: Tensor, repeats: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        network(images)
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
