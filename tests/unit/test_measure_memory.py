"""The peak of a stage's memory is its own."""

import ctypes
import gc
import os

import pytest
import torch
from pydantic import Field

from pbkd.engine import LocalSession, Precision
from pbkd.networks import BlockNetwork, fresh
from pbkd.stages import Context, Stage, run_stage
from tests.unit.small_networks import digits, small_vgg


class Waste(Stage):
    """Allocates some megabytes, and gives the network it got."""

    kind: str = "waste"
    megabytes: int = Field(ge=0)

    def plan(self, inputs, info):
        return inputs["from"]

    def run(self, context: Context) -> BlockNetwork:
        torch.ones(self.megabytes, 250_000)
        return context.inputs["from"]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_what_a_stage_allocates_shows_in_its_peak_and_in_no_later_one() -> None:
    network = fresh(small_vgg(norm=True), 0).eval().requires_grad_(False)

    def peak(megabytes: int) -> float:
        gc.collect()  # what other tests left must neither be freed in between
        ctypes.CDLL(None).malloc_trim(0)  # nor, if it is free, be what is allocated
        context = Context(LocalSession(), {"from": network}, digits(limit=100), 0, Precision())
        return run_stage(Waste(megabytes=megabytes), context).metrics["memory_peak_mb"]

    before, wasteful, after = peak(0), peak(200), peak(0)
    assert 190 < wasteful - before < 230
    assert 190 < wasteful - after < 230


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_cuda_it_is_what_torch_allocated() -> None:
    device = torch.device("cuda")
    network = fresh(small_vgg(norm=True), 0).eval().requires_grad_(False)
    context = Context(LocalSession(device=device), {"from": network}, digits(limit=100), 0, Precision())
    assert 0 < run_stage(Waste(megabytes=200), context).metrics["memory_peak_mb"] < 190
