"""Parameters and multiply-accumulates against numbers computed by hand."""

import pytest
import torch
from torch import nn

from pbkd.measure import count, measure_latency, nonzero_macs, nonzero_params
from pbkd.torchvision_compat import import_torchvision


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),  # 216 weights, 216 * 16 * 16 MACs
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8),  # 72 + 8 weights, 72 * 8 * 8 MACs
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(8),
        nn.Linear(8, 10),  # 80 + 10 weights, 80 MACs
    )


def test_counts_equal_those_made_by_hand():
    cost = count(small(), (3, 16, 16))
    assert cost.params == 216 + 80 + 90
    assert cost.macs == 216 * 256 + 72 * 64 + 80


def test_a_module_on_meta_counts_the_same():
    with torch.device("meta"):
        network = small()
    assert count(network, (3, 16, 16)) == count(small(), (3, 16, 16))


def test_counting_leaves_the_network_alone():
    network = small().train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    count(network, (3, 16, 16))
    assert all(module.training for module in network.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [("resnet18", 11689512 - 9600, 1814073344), ("vgg16", 138357544, 15470264320)],
)
def test_known_networks_have_their_known_costs(name: str, params: int, macs: int):
    with torch.device("meta"):
        network = getattr(import_torchvision().models, name)()
    cost = count(network, (3, 224, 224))
    assert (cost.params, cost.macs) == (params, macs)


def test_shared_weights_count_once():
    linear = nn.Linear(6, 6)
    cost = count(nn.Sequential(nn.Flatten(), linear, linear), (6, 1, 1))
    assert (cost.params, cost.macs) == (42, 72)


def test_zeros_are_not_counted_as_parameters_that_matter():
    network = small()
    for tensor in network.parameters():
        nn.init.ones_(tensor)
    assert nonzero_params(network) == 216 + 80 + 90
    assert nonzero_macs(network, (3, 16, 16)) == count(network, (3, 16, 16)).macs
    with torch.no_grad():
        network[0].weight[:, 0] = 0
        network[7].bias[:4] = 0
        network[1].weight[:] = 0
    assert nonzero_params(network) == 216 - 72 + 80 + 86
    assert nonzero_macs(network, (3, 16, 16)) == (216 - 72) * 256 + 72 * 64 + 80
    linear = nn.Linear(6, 2)
    nn.init.eye_(linear.weight)
    assert nonzero_macs(linear, (6,)) == 2


def test_latency_is_measured_in_eval_mode_and_leaves_no_trace():
    network = small().train()
    before, threads, state = network[1].running_mean.clone(), torch.get_num_threads(), torch.get_rng_state()
    latency = measure_latency(network, (3, 16, 16), batch=2, threads=1, repeats=5, seconds=0)
    assert latency.repeats == 5
    assert latency.median_ms > 0
    assert latency.iqr_ms >= 0
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in network.modules())
    assert torch.equal(network[1].running_mean, before)
    with pytest.raises(ValueError, match="repeats"):
        measure_latency(network, (3, 16, 16), repeats=0)
