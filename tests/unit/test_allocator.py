"""Freed memory is kept for the next step, so that its pages need not be had from the kernel again."""

import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

from pbkd.engine import keep_freed_memory

pytestmark = pytest.mark.slow


def resident() -> int:
    """Pages of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1])


def kept_share(is_set: bool) -> float:
    """Of the memory of 160 MB of tensors of 4 to 12 MB, what the process still has when they are freed."""
    assert not is_set or keep_freed_memory()
    before = resident()
    tensors = [torch.ones((1 + i % 3) << 20) for i in range(20)]
    held = resident()
    del tensors
    return (resident() - before) / (held - before)


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told to")
@pytest.mark.parametrize("is_set", [False, True])
def test_memory_that_was_freed_is_kept_when_told_to(is_set: bool) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert (pool.apply(kept_share, [is_set]) > 0.9) == is_set
