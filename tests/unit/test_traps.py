"""Networks with something that a copy could get wrong: the copy is equal, or refused with a reason."""

import copy
from pathlib import Path

import pytest
import torch

from pbkd import artifact
from pbkd.errors import UserError
from pbkd.networks import TracedSpec, architecture, load_weights, settings_of
from pbkd.networks.channel_groups import removed_by
from pbkd.networks.channels import inner_groups, left_alone, original_tensors
from pbkd.networks.equality import require_equal, require_exact
from pbkd.networks.trace import Reference, trace
from pbkd.networks.training_differences import run_in_training_only, trained_otherwise
from pbkd.networks.weights import empty
from pbkd.stages.prune_foreign import ForeignPruning
from tests.unit import trap_networks
from tests.unit.trap_networks import NETWORKS

pytestmark = pytest.mark.slow

SHAPE, CLASSES = (3, 8, 8), 10
REFUSED = {
    "WritesIntoAPart": "changes in place what is read again later",
    "CountsItsCalls": "changes the network's own 'calls' in eval mode",
    "AlwaysRandom": "another result each time",
    "Squeezed": "flatten",
    "DrawnAnew": "'order', which no state_dict holds, is another one in each build",
    "PartsWrittenOneByOne": "changes in place what is read again later",
    "NumbersInForward": "register it as a buffer",
    "NamedAsTorchs": "'graph' is a name that torch.fx needs",
    "WritesOut": "'mul' changes in place what is read again later",
    "WritesIntoLaterImages": "changes in place what is read again later",
    "TrainsToNothing": "does not return the network",
    "TrainsWithoutMode": "its own train.. or eval.. fails",
    "MakesZeros": "x.new_zeros",
    "AsksForValues": "depends on the values of tensors",
    "Lazy": "'fc.weight' has no size before a first batch",
    "HookedAsAWhole": "a hook on the whole of it",
    "HoldsALock": "its 'a.lock', a lock, cannot be copied",
    "ChangesItsType": "let it compute in one type: no autocast",
}
# Of which no channel of the unit's block can go.
WHOLE = {
    "Chunked", "Buffers", "ParametrizedNorm", "PixelShuffled", "SpectralNorm", "WeightNorm",
    "WritesIntoHalvesApart", "Permuted", "HeldOutOfSight", "JoinedWithItself", "TiedWeights",
    "OfSeveralTypes", "IntegerParameter", "CountsInPlace", "Gates", "SingleAlone",
}  # fmt: skip


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PBKD_ALLOW_IMPORT", "1")


def spec_of(name: str) -> TracedSpec:
    spec = architecture(settings_of(f"tests.unit.trap_networks:build_{name}"), SHAPE, CLASSES)
    assert isinstance(spec, TracedSpec)
    return spec


