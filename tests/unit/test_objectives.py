"""Objectives equal their equations, computed naively in float64, sample by sample."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pbkd.objectives import (
    Reduction,
    angle_relation,
    attention,
    cross_entropy,
    distance_relation,
    hinton,
    local_feature,
)

seeds = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(seeds, st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_local_loss_is_the_published_equation(seed: int, samples: int, channels: int, side: int) -> None:
    student = normal(seed, samples, channels, side, side)
    teacher = normal(seed + 1, samples, channels, side, side)
    published, energy = [], []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        s_flat = [v for plane in s for row in plane for v in row]
        t_flat = [v for plane in t for row in plane for v in row]
        published.append(0.5 * math.fsum((a - b) ** 2 for a, b in zip(s_flat, t_flat, strict=True)))
        energy.append(math.fsum(b * b for b in t_flat))
    size = channels * side * side
    expected: dict[Reduction, list[float]] = {
        "frobenius": published,
        "mean": [value / size for value in published],
        "relative": [value / all_ for value, all_ in zip(published, energy, strict=True)],
    }
    for reduction, values in expected.items():
        found = local_feature(student, teacher, reduction)
        assert found.shape == (samples,)
        assert found.tolist() == pytest.approx(values, rel=1e-5)


@given(seeds, st.integers(1, 4), st.integers(2, 7), st.floats(0, 1), st.floats(0.5, 8))
@settings(max_examples=30, deadline=None)
def test_hinton_is_its_equation(
    seed: int, samples: int, classes: int, alpha: float, temperature: float
) -> None:
    student, teacher = normal(seed, samples, classes), normal(seed + 1, samples, classes)
    labels = torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed))
    expected = []
    for s, t, y in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        log_s, log_t = log_softmax(s, temperature), log_softmax(t, temperature)
        kl = math.fsum(math.exp(b) * (b - a) for a, b in zip(log_s, log_t, strict=True))
        expected.append(-(1 - alpha) * log_softmax(s, 1.0)[y] + alpha * temperature**2 * kl)
    found = hinton(student, teacher, labels, alpha, temperature)
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def log_softmax(logits: list[float], temperature: float) -> list[float]:
    scaled = [value / temperature for value in logits]
    normalizer = math.log(math.fsum(math.exp(value) for value in scaled))
    return [value - normalizer for value in scaled]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_compared_in_float32(dtype: torch.dtype) -> None:
    student = torch.full((1, 64, 32, 32), 3.0, dtype=dtype)
    teacher = torch.zeros(1, 64, 32, 32, dtype=dtype)
    found = local_feature(student, teacher, "frobenius")  # far above what float16 can hold
    assert (found.dtype, found.item()) == (torch.float32, 4.5 * 64 * 32 * 32)
    labels = torch.tensor([1])
    assert cross_entropy(torch.zeros(1, 4, dtype=dtype), labels).dtype == torch.float32


def test_a_dead_target_gives_a_finite_relative_loss() -> None:
    zero = torch.zeros(2, 3, 4, 4)
    assert local_feature(zero, zero, "relative").tolist() == [0.0, 0.0]
    assert local_feature(zero + 1, zero, "relative").isfinite().all()


def test_soft_targets_alone_pull_to_the_teacher() -> None:
    teacher = normal(3, 4, 5)
    labels = torch.zeros(4, dtype=torch.long)
    assert hinton(teacher, teacher, labels, 1.0, 4.0).abs().max() < 1e-5
    assert torch.equal(hinton(teacher, normal(4, 4, 5), labels, 0.0, 4.0), cross_entropy(teacher, labels))


def naive_attention(feature: list[list[list[float]]]) -> list[float]:
    """Q of one sample's feature [channel][row][column]."""
    positions = [
        math.fsum(channel[row][column] ** 2 for channel in feature) / len(feature)
        for row in range(len(feature[0]))
        for column in range(len(feature[0][0]))
    ]
    length = math.sqrt(math.fsum(value**2 for value in positions))
    return [value / length for value in positions]


@given(seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_attention_transfer_is_its_equation(
    seed: int, samples: int, channels: int, side: int, blocks: int
) -> None:
    student = [normal(seed + block, samples, channels, side, side + block) for block in range(blocks)]
    teacher = [normal(seed - block - 1, samples, channels + 2, side, side + block) for block in range(blocks)]
    expected = [0.0] * samples
    for s, t in zip(student, teacher, strict=True):
        for sample, (one, other) in enumerate(zip(s.tolist(), t.tolist(), strict=True)):
            pairs = list(zip(naive_attention(one), naive_attention(other), strict=True))
            expected[sample] += math.fsum((a - b) ** 2 for a, b in pairs) / len(pairs)
    assert attention(student, teacher).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert attention(student, [3 * feature for feature in student]).tolist() == pytest.approx(
        [0.0] * samples, abs=1e-9
    ), "attention has no unit"


def smooth_l1(difference: float) -> float:
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def naive_distances(features: list[list[float]]) -> list[list[float]]:
    distances = [[math.dist(one, other) for other in features] for one in features]
    positive = [value for row in distances for value in row if value > 0]
    mean = math.fsum(positive) / len(positive) if positive else 1.0
    return [[value / mean for value in row] for row in distances]


def naive_angle(vertex: list[float], one: list[float], other: list[float]) -> float:
    lengths = math.dist(vertex, one) * math.dist(vertex, other)
    if not lengths:
        return 0.0
    products = [(a - v) * (b - v) for v, a, b in zip(vertex, one, other, strict=True)]
    return math.fsum(products) / lengths


@given(seeds, st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_relations_are_their_equations(seed: int, samples: int, dimensions: int) -> None:
    student, teacher = normal(seed, samples, dimensions), normal(seed + 1, samples, dimensions + 1)
    s, t = student.tolist(), teacher.tolist()
    rows = zip(naive_distances(s), naive_distances(t), strict=True)
    distances = [
        math.fsum(smooth_l1(a - b) for a, b in zip(one, other, strict=True)) / samples for one, other in rows
    ]
    assert distance_relation(student, teacher).tolist() == pytest.approx(distances, rel=1e-4, abs=1e-6)
    angles = [
        math.fsum(
            smooth_l1(naive_angle(s[i], s[j], s[k]) - naive_angle(t[i], t[j], t[k]))
            for j, k in itertools.product(range(samples), repeat=2)
        )
        / samples**2
        for i in range(samples)
    ]
    assert angle_relation(student, teacher).tolist() == pytest.approx(angles, rel=1e-3, abs=1e-5)


def test_relations_do_not_see_place_or_size_and_have_gradients_everywhere() -> None:
    features = normal(0, 6, 4)
    features[5] = features[4]  # two samples alike: no distance, no angle between them
    moved = (5 * features + 2).requires_grad_()
    for relation in (distance_relation, angle_relation):
        loss = relation(moved, features)
        assert loss.tolist() == pytest.approx([0.0] * 6, abs=1e-9)
        other = relation(moved, normal(1, 6, 3)).sum()
        (gradient,) = torch.autograd.grad(other, moved)
        assert gradient.isfinite().all()
        assert gradient.any()
