"""Memory of batches: used again, but never while anything refers to it."""

import numpy as np
import pytest
import torch

from pbkd.data.memory import RecycledMemory


def address(memory: RecycledMemory, count: int = 1000) -> int:
    """Where an array lies that is gone when this returns."""
    return memory.empty((count,), np.float32).ctypes.data


def test_what_is_no_longer_used_is_used_again() -> None:
    memory = RecycledMemory()
    assert len({address(memory) for _ in range(5)}) == 1
    assert address(memory, 10) == address(memory)  # a smaller one, as at the end of an epoch
    image = memory.empty((2, 3, 4), np.uint8)
    assert image.shape == (2, 3, 4) and image.dtype == np.uint8 and image.flags.writeable


@pytest.mark.parametrize("keep", ["view", "tensor", "part of a tensor", "what backward needs"])
def test_what_is_still_used_is_not_given_away(keep: str) -> None:
    memory = RecycledMemory()
    array = memory.empty((8, 5), np.float32)
    array[:] = 7
    kept: object
    if keep == "view":
        kept = array[3:]
    elif keep == "tensor":
        kept = torch.from_numpy(array)
    elif keep == "part of a tensor":
        kept = torch.from_numpy(array).permute(1, 0)[2:]
    else:
        weight = torch.ones(5, requires_grad=True)
        kept = (torch.from_numpy(array) * weight).sum()
    at = array.ctypes.data
    del array
    other = memory.empty((8, 5), np.float32)
    assert other.ctypes.data != at
    other[:] = 0
    if isinstance(kept, torch.Tensor) and kept.requires_grad:
        kept.backward()
        assert weight.grad is not None and weight.grad.eq(56).all()
    else:
        assert np.asarray(kept).min() == 7
    del kept
    assert memory.empty((8, 5), np.float32).ctypes.data == at
