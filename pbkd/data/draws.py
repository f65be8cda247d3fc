"""Counter-based random numbers: a draw is a hash of (seed, epoch, sample index, draw number), so nothing
carries state.

The hash is the finalizer of splitmix64, chained over the four words with wrapping 64-bit arithmetic; every
reader that repeats it gives the same views bit for bit.
"""

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB

ORDER = 0
"""The draw number of a sample's place in the epoch; augmentations use 1 and up."""


def sample_keys(seed: int, epoch: int, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One key per sample, shape of `indices`: the hash of (seed, epoch, index)."""
    key = _mix_scalar(((_mix_scalar((seed + _GOLDEN) & _MASK) ^ (epoch & _MASK)) + _GOLDEN) & _MASK)
    return _mix((indices.astype(np.uint64) ^ np.uint64(key)) + np.uint64(_GOLDEN))


def draw(keys: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
    """64 random bits per key: draw `number` of each sample."""
    return _mix((keys ^ np.uint64(number)) + np.uint64(_GOLDEN))


def below(bits: NDArray[np.uint64], bound: int) -> NDArray[np.int64]:
    """Whole numbers in [0, bound) from 64 random bits each; bound < 2**32."""
    return (((bits >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)


def unit(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) with 53 random bits each."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled(indices: NDArray[np.int64], seed: int, epoch: int) -> NDArray[np.int64]:
    """`indices` in the order of (seed, epoch)."""
    return indices[np.argsort(draw(sample_keys(seed, epoch, indices), ORDER), kind="stable")]


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return z ^ (z >> np.uint64(31))


def _mix_scalar(z: int) -> int:
    # numpy warns when a scalar wraps around, so what all samples share is computed with Python's integers.
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    return z ^ (z >> 31)
