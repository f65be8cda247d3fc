"""Freed memory is kept: a step that is repeated faults in no new pages."""

import multiprocessing
import resource
import sys

import pytest
import torch

from pbkd.engine import keep_freed_memory


def page_faults() -> int:
    """Of ten steps that allocate 160 MB in tensors of 4 to 12 MB, and free them, after two that warm up."""

    def steps(count: int) -> None:
        for _ in range(count):
            tensors = [torch.ones((1 + i % 3) << 20) for i in range(20)]
            del tensors

    steps(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    steps(10)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def page_faults_with_kept_memory() -> int:
    """The setting is the whole process's. All pages of ten steps are 400,000."""
    assert keep_freed_memory()
    return page_faults()


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told to")
def test_memory_that_was_freed_is_used_again() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(page_faults_with_kept_memory) < 10_000
