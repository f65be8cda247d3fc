"""Freed memory is kept: a step that is repeated faults in no new pages."""

import multiprocessing
import resource
import sys

import pytest
import torch

from pbkd.engine import keep_freed_memory


def faults_of_steps(keeps: bool) -> int:
    """Page faults of fifty steps that allocate 24 MB in tensors of 8 MB and free them."""
    assert not keeps or keep_freed_memory()

    def steps(count: int) -> None:
        for _ in range(count):
            tensors = [torch.ones(2 << 20) for _ in range(3)]
            del tensors

    steps(3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    steps(50)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told to")
def test_memory_that_was_freed_is_used_again() -> None:
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        without, kept = pool.map(faults_of_steps, [False, True], chunksize=1)
    assert without > 5000
    assert kept < 500
