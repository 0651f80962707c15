"""The compiled CPU operators, as the rest of torch has to know them.

``normzoo::standardize`` and its gradient are C++ (``csrc/``). Here is what a compiler needs, the shapes of their
results, and the gradient of the gradient, which is that of the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from normzoo.ops import kernels, reference
from normzoo.ops.pattern import Pattern
from normzoo.ops.reference import Moments, Running
from normzoo.ops.sync import merge, total_gradients

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# bound here: a small call asks all of them
_compiling = torch.compiler.is_compiling
_functorch = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state


def serves(x: Tensor, weight: Tensor | None, bias: Tensor | None, given: Moments | None) -> bool:
    """Whether the compiled kernels take this call: half or single precision on a CPU, with a plain gradient.

    Exported programs get torch's own operators, which run where normzoo is not installed.
    """
    if not x.is_cpu or x.dtype not in _FLOATS or x.numel() == 0:
        return False
    if (weight is not None and weight.dtype not in _FLOATS) or (bias is not None and bias.dtype not in _FLOATS):
        return False
    if given is not None and (given.mean.requires_grad or given.var.requires_grad):
        return False
    return not transformed() and kernels.load()


def transformed() -> bool:
    """Whether this call is traced, exported, or differentiated forward or under ``torch.func``."""
    if _compiling():
        return torch.compiler.is_exporting()
    return _functorch() or forward_ad._current_level >= 0 or _tracing() is not None


def standardize(
    x: Tensor,
    pattern: Pattern,
    options: Mapping[str, int],
    channels_last: bool,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    mask: Tensor | None,
    given: Moments | None,
    rescale: Callable[[Moments], tuple[Tensor | None, Tensor | None]] | None,
    running: Running | None,
) -> tuple[Tensor, Moments | None]:
    """The compiled operation on a tensor of any rank and either memory layout, as :func:`normzoo.ops.standardize`."""
    axes, channel_dim = pattern.code(options), -1 if channels_last else 1
    if running is not None and _compiling():
        running = None  # a compiler wants to see what is written to
    mean, var, batches, momentum = running or (None, None, None, 0.0)
    own = None
    if rescale is not None:
        own = _moments(torch.ops.normzoo.moments.default(x.detach(), mask, axes, channel_dim, centred, eps), x)
        weight, bias = rescale(own)
    known = given or (own if mask is None else None)  # the gradient needs the numbers that a mask leaves
    alone = running is not None or not pattern.batch_dependent
    done = kernels.standardize(
        x, weight, bias, None, mask, None if known is None else known.mean, None if known is None else known.var,
        mean, var, batches, axes, channel_dim, centred, eps, given is not None, momentum, alone=alone,
    )  # fmt: skip
    if alone:
        return done, None
    y, *results = done
    return y, known or _moments(results, x)


def _moments(results: Sequence[Tensor], x: Tensor) -> Moments:
    mean, var, number = results
    return Moments(mean, var, number if number.numel() else x.numel() / mean.numel())


def track(running: Running, moments: Moments, centred: bool) -> bool:
    """Count a batch into running averages, where that takes no more than the compiled operator."""
    mean, var, number = moments
    plain = mean.is_cpu and mean.dtype == var.dtype == torch.float32 and mean.is_contiguous() and var.is_contiguous()
    if not plain or var.shape != running.var.shape or _compiling() or transformed() or not kernels.load():
        return False
    each, count = (number, 0.0) if isinstance(number, Tensor) else (None, number)
    each = None if each is None else each.to(torch.float32).expand_as(var).contiguous()
    torch.ops.normzoo.track.default(
        running.mean, running.var, running.batches, mean, var, each, count, running.momentum, centred
    )
    return True


# ---- statistics over processes -------------------------------------------------------------------------------------


def synchronize(
    x: Tensor,
    pattern: Pattern,
    options: Mapping[str, int],
    channels_last: bool,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    mask: Tensor | None,
    rescale: Callable[[Moments], tuple[Tensor | None, Tensor | None]] | None,
    group: ProcessGroup | None,
) -> tuple[Tensor, Moments]:
    """:func:`standardize` by the moments of all processes of a group; differentiable once, and no compiler sees it."""
    axes, channel_dim = pattern.code(options), -1 if channels_last else 1
    own = _moments(torch.ops.normzoo.moments.default(x.detach(), mask, axes, channel_dim, centred, eps), x)
    moments = Moments(*merge(*own, group))
    if rescale is not None:
        weight, bias = rescale(moments)
    y = _Synchronized.apply(x, weight, bias, mask, *moments, group, axes, channel_dim, centred, eps)
    return y, moments  # pyright: ignore[reportReturnType]


class _Synchronized(torch.autograd.Function):
    """The compiled operators around the statistics of all processes."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, mean: Tensor, var: Tensor,
        number: Tensor, group: ProcessGroup | None, axes: list[int], channel_dim: int, centred: bool, eps: float,
    ) -> Tensor:  # fmt: skip
        scale = torch.rsqrt(var + eps)
        ctx.save_for_backward(x, weight, mask, mean, scale, number)
        ctx.options = group, axes, channel_dim, centred
        return torch.ops.normzoo.rescale.default(x, mean, scale, None, weight, bias, mask, axes, channel_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mask, mean, scale, number = ctx.saved_tensors
        group, axes, channel_dim, centred = ctx.options
        total, product, to_weight, to_bias = torch.ops.normzoo.gradient_sums.default(
            dy, x, weight, mask, mean, scale, axes, channel_dim
        )
        dx = None
        if ctx.needs_input_grad[0]:  # as in the formula: where it is a constant on every rank, they do not meet
            n = number.clamp(min=1)
            to_mean = -scale * total if centred else torch.zeros_like(total)
            to_mean, to_var = total_gradients(to_mean, scale * product * scale * scale / -2, group)
            dx = torch.ops.normzoo.gradient.default(
                dy, x, weight, mask, mean, scale, to_var * 2 / n, to_mean / n, axes, channel_dim
            )
        wanted = zip((to_weight, to_bias), ctx.needs_input_grad[1:3], strict=True)
        return dx, *(gradient if need else None for gradient, need in wanted), *[None] * 9


# ---- shapes, for torch.compile -------------------------------------------------------------------------------------


def _dense(x: Tensor, channel_dim: int) -> tuple[bool, bool]:
    """Whether the channel comes last in memory, and whether the memory is dense."""
    if x.is_contiguous():
        return channel_dim == -1, True
    if x.movedim(channel_dim, 1 if channel_dim == -1 else -1).is_contiguous():
        return channel_dim == 1, True
    return channel_dim == -1, False


def _statistics(x: Tensor, axes: Sequence[int], channel_dim: int) -> Tensor:
    """An empty tensor of one element for each statistic."""
    channels_last, _ = _dense(x, channel_dim)
    channels = x.shape[channel_dim]
    positions = x.numel() // (x.shape[0] * channels)
    counts, at, shapes = axes[:3], 3, []
    for many, total in zip(counts, (x.shape[0], channels, positions), strict=True):
        factors = [(axes[at + 2 * i], axes[at + 2 * i + 1]) for i in range(many)]
        at += 2 * many
        known = 1
        for size, _ in factors:
            known *= max(size, 1)
        shapes.append([size if size > 0 else total // known for size, kept in factors if kept])
    samples, channel, position = shapes
    shape = samples + (position + channel if channels_last else channel + position)
    return x.new_empty(shape, dtype=torch.float32)


def _result(x: Tensor, channel_dim: int) -> Tensor:
    return torch.empty_like(x) if _dense(x, channel_dim)[1] else x.new_empty(x.shape)


def _declare() -> None:
    @torch.library.register_fake("normzoo::standardize")
    def _(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, floor: Tensor | None, mask: Tensor | None,
        mean: Tensor | None, var: Tensor | None, running_mean: Tensor | None, running_var: Tensor | None,
        batches: Tensor | None, axes: list[int], channel_dim: int, centred: bool, eps: float, constant: bool,
        momentum: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        none = x.new_empty(0, dtype=torch.float32)
        if mean is not None:
            return _result(x, channel_dim), none, none.clone(), none.clone()
        mean, var = _statistics(x, axes, channel_dim), _statistics(x, axes, channel_dim)
        return _result(x, channel_dim), mean, var, none if mask is None else torch.empty_like(mean)

    @torch.library.register_fake("normzoo::standardize_backward")
    def _(
        dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, floor: Tensor | None, mask: Tensor | None,
        mean: Tensor, var: Tensor, number: Tensor | None, axes: list[int], channel_dim: int, centred: bool,
        eps: float, constant: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        none = x.new_empty(0, dtype=torch.float32)
        gradients = [none.clone() if p is None else p.new_empty(p.shape) for p in (weight, bias, floor)]
        return _result(x, channel_dim), gradients[0], gradients[1], gradients[2]

    @torch.library.register_fake("normzoo::moments")
    def _(
        x: Tensor, mask: Tensor | None, axes: list[int], channel_dim: int, centred: bool, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean = _statistics(x, axes, channel_dim)
        number = x.new_empty(0, dtype=torch.float32) if mask is None else torch.empty_like(mean)
        return mean, torch.empty_like(mean), number

    torch.library.register_autograd("normzoo::standardize_backward", _double_backward, setup_context=_save)


# ---- the gradient of the gradient ----------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, weight, bias, floor, mask, mean, var, _, *options = inputs
    ctx.save_for_backward(dy, x, weight, bias, floor, mask, mean, var)
    ctx.options = options


def _double_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the formula twice."""
    dy, x, weight, bias, floor, mask, mean, var = ctx.saved_tensors
    axes, channel_dim, centred, eps, constant = ctx.options
    again = torch.is_grad_enabled()  # a third derivative is wanted
    with torch.enable_grad():

        def leaf(t: Tensor) -> Tensor:
            # a view, so that a path from dy back to x is not taken for one of the formula
            return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

        dy, x = leaf(dy), leaf(x)
        parameters = [None if p is None else leaf(p) for p in (weight, bias, floor)]
        given = Moments(mean, var, 1.0) if constant else None
        y = formula(x, parameters[0], parameters[1], parameters[2], mask, given, axes, channel_dim, centred, eps)
        inputs = [x, *(p for p in parameters if p is not None)]
        first = torch.autograd.grad(y, inputs, dy, create_graph=True, materialize_grads=True)
        arrived = [g for g, t in zip(grads, (x, *parameters), strict=True) if t is not None]
        pairs = [(out, g) for out, g in zip(first, arrived, strict=True) if g is not None and out.requires_grad]
        outputs, gradients = [out for out, _ in pairs], [g for _, g in pairs]
        second = iter(torch.autograd.grad(outputs, [dy, *inputs], gradients, create_graph=again, allow_unused=True))
    to_dy, to_x = next(second), next(second)
    return to_dy, to_x, *(None if p is None else next(second) for p in parameters), *([None] * 9)


def formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    floor: Tensor | None,
    mask: Tensor | None,
    given: Moments | None,
    axes: Sequence[int],
    channel_dim: int,
    centred: bool,
    eps: float,
) -> Tensor:
    """What ``normzoo::standardize`` computes, by the reference, in the order of its arguments."""
    pattern, options = Pattern.decode(axes)
    moved, dense = _dense(x, channel_dim)
    z = x if dense else x.contiguous()
    shape = z.shape
    z = z.unsqueeze(-1) if z.ndim == 2 and channel_dim == 1 else z.unsqueeze(1) if z.ndim == 2 else z
    z = z.flatten(2) if channel_dim == 1 else z.flatten(1, -2)
    channels_last = channel_dim == -1
    if moved != channels_last:  # statistics come in the order of the memory
        z, channels_last = z.mT, moved
    real = None if mask is None else mask.reshape(z.shape[0], -1)
    y, _ = reference.standardize(
        z, pattern, options, channels_last=channels_last, eps=eps, centred=centred, mask=real, given=given
    )
    along = (-1,) if channels_last else (-1, 1)
    y = reference.affine(y, weight, bias, channels_last)
    y = y if floor is None else torch.where(y < floor.view(along), floor.view(along), y)
    y = y if real is None else torch.where(real.unsqueeze(-1 if channels_last else 1), y, 0)
    y = (y.mT if moved != (channel_dim == -1) else y).to(x.dtype)
    return y.reshape(shape)


kernels.declare(_declare)
