"""Accuracy, calibration and fidelity against computations written out sample by sample."""

import math

import pytest
import torch
from torch import nn

from pbkd.measure import evaluate


class Logits(nn.Module):
    """A network whose logits are the images' first 12 pixels, plus batch normalization and dropout to be
    misled by."""

    def __init__(self, classes: int = 12, scale: float = 1.0):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.norm = nn.BatchNorm1d(classes)
        self.dropout = nn.Dropout()
        self.classes = classes

    def forward(self, images):
        return self.dropout(self.norm(images.flatten(1)[:, : self.classes] * self.scale))


def batches_of(count: int = 50, size: int = 8):
    generator = torch.Generator().manual_seed(0)
    images = 3 * torch.randn(count, 1, 4, 4, generator=generator)
    labels = torch.randint(12, (count,), generator=generator)
    return list(zip(images.split(size), labels.split(size), strict=True))


def probabilities(network: nn.Module, images: torch.Tensor) -> list[list[float]]:
    network.eval()
    with torch.no_grad():
        return network(images).double().softmax(1).tolist()


def test_evaluate_equals_a_naive_computation():
    network, teacher = Logits(), Logits(scale=0.5)
    batches = batches_of()
    found = evaluate(network, batches, teacher=teacher)
    images, labels = (
        torch.cat([batch[0] for batch in batches]),
        torch.cat([batch[1] for batch in batches]).tolist(),
    )
    ps, pt = probabilities(network, images), probabilities(teacher, images)
    count = len(labels)
    ranked = [sorted(range(12), key=lambda c, p=p: -p[c]) for p in ps]
    assert found.count == count
    assert found.top1 == pytest.approx(
        100 * sum(r[0] == y for r, y in zip(ranked, labels, strict=True)) / count
    )
    assert found.top5 == pytest.approx(
        100 * sum(y in r[:5] for r, y in zip(ranked, labels, strict=True)) / count
    )
    assert found.loss == pytest.approx(
        -sum(math.log(p[y]) for p, y in zip(ps, labels, strict=True)) / count, rel=1e-6
    )
    assert found.nll == found.loss
    same = sum(p.index(max(p)) == t.index(max(t)) for p, t in zip(ps, pt, strict=True))
    assert found.agreement == pytest.approx(100 * same / count)
    kl = sum(sum(t * math.log(t / p) for t, p in zip(a, b, strict=True)) for a, b in zip(pt, ps, strict=True))
    assert found.kl == pytest.approx(kl / count, rel=1e-6)
    ece = 0.0
    for b in range(15):
        inside = [i for i in range(count) if b / 15 < max(ps[i]) <= (b + 1) / 15]
        if inside:
            accuracy = sum(ranked[i][0] == labels[i] for i in inside) / len(inside)
            confidence = sum(max(ps[i]) for i in inside) / len(inside)
            ece += len(inside) / count * abs(accuracy - confidence)
    assert found.ece == pytest.approx(100 * ece, rel=1e-6)


def test_batch_size_and_ranks_do_not_change_the_result():
    network, teacher = Logits(), Logits(scale=-1.0)
    whole = evaluate(network, batches_of(), teacher=teacher)
    parts = batches_of(size=7)
    sums = []
    evaluate(network, parts[:3], teacher=teacher, reduce=lambda vector: sums.append(vector.clone()) or vector)
    total = evaluate(network, parts[3:], teacher=teacher, reduce=lambda vector: vector + sums[0])
    idle = evaluate(network, [], teacher=teacher, reduce=lambda vector: vector + sums[0])
    assert vars(total) == pytest.approx(vars(whole), rel=1e-6)
    assert idle.count == 21


def test_without_a_teacher_there_is_no_fidelity():
    found = evaluate(Logits(classes=3), [(torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 2]))])
    assert found.agreement is None
    assert found.kl is None
    assert found.top5 == 100  # of three classes
    assert found.loss == pytest.approx(math.log(3))


def test_a_network_agrees_with_itself():
    network = Logits()
    found = evaluate(network, batches_of(), teacher=network)
    assert (found.agreement, found.kl) == (100, 0)


def test_modes_and_statistics_are_left_as_they_were():
    network = nn.Sequential(Logits(), nn.Identity()).train()
    network[0].norm.eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    evaluate(network, batches_of(), teacher=network)
    modes = {name: module.training for name, module in network.named_modules()}
    assert modes == {"": True, "0": True, "0.norm": False, "0.dropout": True, "1": True}
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_modes_are_restored_when_the_data_fail():
    network = Logits().train()

    def failing():
        yield from batches_of()[:1]
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        evaluate(network, failing())
    assert network.training
    assert network.norm.training


def test_evaluation_is_in_full_precision_inside_autocast():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 12))
    plain = evaluate(network, batches_of())
    with torch.autocast("cpu", torch.bfloat16):
        assert evaluate(network, batches_of()) == plain


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no sample"):
        evaluate(Logits(), [])
