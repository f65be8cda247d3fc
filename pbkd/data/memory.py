"""Memory for batches: used again as soon as nothing refers to it, and never given back in between."""

import math
import weakref
from mmap import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


class RecycledMemory:
    """Arrays whose memory serves the next one when the last tensor or view of it is gone.

    New blocks of many megabytes cost a fault for every page; in the heap, where threads take and free them
    in changing order, they leave gaps that do not fit. Here they lie outside of it, and there are never more
    than were in use at a time.
    """

    def __init__(self) -> None:
        self._free: list[mmap] = []

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array of that shape, of any content, which shares its memory with none that is still in use."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        memory = self._taken(size) or mmap(-1, size)
        owner = np.frombuffer(memory, dtype, math.prod(shape))
        # Views, and tensors made from it, keep the owner; a finalizer runs when the last of them is gone.
        weakref.finalize(owner, self._free.append, memory).atexit = False
        return owner.reshape(shape)

    def _taken(self, size: int) -> mmap | None:
        for _ in range(len(self._free)):
            try:
                memory = self._free.pop(0)
            except IndexError:  # another thread took it
                return None
            if len(memory) >= size:
                return memory  # one that is too small is for the end of an epoch, and let go
        return None
