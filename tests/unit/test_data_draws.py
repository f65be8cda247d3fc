"""The counter-based draws: other readers repeat them bit for bit, so their values are pinned."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pbkd.data.draws import below, draw, sample_keys, shuffled, unit

MASK = (1 << 64) - 1


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference(*words: int) -> int:
    state = 0
    for word in words:
        state = mix(((state ^ (word & MASK)) + 0x9E3779B97F4A7C15) & MASK)
    return state


def test_splitmix64_starts_with_its_published_value():
    assert reference(0) == 0xE220A8397B1DCDAF


@given(
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
    indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=5),
    number=st.integers(0, 100),
)
def test_draws_equal_the_chained_hash_written_with_python_integers(seed, epoch, indices, number):
    found = draw(sample_keys(seed, epoch, np.array(indices, np.int64)), number)
    assert found.tolist() == [reference(seed, epoch, index, number) for index in indices]


def test_numbers_are_uniform_and_draws_independent():
    keys = sample_keys(3, 5, np.arange(20000))
    first, second = unit(draw(keys, 1)), unit(draw(keys, 2))
    assert first.min() >= 0
    assert first.max() < 1
    assert np.allclose(np.histogram(first, bins=10, range=(0, 1))[0], 2000, atol=200)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert abs(np.corrcoef(first, unit(draw(sample_keys(3, 6, np.arange(20000)), 1)))[0, 1]) < 0.03


@given(bits=st.integers(0, MASK), bound=st.integers(1, 2**31))
def test_below_stays_below(bits, bound):
    assert below(np.array([bits], np.uint64), bound).tolist() == [((bits >> 32) * bound) >> 32]
    assert ((bits >> 32) * bound) >> 32 < bound


def test_an_order_is_a_permutation_that_seed_and_epoch_determine():
    indices = np.arange(100, 400)
    order = shuffled(indices, 1, 2)
    assert sorted(order) == indices.tolist()
    assert np.array_equal(order, shuffled(indices, 1, 2))
    assert not np.array_equal(order, shuffled(indices, 1, 3))
    assert not np.array_equal(order, shuffled(indices, 2, 2))