def trained(name: str) -> torch.nn.Module:
    """As if it had been trained."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_(std=0.3)
            part.running_var.uniform_(0.5, 2.0)
            part.weight.data.uniform_(0.5, 2.0)
            part.bias.data.normal_(std=0.3)
    return network.eval()


@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - REFUSED.keys()))
def test_the_copy_is_equal_and_what_does_nothing_can_go(name: str, tmp_path: Path) -> None:
    original, spec = trained(name), spec_of(name)
    require_exact(spec)
    network = empty(spec)
    load_weights(network, original.state_dict(), "weights")
    network.eval().requires_grad_(False)
    for count in (1, 8):
        images = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(count))
        given = images.clone()
        with torch.no_grad():
            assert torch.equal(network(given), original(images.clone())), count
        assert torch.equal(given, images), "the images are the caller's"
    require_equal(network, spec, images)
    artifact.save(network, tmp_path)
    with torch.no_grad():
        assert torch.equal(artifact.load(tmp_path)(images), network(images))
    shared = len(dict(original.named_parameters())), len(dict(network.named_parameters()))
    assert shared[0] >= shared[1], "what is tied stays tied"
    try:
        pruning = ForeignPruning.of(network, spec, "interior", "l1")
    except UserError:
        assert name in WHOLE
        return
    double = copy.deepcopy(network).double()
    tensors = original_tensors(double)
    generator = torch.Generator().manual_seed(2)
    kept = [
        group.strongest(torch.rand(group.size, generator=generator), group.left(group.size / 2))
        for group in pruning.groups
    ]
    removed = removed_by(pruning.groups, kept, tensors)
    readers = {
        (member.tensor, member.dimension)
        for group in pruning.groups
        for member in group.members
        if member.role == "input"
    }
    for (tensor, dimension), entries in removed.items():
        if (tensor, dimension) in readers:
            tensors[tensor].movedim(dimension, 0)[entries] = 0.0
    silenced = ForeignPruning(double, pruning.groups, pruning.scores)
    images = images.double()
    with torch.no_grad():
        expected, found = double(images), silenced.without(removed).double()(images)
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_be_copied_is_refused_with_a_reason(name: str) -> None:
    with pytest.raises(UserError, match=REFUSED[name]) as refused:
        require_exact(spec_of(name))
    assert len(str(refused.value).splitlines()) <= 3 and f"build_{name}" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "drops"), [("FunctionalDropout", True), ("DropoutOfTorchs", True), ("NoDropout", False)]
)
def test_functional_dropout_is_kept_while_training(name: str, drops: bool) -> None:
    network = empty(spec_of(name))
    load_weights(network, trained(name).state_dict(), "weights")
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 0.0
    image = torch.randn(8, *SHAPE)
    with torch.no_grad():
        assert torch.equal(network.eval()(image), network(image))
        assert torch.equal(network.train()(image), network(image)) is not drops


@pytest.mark.parametrize(("name", "tensor"), [("Buffers", "mean"), ("Attributes", "scale")])
def test_what_no_state_dict_holds_is_in_the_artifact(
    name: str, tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = empty(spec_of(name))
    load_weights(network, trained(name).state_dict(), "weights")
    images = torch.randn(2, *SHAPE)
    expected = network.eval()(images)
    artifact.save(network, tmp_path / "saved")

    class Changed(NETWORKS[name]):
        def __init__(self) -> None:
            super().__init__()
            getattr(self, tensor).mul_(3.0)

    monkeypatch.setattr(trap_networks, f"build_{name}", Changed)
    assert torch.equal(artifact.load(tmp_path / "saved")(images), expected)


def test_a_copy_that_differs_is_refused_where_it_first_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pbkd.networks.trace.without_writes", lambda *_: None)  # as it was
    reference = Reference.of(spec_of("InplaceModule"))
    wrong = trace(reference)
    monkeypatch.setattr("pbkd.networks.partition._traced", lambda _: wrong)
    monkeypatch.setattr("pbkd.networks.equality.traced_of", lambda _: wrong)
    with pytest.raises(UserError, match="the first that gives something else is 'b'"):
        require_exact(spec_of("InplaceModule"))


def test_what_a_forward_does_in_training_alone_is_named() -> None:
    assert run_in_training_only(Reference.of(spec_of("NoisyInTraining"))) == ["randn_like", "extra", "add"]
    assert run_in_training_only(Reference.of(spec_of("FunctionalDropout"))) == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("NoisyInTraining", ["'randn_like', 'extra', 'add' in training alone"]),
        ("FrozenNorms", ["leaves 'enter.1' in eval mode"]),
        ("StraightThrough", ["'a.bias', 'a.weight', 'enter.1.bias', ... get other gradients"]),
        ("WithoutGradients", ["'a.bias', 'a.weight', 'enter.1.bias', ... get other gradients"]),
        ("InplaceMethod", []),
        ("SingleAlone", []),
        ("OnlyEvaluates", ["'what cannot be traced' in training alone"]),
        ("ScalesInEvalAlone", ["'mul' in eval mode alone"]),
    ],
)
def test_how_a_network_trains_otherwise_than_its_copy_is_told(name: str, told: list[str]) -> None:
    found = trained_otherwise(spec_of(name))
    assert len(found) == len(told) and all(words in line for words, line in zip(told, found, strict=True))


@pytest.mark.parametrize("name", ["ShuffledByView", "ShuffledByModule"])
def test_layers_that_keep_their_channels_are_named(name: str) -> None:
    spec = spec_of(name)
    (alone,) = (pair for index in range(len(spec.blocks)) for pair in left_alone(spec, index))
    assert alone[0] == "a" and "as behind a shuffle" in alone[1]


def test_computed_weights_are_named_as_why_a_block_keeps_its_channels() -> None:
    with pytest.raises(UserError, match=r"'b'.*of a, .*weight or spectral norm"):
        inner_groups(spec_of("WeightNorm"), 0)
