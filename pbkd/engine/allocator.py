"""How this process gets memory for tensors on the CPU."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 << 20  # that glibc accepts


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next step instead of handing it back to the kernel.

    The activations of a step are allocated and freed again at every step; by default each costs a system call
    and a fault for every page. What is computed does not change, nor does the peak. Returns whether it could
    be set: only with glibc.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_TRIM_THRESHOLD, 2**31 - 1))
