"""Networks of ten classes for images of 3x8x8, each with something that a copy could get wrong."""

import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

NETWORKS: dict[str, Callable[[], nn.Module]] = {}


def cbr(
    before: int, after: int, kernel: int = 3, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Module:
    """Convolution, BatchNorm, ReLU."""
    padding = dilation * (kernel // 2)
    layer = nn.Conv2d(before, after, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(after), nn.ReLU())


class Around(nn.Module):
    """A unit of 16 channels, with its own forward, between others."""

    channels = 16

    def __init__(self) -> None:
        super().__init__()
        self.enter = cbr(3, 16)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, self.channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.down = cbr(self.channels, 24, stride=2)
        self.last = cbr(24, 24)
        self.fc = nn.Linear(24, 10)

    def unit(self, x: Tensor) -> Tensor:
        """(N, 16, 8, 8) -> (N, `channels`, 8, 8)."""
        return self.b(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 8, 8) -> (N, 10)."""
        return self.fc(self.last(self.down(self.unit(self.enter(x)))).mean((2, 3)))


def trap(network: type[nn.Module]) -> type[nn.Module]:
    """Let it be built by its name."""
    NETWORKS[network.__name__] = network
    globals()[f"build_{network.__name__}"] = network
    return network


@trap
class InplaceModule(Around):
    def unit(self, x):
        y = self.a(x)
        self.relu(y)
        y = self.b(y)
        self.relu(y)
        return y


@trap
class InplaceFunction(Around):
    def unit(self, x):
        y = self.a(x)
        F.relu(y, inplace=True)
        y = self.b(y)
        F.leaky_relu(y, 0.2, True)
        torch.relu_(y)
        return y


@trap
class InplaceMethod(Around):
    def unit(self, x):
        y = self.a(x)
        y.clamp_(min=0).mul_(2.0)
        y.add_(x)
        y.sub_(0.1)
        return self.b(y)


@trap
class Filled(Around):
    def unit(self, x):
        y = self.a(x)
        z = torch.empty_like(y)
        z.copy_(y)
        z.fill_(0.5)
        return self.b(y) + self.a(z)


@trap
class Augmented(Around):
    def unit(self, x):
        y = self.a(x)
        y += x
        y *= 0.5
        y -= 1.0
        y /= 3.0
        return self.b(y)


@trap
class Alias(Around):
    def unit(self, x):
        y = self.a(x)
        same = y
        same.relu_()
        return self.b(y) + x


@trap
class AliasByIdentity(Around):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def unit(self, x):
        y = self.a(x)
        same = self.drop(y)
        self.relu(same)
        return self.b(y)


@trap
class ChangesItsImages(Around):
    def forward(self, x):
        x.sub_(0.5).mul_(2.0)
        return super().forward(x)


@trap
class PreActivation(Around):
    """The in-place ReLU also changes what the shortcut adds."""

    def unit(self, x):
        x = self.b(x)
        y = self.relu(x)
        y = self.a(y)
        return y + x


@trap
class WritesIntoAPart(Around):
    def unit(self, x):
        y = self.a(x)
        y[:, :8].relu_()
        return self.b(y)


@trap
class WritesIntoHalvesApart(Around):
    """Nobody else looks at the halves that are written into."""

    def unit(self, x):
        first, second = self.a(x).chunk(2, 1)
        first.relu_()
        second.mul_(2.0)
        return self.b(torch.cat([second, first], 1))


@trap
class AssignsItems(Around):
    def unit(self, x):
        y = self.a(x)
        y[:, 0] = 0.0
        return self.b(y)


@trap
class CountsItsCalls(Around):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def unit(self, x):
        self.calls.add_(1.0)
        return self.b(self.a(x)) * self.calls


@trap
class ShuffledByView(Around):
    def unit(self, x):
        y = self.a(x)
        n, c, h, w = y.shape
        return self.b(y.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w))


@trap
class ShuffledByModule(Around):
    def __init__(self):
        super().__init__()
        self.shuffle = nn.ChannelShuffle(4)

    def unit(self, x):
        return self.b(self.shuffle(self.a(x)))


@trap
class PaddedChannels(Around):
    channels = 24

    def unit(self, x):
        return self.b(self.a(x)) + F.pad(x, (0, 0, 0, 0, 3, 5))


@trap
class Chunked(Around):
    def unit(self, x):
        first, second = self.a(x).chunk(2, 1)
        return self.b(torch.cat([second, torch.sigmoid(first)], 1))


@trap
class Gated(Around):
    channels = 16

    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(8, 16, 1)

    def unit(self, x):
        first, second = self.a(x).split(8, 1)
        return self.c(first * torch.sigmoid(second))


@trap
class Sliced(Around):
    def unit(self, x):
        y = self.a(x)
        return self.b(torch.cat([y[:, ::2], y[:, 1::2]], 1))


@trap
class PixelShuffled(Around):
    def __init__(self):
        super().__init__()
        self.up, self.c = nn.PixelShuffle(2), nn.Conv2d(4, 16, 3, padding=1)

    def unit(self, x):
        return self.c(self.up(self.a(x))) + self.c(self.up(self.b(x)))


@trap
class SharedModule(Around):
    def unit(self, x):
        return self.b(self.a(F.relu(self.a(x))))


@trap
class TiedWeights(Around):
    def __init__(self):
        super().__init__()
        self.b.weight = self.a.weight

    def unit(self, x):
        return self.b(F.relu(self.a(x)))


@trap
class WeightNorm(Around):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of being old, as many networks are
            self.a = nn.utils.weight_norm(self.a)


@trap
class SpectralNorm(Around):
    def __init__(self):
        super().__init__()
        self.a = nn.utils.spectral_norm(self.a)


@trap
class ParametrizedNorm(Around):
    def __init__(self):
        super().__init__()
        self.a = parametrizations.weight_norm(self.a)


@trap
class Buffers(Around):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.full((1, 16, 1, 1), 0.3))
        self.register_buffer("mean", torch.full((1, 16, 1, 1), 0.7), persistent=False)

    def unit(self, x):
        return self.b(self.a(x - self.mean) * self.kept)


@trap
class Attributes(Around):
    def __init__(self):
        super().__init__()
        self.scale = torch.linspace(0.5, 1.5, 16).view(1, 16, 1, 1)

    def unit(self, x):
        return self.b(self.a(x) * self.scale)


@trap
class FunctionalDropout(Around):
    def unit(self, x):
        return self.b(F.dropout(F.relu(self.a(x)), 0.5, self.training))


@trap
class NoisyInTraining(Around):
    def __init__(self):
        super().__init__()
        self.extra = nn.Conv2d(16, 16, 1)

    def unit(self, x):
        y = self.a(x)
        if self.training:
            y = y + self.extra(torch.randn_like(y))
        return self.b(y)


@trap
class AlwaysRandom(Around):
    def unit(self, x):
        return self.b(F.dropout(F.relu(self.a(x)), 0.5))


@trap
class Squeezed(Around):
    def forward(self, x):
        x = self.last(self.down(self.unit(self.enter(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).squeeze())


@trap
class OneChannel(Around):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(16, 1, 3, padding=1)

    def unit(self, x):
        return self.b(F.relu(self.a(x))) * torch.sigmoid(self.one(x))


@trap
class Grouped(Around):
    def __init__(self):
        super().__init__()
        self.g, self.d = cbr(16, 16, groups=4), cbr(16, 16, groups=16)

    def unit(self, x):
        return self.b(self.d(self.g(F.relu(self.a(x)))))


@trap
class Dilated(Around):
    def __init__(self):
        super().__init__()
        self.wide = cbr(16, 16, dilation=2)

    def unit(self, x):
        return self.b(self.wide(F.relu(self.a(x))))


@trap
class Transposed(Around):
    def __init__(self):
        super().__init__()
        self.shrink, self.grow = cbr(16, 16, stride=2), nn.ConvTranspose2d(16, 16, 2, 2)

    def unit(self, x):
        return self.b(F.relu(self.grow(self.shrink(F.relu(self.a(x))))))


@trap
class Dense(Around):
    channels = 40

    def __init__(self):
        super().__init__()
        self.b, self.c = nn.Conv2d(24, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def unit(self, x):
        x = torch.cat([x, F.relu(self.c(x))], 1)
        return torch.cat([x, F.relu(self.b(x))], 1)


@trap
class SqueezeExcite(Around):
    def __init__(self):
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def unit(self, x):
        y = F.relu(self.a(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.b(y * gate)


@trap
class SqueezeExciteLinear(Around):
    def __init__(self):
        super().__init__()
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)

    def unit(self, x):
        y = F.relu(self.a(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1).flatten(1)))))
        return self.b(y * gate[:, :, None, None])


@trap
class SqueezeExciteInplace(SqueezeExcite):
    def unit(self, x):
        y = self.relu(self.a(x))
        gate = self.excite(self.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid_()
        y *= gate
        return self.b(y)


@trap
class WritesOut(Around):
    """Into its images."""

    def forward(self, x):
        torch.mul(x, 2.0, out=x)
        return super().forward(x)


@trap
class WritesByFunctionsOfTorchs(Around):
    def unit(self, x):
        y, z = self.a(x), self.b(x)
        F.leaky_relu_(y, 0.1)
        F.hardtanh_(z)
        return y + z


@trap
class IdentityByName(Around):
    def __init__(self):
        super().__init__()
        self.same = nn.Identity()

    def unit(self, x):
        return self.b(self.same(input=self.a(x)))


@trap
class Permuted(Around):
    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.arange(15, -1, -1))

    def unit(self, x):
        return self.b(self.a(x)[:, self.order])


class _Flips(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x).flip(1)


@trap
class FlipsInItsNorm(Around):
    def __init__(self):
        super().__init__()
        self.norm = _Flips(4, 16)

    def unit(self, x):
        return self.b(F.relu(self.norm(self.a(x))))


@trap
class DrawnAnew(Around):
    def __init__(self):
        super().__init__()
        self.order = torch.randperm(16)

    def unit(self, x):
        return self.b(self.a(x)[:, self.order])


@trap
class NumbersInForward(Around):
    def unit(self, x):
        return self.b(self.a(x) * torch.tensor([2.0]))


@trap
class NamedAsTorchs(Around):
    def __init__(self):
        super().__init__()
        self.graph = nn.Conv2d(16, 16, 1)

    def unit(self, x):
        return self.b(self.graph(self.a(x)))


@trap
class HeldOutOfSight(Around):
    """A hook's closure has a tensor."""

    def __init__(self):
        super().__init__()
        factor = torch.full((1, 16, 1, 1), 2.0)
        self.a.register_forward_hook(lambda module, given, result: result * factor)


@trap
class NormalizesItsImages(Around):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]), persistent=False)
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.4]))

    def forward(self, x):
        return super().forward((x - self.mean[:, None, None]) / self.std.view(3, 1, 1))


