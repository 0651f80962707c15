"""Norms with one fault each, and the norms without it: what the conformance kit must tell apart.

A mutant is its twin with one step done wrong. Most faults are those of published code.
"""

from __future__ import annotations

import inspect
import random
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional as F

from normzoo import ops
from normzoo.layers.base import MomentNorm, Norm, Traits, in_backward
from normzoo.layers.batch import GhostBatchNorm
from normzoo.ops import Moments

# ---- twins written out by hand ---------------------------------------------------------------------------------------


class Hand(Norm):
    """The contract in steps, on ``(b, s, c)``; a mutant gets one of them wrong."""

    promises: ClassVar[Traits] = Traits(batch_dependent=False, causal=True, causal_in_training=True)

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(num_features, channel_dim=channel_dim)
        self.eps = eps
        self.parameters_of(affine, device, dtype)

    def parameters_of(self, affine: bool, device, dtype) -> None:
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            filled = torch.full((self.num_features,), value, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(filled) if affine else None)

    @property
    def traits(self) -> Traits:
        return self.promises

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.check_input(x, mask)
        z = self.widened(self.rows(x))
        real = None if mask is None else mask.flatten(1).unsqueeze(-1) if mask.ndim > 1 else mask.view(-1, 1, 1)
        z = self.hidden(z, real)
        y = self.shown(self.scaled(self.core(z, real)), real)
        return self.back(self.narrowed(y, x), x)

    def rows(self, x: Tensor) -> Tensor:
        last = x if self.channel_dim == -1 else x.movedim(1, -1)
        return last.flatten(1, -2) if x.ndim > 2 else last.unsqueeze(1)

    def back(self, y: Tensor, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return y.squeeze(1)
        shape = x.shape if self.channel_dim == -1 else (x.shape[0], *x.shape[2:], x.shape[1])
        y = y.reshape(shape)
        return y if self.channel_dim == -1 else y.movedim(-1, 1)

    def widened(self, x: Tensor) -> Tensor:
        return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x

    def narrowed(self, y: Tensor, x: Tensor) -> Tensor:
        return y.to(x.dtype)

    def hidden(self, z: Tensor, real: Tensor | None) -> Tensor:
        return z if real is None else torch.where(real, z, 0)

    def shown(self, y: Tensor, real: Tensor | None) -> Tensor:
        return y if real is None else torch.where(real, y, 0)

    def scaled(self, y: Tensor) -> Tensor:
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def core(self, z: Tensor, real: Tensor | None) -> Tensor:
        raise NotImplementedError


class Layer(Hand):
    """Layer norm of each position."""

    promises = Traits(False, True, True, scale_invariant=True, shift_invariant=True)

    def core(self, z: Tensor, real: Tensor | None) -> Tensor:
        mean = z.mean(-1, keepdim=True)
        deviation = z - mean
        return deviation * torch.rsqrt(self.power(deviation) + self.eps)

    def power(self, deviation: Tensor) -> Tensor:
        return deviation.square().mean(-1, keepdim=True)


class Root(Hand):
    """Root mean square norm of each position."""

    promises = Traits(False, True, True, scale_invariant=True)

    def core(self, z: Tensor, real: Tensor | None) -> Tensor:
        return z * torch.rsqrt(self.power(z) + self.eps)

    def power(self, z: Tensor) -> Tensor:
        return z.square().mean(-1, keepdim=True)


class Tanh(Hand):
    """A saturating function of each element."""

    promises = Traits(False, True, True, includes_activation=True)

    def core(self, z: Tensor, real: Tensor | None) -> Tensor:
        return torch.tanh(z * (0.5 + self.eps))


class Instance(Hand):
    """Each channel of each sample over its positions; one position comes out as zero."""

    promises = Traits(False, False, False, scale_invariant=True, shift_invariant=True)

    def core(self, z: Tensor, real: Tensor | None) -> Tensor:
        count = self.count(z, real)
        mean = z.sum(1, keepdim=True) / count
        deviation = self.hidden(z - mean, real)
        return deviation * torch.rsqrt(self.over(deviation.square(), count) + self.eps)

    def count(self, z: Tensor, real: Tensor | None) -> Tensor | int:
        return max(z.shape[1], 1) if real is None else real.sum(1, keepdim=True).clamp(min=1)

    def over(self, squares: Tensor, count: Tensor | int) -> Tensor:
        return squares.sum(1, keepdim=True) / count


class Running(Hand):
    """Division by the mean square of all positions up to now: causal in training as well."""

    promises = Traits(False, True, True, scale_invariant=True)

    def core(self, z: Tensor, real: Tensor | None) -> Tensor:
        one = torch.ones_like(z[..., :1]) if real is None else real.to(z.dtype)
        squares = (z.square().mean(-1, keepdim=True) * one).cumsum(1)
        return z * torch.rsqrt(squares / one.cumsum(1).clamp(min=1) + self.eps)


class Batch(Hand):
    """Batch norm with running statistics."""

    promises = Traits(True, True, False, stateful=True, scale_invariant=True, shift_invariant=True)

    def __init__(
        self, num_features: int, *, eps: float = 1e-5, affine: bool = True, momentum: float | None = 0.1,
        channel_dim: int = 1, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.momentum = momentum
        self.buffers_of(device, torch.promote_types(dtype or torch.float32, torch.float32))

    def buffers_of(self, device, dtype) -> None:
        self.register_buffer("running_mean", torch.zeros(self.num_features, device=device, dtype=dtype))
        self.register_buffer("running_var", torch.ones(self.num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            if buffer.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, before[name].to(buffer.device))
        return self

    def core(self, z: Tensor, real: Tensor | None) -> Tensor:
        mean, var = self.trained(z, real) if self.training else self.evaluated()
        return (z - mean) * torch.rsqrt(var + self.eps)

    def evaluated(self) -> tuple[Tensor, Tensor]:
        return self.running_mean.clone(), self.running_var.clone()

    def trained(self, z: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, var, count = self.moments(z, real)
        if z.shape[0] and self.counts():
            self.update(mean.detach(), var.detach() * count / (count - 1).clamp(min=1), count)
        return mean, var

    def counts(self) -> bool:
        return not in_backward()

    def moments(self, z: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        size = z.new_tensor(float(z.shape[0] * z.shape[1])) if z.device.type != "meta" else z.new_ones(())
        count = size if real is None else real.sum().to(z.dtype)
        mean = z.sum((0, 1)) / count.clamp(min=1)
        deviation = self.hidden(z - mean, real)
        return mean, deviation.square().sum((0, 1)) / count.clamp(min=1), count

    def update(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        weight = self.step() * (count > 0).to(count.dtype)
        self.running_mean.copy_(self.running_mean + weight * (mean - self.running_mean))
        self.running_var.copy_(self.running_var + weight * (var - self.running_var))

    def step(self) -> Tensor | float:
        dtype = self.running_var.dtype
        return 1 / self.num_batches_tracked.to(dtype) if self.momentum is None else self.momentum


class Plain(nn.Module):
    """A stranger's norm: nothing declared, nothing inherited."""

    def __init__(self, num_features: int, eps: float = 1e-5, channel_dim: int = 1) -> None:
        super().__init__()
        self.eps, self.channel_dim = eps, channel_dim
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.channel_dim] = -1
        y = x / (x.abs().amax(self.channel_dim, keepdim=True) + self.eps)
        return y * self.weight.view(shape) + self.bias.view(shape)


# ---- twins stated by a pattern ---------------------------------------------------------------------------------------


class PatternBatch(MomentNorm):
    """Batch norm in one line."""

    moments = "b c s -> c"


class PatternLayer(MomentNorm):
    """Layer norm in one line."""

    moments = "b c s -> b s"


class PatternRoot(MomentNorm):
    """Root mean square norm in one line."""

    moments = "b c s -> b s"
    centred = False


class PatternGroup(MomentNorm):
    """Group norm in one line."""

    moments = "b (g c) s -> b g"


class Ghost(GhostBatchNorm):
    """Virtual batches of three."""

    def __init__(
        self, num_features: int, *, ghost_batch_size: int = 3, eps: float = 1e-5, affine: bool = True,
        momentum: float | None = 0.1, track_running_stats: bool = True, channel_dim: int = 1, device=None, dtype=None,
    ) -> None:  # fmt: skip
        super().__init__(
            num_features, ghost_batch_size=ghost_batch_size, eps=eps, affine=affine, momentum=momentum,
            track_running_stats=track_running_stats, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip


# ---- contract --------------------------------------------------------------------------------------------------------


class KeywordSink(Layer):
    """Collects mistyped options."""

    def __init__(self, num_features: int, *, eps: float = 1e-5, affine: bool = True, channel_dim: int = 1, device=None,
                 dtype=None, **ignored) -> None:  # fmt: skip
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)


class ForgetsDtype(Layer):
    """Takes dtype and ignores it."""

    def parameters_of(self, affine, device, dtype):
        super().parameters_of(affine, device, None)


class ForgetsWidth(Layer):
    """Does not know its own width."""

    __signature__ = inspect.signature(Layer)

    def __init__(self, num_features: int, **options) -> None:
        super().__init__(num_features, **options)
        self.num_features = 8


class IgnoresAffine(Layer):
    """affine=False leaves the parameters."""

    def parameters_of(self, affine, device, dtype):
        super().parameters_of(True, device, dtype)


class IgnoresEps(Layer):
    """eps is a constant."""

    def core(self, z, real):
        deviation = z - z.mean(-1, keepdim=True)
        return deviation * torch.rsqrt(self.power(deviation) + 1e-5)


class Mute(Layer):
    """The repr says nothing."""

    def extra_repr(self):
        return ""


class ImageGain(Layer):
    """The gain is shaped for images."""

    def parameters_of(self, affine, device, dtype):
        shape = (1, self.num_features, 1, 1)
        self.weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype)) if affine else None
        self.bias = None

    def scaled(self, y):
        return y if self.weight is None else y * self.weight.flatten()


class ImagesOnly(Layer):
    """Flattens volumes for good."""

    def back(self, y, x):
        return super().back(y, x).flatten(-2) if x.ndim == 5 else super().back(y, x)


class IgnoresLayout(Layer):
    """The second axis is the channel, whatever channel_dim says."""

    def check_input(self, x, mask):
        if mask is not None or x.shape[-1] != self.num_features or x.ndim == 2 or self.channel_dim == 1:
            super().check_input(x, mask)

    def core(self, z, real):
        return super().core(z, real) if self.channel_dim == 1 else super().core(z.mT, real).mT


class WidensHalf(Layer):
    """Half precision comes out as float32."""

    def narrowed(self, y, x):
        return y


class HostConstant(Layer):
    """A tensor made on the default device."""

    def core(self, z, real):
        return super().core(z, real) * torch.ones(z.shape[-1], dtype=z.dtype)


class Reorders(Layer):
    """Returns contiguous memory whatever came in."""

    def back(self, y, x):
        return super().back(y, x).contiguous()


class WritesInput(Layer):
    """Centres its input in place."""

    def forward(self, x, mask=None):
        with torch.no_grad():
            x -= x.mean(self.channel_dim, keepdim=True)
        return super().forward(x, mask)


class DrawsGlobally(Layer):
    """Draws from torch's global generator."""

    def core(self, z, real):
        return super().core(z, real) + 0 * torch.rand(())


class DrawsInPython(Layer):
    """The constructor draws from the module random."""

    __signature__ = inspect.signature(Layer)

    def __init__(self, num_features: int, **options) -> None:
        super().__init__(num_features, **options)
        self.tag = random.random()


class TakesAnything(Layer):
    """Broadcasts what does not fit."""

    def check_input(self, x, mask):
        pass


# ---- values ----------------------------------------------------------------------------------------------------------


class _Own(MomentNorm):
    """Standardises by a formula of its own on ``(b, c, s)``."""

    moments = "b c s -> c"

    def standardize(self, x, mask, channels_last, *, given=None, affine=True, running=None):
        if mask is not None or given is not None:
            return super().standardize(x, mask, channels_last, given=given, affine=affine)
        z = x.mT if channels_last else x
        y, moments = self.formula(z.float() if z.dtype in (torch.float16, torch.bfloat16) else z)
        y = ops.affine(y, self.weight, self.bias, False).to(x.dtype)
        return (y.mT if channels_last else y), moments

    def formula(self, z: Tensor) -> tuple[Tensor, Moments | None]:
        raise NotImplementedError


class Unbiased(_Own):
    """Divides by the unbiased deviation in training."""

    moments = "b c s -> b s"

    def formula(self, z):
        mean = z.mean(1, keepdim=True)
        return (z - mean) / torch.sqrt(z.var(1, keepdim=True) + self.eps), None


class UnbiasedNotCentred(_Own):
    """Divides by the unbiased deviation without taking the mean off."""

    moments = "b c s -> b s"
    centred = False

    def formula(self, z):
        return z / torch.sqrt(z.var(1, keepdim=True) + self.eps), None


class DeviationPlusEps(_Own):
    """std + eps in place of sqrt(var + eps)."""

    moments = "b c s -> b s"

    def formula(self, z):
        mean, var = z.mean(1, keepdim=True), z.var(1, keepdim=True, correction=0)
        return (z - mean) / (torch.sqrt(var) + self.eps), None


class BiasedRunning(PatternBatch):
    """Averages the biased variance."""

    def update(self, moments):
        number = moments.number
        super().update(moments._replace(var=moments.var * (number - 1) / number))


class FastDiffers(PatternLayer):
    """The fast path has another eps."""

    def standardize(self, x, mask, channels_last, **options):
        if ops._backend == "auto" and mask is None and channels_last and x.is_contiguous():
            w, b = (p if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
            return F.layer_norm(x, x.shape[-1:], w, b, 10 * self.eps), None
        return super().standardize(x, mask, channels_last, **options)


class FallsThrough(PatternRoot):
    """The fast path's result is normalised again."""

    def standardize(self, x, mask, channels_last, **options):
        y, moments = super().standardize(x, mask, channels_last, **options)
        again = ops._backend == "auto" and not channels_last
        return super().standardize(y, mask, channels_last, **options) if again else (y, moments)


class GainTwice(Root):
    """The gain is applied twice."""

    def scaled(self, y):
        return super().scaled(y if self.weight is None else y * self.weight)


class GainOutside(Layer):
    """The gain is taken out of the graph."""

    def scaled(self, y):
        return y if self.weight is None else y * self.weight.data + self.bias


class DetachedMean(Layer):
    """No gradient flows through the mean."""

    def core(self, z, real):
        deviation = z - z.mean(-1, keepdim=True).detach()
        return deviation * torch.rsqrt(self.power(deviation) + self.eps)


class DetachedStatistics(Batch):
    """No gradient flows through the statistics."""

    def moments(self, z, real):
        return super().moments(z.detach(), real)


class _Function(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) over the last axis, with a differentiable backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, eps):
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        return x * inverse, inverse

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx, grad, _):
        x, _ = ctx.saved_tensors
        return _root_gradient(x, grad, 1e-5), None


def _root_gradient(x, grad, eps):
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return inverse * (grad - x * inverse.square() * (x * grad).mean(-1, keepdim=True))


class _Once(_Function):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        x, _ = ctx.saved_tensors
        return _root_gradient(x, grad, 1e-5), None


class _WritesSaved(_Function):
    @staticmethod
    def backward(ctx, grad, _):
        x, inverse = ctx.saved_tensors
        result = _root_gradient(x, grad, 1e-5) * (inverse / inverse.detach().clone())
        inverse.data.mul_(0.5)
        scale = inverse.data * 2 * torch.sqrt(x.detach().square().mean(-1, keepdim=True) + 1e-5)
        return result * scale, None


class _NoVmap(_Function):
    generate_vmap_rule = False


class Custom(Root):
    """Root mean square norm by a custom function."""

    function: ClassVar[type[torch.autograd.Function]] = _Function

    def __init__(
        self, num_features: int, *, affine: bool = True, channel_dim: int = 1, device=None, dtype=None
    ) -> None:
        super().__init__(num_features, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)

    def core(self, z, real):
        return self.function.apply(z, 1e-5)[0]


class OnceDifferentiable(Custom):
    """No second derivative."""

    function = _Once


class WritesSaved(Custom):
    """The backward pass writes into what was saved for it."""

    function = _WritesSaved


class NoVmap(Custom):
    """The custom function has no rule for vmap."""

    function = _NoVmap


class Cancels(Layer):
    """The variance as a difference of large numbers."""

    def core(self, z, real):
        mean = z.mean(-1, keepdim=True)
        var = (z.square().mean(-1, keepdim=True) - mean.square()).clamp(min=0)
        return (z - mean) * torch.rsqrt(var + self.eps)


class SquaresInHalf(Root):
    """Squares in the precision of the input: they overflow, and the output is zero."""

    def widened(self, x):
        return x


class PlainSquaresInHalf(Plain):
    """The same in a stranger's module."""

    def forward(self, x):
        shape = [1] * x.ndim
        shape[self.channel_dim] = -1
        y = x * torch.rsqrt((x * x).mean(self.channel_dim, keepdim=True) + self.eps)
        return y * self.weight.view(shape) + self.bias.view(shape)


class FourthPowers(Root):
    """A detour over fourth powers overflows float32."""

    def power(self, z):
        return super().power(z).square().sqrt()


class NoEps(Layer):
    """eps is taken for granted."""

    def core(self, z, real):
        deviation = z - z.mean(-1, keepdim=True)
        return deviation / torch.sqrt(self.power(deviation)) * (1 - self.eps)


class RootAtZero(Layer):
    """The slope of the root is infinite at zero."""

    def core(self, z, real):
        deviation = z - z.mean(-1, keepdim=True)
        return deviation / (torch.sqrt(self.power(deviation)) + self.eps)


class RawStrides(Layer):
    """Asks for contiguous memory."""

    def rows(self, x):
        if x.ndim == 3 and self.channel_dim == 1:
            x.view(-1)
        return super().rows(x)


class FixedParts(Ghost):
    """The batch must be a multiple of the virtual batch, even in evaluation."""

    def normalize(self, x, mask, channels_last):
        if x.shape[0] % self.ghost_batch_size:
            x = x.view(-1, self.ghost_batch_size, *x.shape[1:]).flatten(0, 1)
        return super().normalize(x, mask, channels_last)


class NeedsSamples(Batch):
    """The unbiased variance over samples alone."""

    def moments(self, z, real):
        mean, var, count = super().moments(z, real)
        return mean, var + 0 * z.var(0).mean(0), count


class NeedsPositions(Instance):
    """The unbiased variance over positions."""

    def over(self, squares, count):
        return squares.sum(1, keepdim=True) / (count - 1)


class PoisonedByNothing(Batch):
    """An empty batch goes into the running statistics."""

    def moments(self, z, real):
        if z.shape[0]:
            return super().moments(z, real)
        return z.mean((0, 1)), z.mean((0, 1)), z.new_ones(())

    def trained(self, z, real):
        mean, var, count = self.moments(z, real)
        if self.counts():
            self.update(mean.detach(), var.detach() * count / (count - 1).clamp(min=1), count)
        return mean, var


# ---- state -----------------------------------------------------------------------------------------------------------


class PlainTensors(Batch):
    """Statistics are plain attributes."""

    def buffers_of(self, device, dtype):
        self.running_mean = torch.zeros(self.num_features, device=device, dtype=dtype)
        self.running_var = torch.ones(self.num_features, device=device, dtype=dtype)
        self.num_batches_tracked = torch.zeros((), device=device, dtype=torch.long)


class CountsInPython(Batch):
    """The counter of the cumulative average is a number in Python."""

    __signature__ = inspect.signature(Batch)

    def __init__(self, num_features: int, *, momentum: float | None = None, **options) -> None:
        super().__init__(num_features, momentum=momentum, **options)
        self.seen = 0.0

    def step(self):
        self.seen += 1.0
        return 1 / self.seen if self.momentum is None else self.momentum


class ForgetfulCopy(CountsInPython):
    """A copy starts to count anew."""

    def __getstate__(self):
        return {**self.__dict__, "seen": 0.0}

    def __deepcopy__(self, memo):
        made = type(self)(self.num_features, eps=self.eps, momentum=self.momentum, channel_dim=self.channel_dim)
        made.to(self.running_mean.dtype).train(self.training).load_state_dict(self.state_dict())
        return made


class HalfStatistics(Batch):
    """Statistics are cast with the model."""

    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)


class CountsTwice(Batch):
    """A repeated forward pass counts again."""

    def counts(self):
        return True


class KeepsGraph(Batch):
    """Statistics stay in the graph of the step."""

    def trained(self, z, real):
        mean, var, _ = self.moments(z, real)
        if z.shape[0] and self.counts():
            self.running_mean = self.running_mean.lerp(mean, 0.1)
            self.running_var = self.running_var.lerp(var, 0.1)
            return mean + 1e-3 * self.running_mean, var
        return mean, var


class ReusesWorkspace(Batch):
    """The graph uses a workspace that the next forward pass overwrites."""

    def buffers_of(self, device, dtype):
        super().buffers_of(device, dtype)
        self.register_buffer("workspace", torch.ones(self.num_features, device=device, dtype=dtype), persistent=False)

    def scaled(self, y):
        with torch.no_grad():
            self.workspace.fill_(1)
        return super().scaled(y * self.workspace.to(y.dtype))


class AliasesRunning(Batch):
    """Evaluation uses the buffers themselves."""

    def core(self, z, real):
        if self.training:
            return super().core(z, real)
        return F.batch_norm(z.mT, self.running_mean.to(z.dtype), self.running_var.to(z.dtype), eps=self.eps).mT


class UpdatesInEvaluation(Batch):
    """Evaluation updates the statistics."""

    def evaluated(self):
        with torch.no_grad():
            self.running_mean.mul_(0.99)
        return super().evaluated()


class NeverEvaluates(Batch):
    """Evaluation uses the batch."""

    def evaluated(self):
        return self.latest

    def core(self, z, real):
        self.latest = self.moments(z, real)[:2]
        return super().core(z, real)


class Overcorrects(Batch):
    """A variance that starts at one is corrected as if it had started at zero."""

    __signature__ = inspect.signature(Batch)

    def __init__(self, num_features: int, *, momentum: float | None = 0.01, **options) -> None:
        super().__init__(num_features, momentum=momentum, **options)

    def evaluated(self):
        mean, var = super().evaluated()
        seen = self.num_batches_tracked.clamp(min=1)
        share = 1 - (1 - (self.momentum or 0.01)) ** seen
        return mean / share, torch.where(self.num_batches_tracked > 0, var / share, var)


class ForgetsMean(Batch):
    """Evaluation leaves the mean out."""

    def evaluated(self):
        mean, var = super().evaluated()
        return 0 * mean, var


class KeepsMomentum(Batch):
    """Momentum is the weight of the old value."""

    def step(self):
        return 1 - super().step()


class NoCumulativeAverage(Batch):
    """momentum=None is an accident."""

    def step(self):
        assert self.momentum is not None
        return self.momentum


class CountsParts(Ghost):
    """Every virtual batch counts as a batch."""

    def update(self, moments):
        super().update(moments)
        if self.training and not self.hold:
            self.num_batches_tracked.add_(self.sizes["n"] - 1)


class NeverHolds(PatternBatch):
    """Statistics cannot be held."""

    def update(self, moments):
        hold, self.hold = self.hold, False
        super().update(moments)
        self.hold = hold


class DeniesState(Batch):
    """Says that it keeps nothing."""

    promises = Traits(True, True, False, stateful=False, scale_invariant=True, shift_invariant=True)


# ---- independence ----------------------------------------------------------------------------------------------------


class DeniesBatch(Layer):
    """Shares a statistic over the batch and says it does not."""

    def power(self, deviation):
        return super().power(deviation).mean(0, keepdim=True) if deviation.shape[0] else super().power(deviation)


class LooksAhead(Instance):
    """Shares a statistic over positions and says it is causal."""

    promises = Traits(False, True, False, scale_invariant=True, shift_invariant=True)


class LooksAheadInTraining(PatternBatch):
    """Says that it is causal in training as well."""

    @property
    def traits(self):
        return Traits(True, True, True, stateful=True, scale_invariant=True, shift_invariant=True)


class OrderMatters(PatternBatch):
    """Later samples weigh more."""

    def standardize(self, x, mask, channels_last, **options):
        y, moments = super().standardize(x, mask, channels_last, **options)
        if options.get("given") is None and mask is None and x.shape[0] > 1:
            rank = torch.linspace(0.9, 1.1, x.shape[0], dtype=x.dtype, device=x.device)
            y = y * rank.view(-1, 1, 1)
        return y, moments


class CountsPadding(Batch):
    """Divides by the padded length."""

    def moments(self, z, real):
        mean, var, _ = super().moments(z, None)
        return mean, var, z.new_tensor(float(z.shape[0] * z.shape[1]))


class ShowsPadding(Layer):
    """Padding comes out as the shift."""

    def shown(self, y, real):
        return y


class MultipliesMask(Layer):
    """Zero times NaN is NaN."""

    def hidden(self, z, real):
        return z if real is None else z * real

    def shown(self, y, real):
        return y if real is None else y * real


class MeansOfMeans(Batch):
    """Every sequence weighs the same, whatever its length."""

    def moments(self, z, real):
        if real is None:
            return super().moments(z, real)
        used = real.any(1).to(z.dtype)
        of = lambda values: ((values * real).sum(1) / real.sum(1).clamp(min=1) * used).sum(0) / used.sum().clamp(min=1)  # noqa: E731
        mean = of(z)
        return mean, of((z - mean).square()), real.sum().to(z.dtype)


class EmptySequence(Instance):
    """Divides by the number of real positions, which may be none."""

    def count(self, z, real):
        return max(z.shape[1], 1) if real is None else real.sum(1, keepdim=True)

    def shown(self, y, real):
        return y if real is None else torch.where(real.any(1, keepdim=True), y * real, y)


# ---- invariance ------------------------------------------------------------------------------------------------------


class ClaimsScale(Tanh):
    """Says that scale does not matter."""

    promises = Traits(False, True, True, scale_invariant=True, includes_activation=True)


class ClaimsShift(Root):
    """Says that the mean does not matter."""

    promises = Traits(False, True, True, scale_invariant=True, shift_invariant=True)


class Noisy(Layer):
    """Adds noise and does not say so."""

    def core(self, z, real):
        y = super().core(z, real)
        return y + 0.01 * torch.randn(z.shape, dtype=z.dtype) if self.training else y


# ---- systems ---------------------------------------------------------------------------------------------------------


class LowersPrecision(Layer):
    """Averages by a matrix product, which autocast does in half precision."""

    def power(self, deviation):
        ones = torch.full(
            (deviation.shape[-1], 1), 1 / deviation.shape[-1], dtype=deviation.dtype, device=deviation.device
        )
        return (deviation.square() @ ones).to(deviation.dtype)


class Rebinds(Batch):
    """Makes new buffers instead of writing to the old."""

    def update(self, mean, var, count):
        self.num_batches_tracked.add_(1)
        weight = self.step() * (count > 0).to(count.dtype)
        self.running_mean = self.running_mean + weight * (mean - self.running_mean)
        self.running_var = self.running_var + weight * (var - self.running_var)


class ReadsBack(Layer):
    """Waits for a value in every step."""

    def core(self, z, real):
        y = super().core(z, real)
        return y * (2.0 if z.abs().sum().item() > 1e30 else 1.0)


class StepsInPython(Batch):
    """A number in Python changes with every step."""

    __signature__ = inspect.signature(Batch)

    def __init__(self, num_features: int, **options) -> None:
        super().__init__(num_features, **options)
        self.steps = 0

    def update(self, mean, var, count):
        self.steps += 1
        super().update(mean, var, count)


class LoopsOverSamples(Layer):
    """A Python loop over the batch."""

    def core(self, z, real):
        if not z.shape[0]:
            return super().core(z, real)
        return torch.stack([super(LoopsOverSamples, self).core(z[i], None) for i in range(z.shape[0])])


class Exotic(Layer):
    """An operation that ONNX does not have."""

    def core(self, z, real):
        return super().core(z, real) + 0 * torch.special.bessel_j0(z)


class MeanOverRanks(_Own):
    """Processes are averaged without weights."""

    def formula(self, z):
        mean, number = z.mean((0, 2), keepdim=True), z.shape[0] * z.shape[2]
        var = (z - mean).square().mean((0, 2), keepdim=True)
        if self.sync and dist.is_initialized():
            local, mean = mean, all_reduce(mean.clone()) / dist.get_world_size()
            var = all_reduce(var + (local - mean).square()) / dist.get_world_size()
            number *= dist.get_world_size()
        moments = Moments(mean.detach().flatten(), var.detach().flatten(), float(number))
        return (z - mean) * torch.rsqrt(var + self.eps), moments


class StaysLocal(PatternBatch):
    """Takes sync and does not synchronise."""

    def standardize(self, x, mask, channels_last, **options):
        on, self.sync = self.sync, False
        try:
            return super().standardize(x, mask, channels_last, **options)
        finally:
            self.sync = on


class Gated(nn.Module):
    """Batch norm with a fixed gate, not inheriting from torch's."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.scale = nn.Parameter(torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x) * self.scale.view(-1, *[1] * (x.ndim - 2))


class GatedByInheritance(nn.BatchNorm1d):
    """A torch batch norm with something added, which conversion drops."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Idle(Layer):
    """A parameter that takes no part."""

    def parameters_of(self, affine, device, dtype):
        super().parameters_of(affine, device, dtype)
        self.spare = nn.Parameter(torch.zeros(self.num_features, device=device, dtype=dtype))


# ---- the list --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A faulty norm, the norm without the fault, the check that must name the fault, and what it must say."""

    norm: type[nn.Module]
    twin: type[nn.Module]
    check: str
    says: str

    def __str__(self) -> str:
        return self.norm.__name__


MUTANTS = [
    Mutant(ForgetsWidth, Layer, "construction", "num_features is 8"),
    Mutant(KeywordSink, Layer, "unknown_options", "was accepted"),
    Mutant(ForgetsDtype, Layer, "factory_options", "weight is torch.float32"),
    Mutant(IgnoresAffine, Layer, "affine_option", "leaves a parameter that is a gain"),
    Mutant(IgnoresEps, Layer, "eps_option", "gives the output of eps=1e-5"),
    Mutant(Mute, Layer, "representation", "does not show the width"),
    Mutant(ImageGain, Layer, "parameter_shapes", r"weight, a gain, has the shape \(1, 8, 1, 1\)"),
    Mutant(ImagesOnly, Layer, "shapes", "the output has the shape"),
    Mutant(IgnoresLayout, Layer, "layouts", "channel_dim=-1 against channel_dim=1"),
    Mutant(WidensHalf, Layer, "dtypes", "gives torch.float32 for torch.float16"),
    Mutant(HostConstant, Layer, "devices", "meta"),
    Mutant(Reorders, Layer, "memory_formats", "channels_last input gives output with the strides"),
    Mutant(WritesInput, Layer, "input_unchanged", "the input was written to"),
    Mutant(DrawsGlobally, Layer, "global_random_state", "torch's global generator moved"),
    Mutant(DrawsInPython, Layer, "global_random_state", "the module random moved"),
    Mutant(TakesAnything, Layer, "wrong_input", "was accepted by a norm for 8 channels|instead of a ValueError"),
    Mutant(Unbiased, PatternLayer, "pattern", "the output in training"),
    Mutant(UnbiasedNotCentred, PatternRoot, "pattern", "the output in training"),
    Mutant(DeviationPlusEps, PatternLayer, "pattern", "the output in training"),
    Mutant(BiasedRunning, PatternBatch, "pattern", "running_var after one batch"),
    Mutant(FastDiffers, PatternLayer, "fast_path", "fast against reference"),
    Mutant(FallsThrough, PatternRoot, "fast_path", "fast against reference"),
    Mutant(GainTwice, Root, "gain_and_shift", "polynomial of weight"),
    Mutant(GainOutside, Layer, "gradients_reach", "no gradient reaches weight"),
    Mutant(DetachedMean, Layer, "gradcheck", "Jacobian mismatch for output 0 with respect to input 0"),
    Mutant(DetachedStatistics, Batch, "gradcheck", "Jacobian mismatch for output 0 with respect to input 0"),
    Mutant(OnceDifferentiable, Custom, "gradgradcheck", "once_differentiable|Jacobian mismatch"),
    Mutant(WritesSaved, Custom, "backward_twice", "second backward pass"),
    Mutant(Cancels, Layer, "large_mean", "300 ± 0.01"),
    Mutant(SquaresInHalf, Root, "half_precision", "float16 input of magnitude 1000: .* all of it is zero"),
    Mutant(PlainSquaresInHalf, Plain, "half_precision", "float16 input of magnitude 1000: .* all of it is zero"),
    Mutant(FourthPowers, Root, "extreme_scales", "magnitude 1e\\+10"),
    Mutant(NoEps, Layer, "constant_input", "the output is NaN"),
    Mutant(RootAtZero, Layer, "constant_input", "gradient of the input is NaN"),
    Mutant(RawStrides, Layer, "strides", "view size is not compatible"),
    Mutant(FixedParts, Ghost, "any_batch_size", "a batch of 1 in evaluation"),
    Mutant(NeedsSamples, Batch, "one_sample", "NaN"),
    Mutant(NeedsPositions, Instance, "one_position", "NaN"),
    Mutant(PoisonedByNothing, Batch, "empty_batch", "running_mean is NaN"),
    Mutant(DeniesState, Batch, "declared_state", "declared stateful=False"),
    Mutant(PlainTensors, Batch, "state_dict", "restored from its state_dict: the output in evaluation"),
    Mutant(CountsInPython, Batch, "state_dict", "when training goes on"),
    Mutant(ForgetfulCopy, Batch, "copies", "when training goes on"),
    Mutant(HalfStatistics, Batch, "statistics_stay_wide", "running_mean is torch.float16"),
    Mutant(CountsTwice, Batch, "checkpointing", "running_mean"),
    Mutant(KeepsGraph, Batch, "accumulation", "running_mean is part of the graph"),
    Mutant(ReusesWorkspace, Batch, "two_forwards", "modified by an inplace operation"),
    Mutant(AliasesRunning, Batch, "two_forwards_frozen", "modified by an inplace operation"),
    Mutant(UpdatesInEvaluation, Batch, "evaluation_is_pure", "after evaluation: running_mean"),
    Mutant(ForgetsMean, Batch, "training_and_evaluation_agree", "away from training"),
    Mutant(Overcorrects, Batch, "first_step", "after step 1 evaluation is"),
    Mutant(KeepsMomentum, Batch, "momentum", "momentum="),
    Mutant(NoCumulativeAverage, Batch, "momentum", "AssertionError"),
    Mutant(CountsParts, Ghost, "batches_are_counted", "num_batches_tracked is 13 after 1 batches"),
    Mutant(NeverHolds, PatternBatch, "frozen_statistics", "while statistics are held"),
    Mutant(NeverEvaluates, Batch, "batch_independence_in_evaluation", "sample 0"),
    Mutant(DeniesBatch, Layer, "batch_independence", "sample 0 among other samples"),
    Mutant(LooksAhead, Instance, "causality", "other positions from 1 on"),
    Mutant(LooksAheadInTraining, PatternBatch, "causality_in_training", "other positions from 1 on"),
    Mutant(OrderMatters, PatternBatch, "permutation", "permuted samples"),
    Mutant(ShowsPadding, Layer, "padding_is_inert", "padded positions come out non-zero"),
    Mutant(MultipliesMask, Layer, "padding_is_inert", "padded positions come out non-zero|not finite"),
    Mutant(CountsPadding, Batch, "mask_against_unpadded", "three padded positions"),
    Mutant(MeansOfMeans, Batch, "mask_weights", "against all real elements in one row"),
    Mutant(EmptySequence, Instance, "mask_edges", "without a real position"),
    Mutant(ClaimsScale, Tanh, "scale_invariance", "4 x the input moves"),
    Mutant(ClaimsShift, Root, "shift_invariance", r"the input \+ 10 moves"),
    Mutant(Noisy, Layer, "determinism", "gives another output"),
    Mutant(LowersPrecision, Layer, "autocast", "under autocast"),
    Mutant(PlainTensors, Batch, "functional_call", "with another norm's parameters and buffers"),
    Mutant(Rebinds, Batch, "vmap", "running_mean"),
    Mutant(NoVmap, Custom, "vmap", "does not have vmap support"),
    Mutant(GatedByInheritance, Gated, "sync_conversion", "after convert_sync_batchnorm"),
    Mutant(ReadsBack, Layer, "compile", "item|data-dependent"),
    Mutant(StepsInPython, Batch, "compile", "something changes from step to step"),
    Mutant(LoopsOverSamples, Layer, "export", "batch"),
    Mutant(Exotic, Layer, "onnx", "bessel_j0"),
    Mutant(MeanOverRanks, PatternBatch, "synchronization", "batches of 3 and 5"),
    Mutant(StaysLocal, PatternBatch, "synchronization", "batches of 4 and 4"),
    Mutant(Idle, Layer, "distributed_data_parallel", "spare takes no part"),
]

TWINS = [*dict.fromkeys(mutant.twin for mutant in MUTANTS), PatternGroup, Running]