@trap
class JoinedWithItself(Around):
    def __init__(self):
        super().__init__()
        self.b = nn.Conv2d(24, 16, 3, padding=1)

    def unit(self, x):
        y = self.a(x)
        return self.b(torch.cat([y, y[:, 8:]], 1))


@trap
class AddNamed(Around):
    def __init__(self):
        super().__init__()
        self.add = cbr(16, 16)

    def unit(self, x):
        return self.add(self.b(self.a(x)) + x)


@trap
class BufferInTwoBlocks(Around):
    def __init__(self):
        super().__init__()
        self.register_buffer("halved", torch.tensor(0.5))

    def forward(self, x):
        x = self.unit(self.enter(x)) * self.halved
        return self.fc(self.last(self.down(x) * self.halved).mean((2, 3)))


@trap
class PartsWrittenOneByOne(Around):
    def unit(self, x):
        parts = self.a(x).chunk(2, 1)
        parts[0].relu_()
        return self.b(torch.cat([parts[1], parts[0]], 1))


@trap
class DropoutOfTorchs(Around):
    def unit(self, x):
        x = torch.dropout(x, 0.5, self.training)
        return self.b(F.dropout(self.a(x), 0.5 if self.training else 0.0))


@trap
class NoDropout(Around):
    def unit(self, x):
        return self.b(F.dropout(self.a(x), 0.5, training=False))


@trap
class ChangesByOperators(Around):
    def unit(self, x):
        y = self.a(x)
        z = y
        z += 1.0
        z *= 2.0
        z -= x
        z /= 3.0
        return self.b(y)


@trap
class OfSeveralTypes(Around):
    """In place, a tensor keeps its type."""

    def __init__(self):
        super().__init__()
        self.register_buffer("gains", torch.linspace(0.3, 1.7, 16, dtype=torch.float64).view(1, 16, 1, 1))

    def unit(self, x):
        y = self.a(x)
        y.mul_(self.gains)
        y += self.gains
        mask = x.clone()
        mask.gt_(0.1)
        return self.b(y * mask)


@trap
class ExpandedBuffer(Around):
    def __init__(self):
        super().__init__()
        self.register_buffer("gains", torch.linspace(0.5, 1.5, 16).view(1, 16, 1, 1).expand(1, 16, 8, 8))

    def unit(self, x):
        return self.b(self.a(x) * self.gains)


@trap
class HookedIdentity(Around):
    def __init__(self):
        super().__init__()
        self.doubled = nn.Identity()
        self.doubled.register_forward_hook(lambda module, given, result: 2.0 * result)

    def unit(self, x):
        return self.b(self.doubled(self.a(x)))


@trap
class OneSlope(Around):
    def __init__(self):
        super().__init__()
        self.slope = nn.PReLU()

    def unit(self, x):
        return self.b(self.slope(self.a(x)))


@trap
class IntegerParameter(Around):
    def __init__(self):
        super().__init__()
        self.order = nn.Parameter(torch.arange(16).roll(5), requires_grad=False)

    def unit(self, x):
        return self.b(self.a(x)[:, self.order])


@trap
class Lazy(Around):
    def __init__(self):
        super().__init__()
        self.fc = nn.LazyLinear(10)


@trap
class HookedAsAWhole(Around):
    def __init__(self):
        super().__init__()
        self.register_forward_hook(lambda module, given, result: 2.0 * result)


@trap
class HoldsALock(Around):
    def __init__(self):
        super().__init__()
        self.a.lock = threading.Lock()


@trap
class ChangesItsType(Around):
    def unit(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(x)
        return self.b(y.float())


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@trap
class StraightThrough(Around):
    def unit(self, x):
        return self.b(_Sign.apply(self.a(x)))


@trap
class WithoutGradients(Around):
    def unit(self, x):
        with torch.no_grad():
            y = self.a(x)
        return self.b(y)


@trap
class FrozenNorms(Around):
    def train(self, mode=True):
        super().train(mode)
        self.enter[1].eval()
        return self


@trap
class CountsInPlace(Around):
    """Numbers and tuples, whose name keeps what it was."""

    def unit(self, x):
        y = self.a(x)
        n, channels, height, width = y.shape
        half = channels
        half //= 2
        shape = (n, 2)
        whole = shape
        shape += (half, height, width)
        y = y.reshape(shape).flip(1)
        return self.b(y.reshape(whole[0], channels, height, width))


@trap
class Gates(Around):
    def unit(self, x):
        p, q = self.a(x).chunk(2, 1)
        p *= q
        return self.b(torch.cat([p, q], 1))


@trap
class ComparesByOtherNames(Around):
    def unit(self, x):
        y = self.a(x)
        mask = x.clone()
        mask.greater_(0.1)
        other = x.clone()
        other.less_equal_(0.2)
        return self.b(y * mask + other)


@trap
class ExpandedParameter(Around):
    def __init__(self):
        super().__init__()
        self.gains = nn.Parameter(torch.full((1, 1, 1, 1), 0.7).expand(1, 16, 1, 1))

    def unit(self, x):
        return self.b(self.a(x) * self.gains)


@trap
class WritesIntoLaterImages(Around):
    def unit(self, x):
        y = self.a(x)
        y[8:].add_(1.0)
        return self.b(y)


@trap
class TrainsToNothing(Around):
    def train(self, mode=True):
        super().train(mode)


@trap
class TrainsWithoutMode(Around):
    def train(self):
        return super().train()


class _Single(nn.Conv2d):
    def forward(self, x):
        if x.dtype != torch.float32:
            raise TypeError("float32, please")
        return super().forward(x)


@trap
class SingleAlone(Around):
    def __init__(self):
        super().__init__()
        self.a = _Single(16, 16, 3, padding=1)

    def unit(self, x):
        return self.b(self.a(x))


@trap
class OnlyEvaluates(Around):
    def train(self, mode=True):
        if mode:
            raise RuntimeError("inference only")
        return super().train(mode)


@trap
class ScalesInEvalAlone(Around):
    def unit(self, x):
        y = self.a(x)
        return self.b(y if self.training else y * 0.8)


@trap
class MakesZeros(Around):
    def unit(self, x):
        return self.b(self.a(x) + torch.zeros(x.shape[0], 16, 8, 8))


@trap
class AsksForValues(Around):
    def unit(self, x):
        y = self.a(x)
        mask = y < 0
        y[mask] *= 0.1
        return self.b(y)
