"""The definition: standardisation over the axes of any pattern, in plain differentiable operations.

Slow and short on purpose. It runs in the dtype it is given (float64 for the oracle), half precision in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.distributed import ProcessGroup

from normzoo.ops.pattern import Pattern
from normzoo.ops.sync import merge


class Moments(NamedTuple):
    """Statistics in the shape of the right side of a pattern.

    Attributes:
        mean: the mean; zero where the statistic is not centred.
        var: the biased variance, or the second moment where the statistic is not centred.
        number: how many elements each statistic was taken over.
    """

    mean: Tensor
    var: Tensor
    number: Tensor | float


class Running(NamedTuple):
    """Running averages that a batch is counted into: ``running += momentum * (batch - running)``.

    Attributes:
        mean: of the means, or ``None``; float32.
        var: of the unbiased variances; float32.
        batches: their number.
        momentum: the weight of the new value.
    """

    mean: Tensor | None
    var: Tensor
    batches: Tensor
    momentum: float


def wide(x: Tensor) -> Tensor:
    """Float32 in place of half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Axes(NamedTuple):
    """How a canonical tensor falls apart into the elementary axes of a pattern."""

    split: str
    merge: str
    sizes: dict[str, int]
    reduced: tuple[int, ...]
    kept: tuple[int, ...]  # shape of a statistic
    broadcast: tuple[int, ...]  # the same with ones for the reduced axes

    @classmethod
    def of(cls, x: Tensor, pattern: Pattern, options: Mapping[str, int], channels_last: bool) -> Axes:
        """For ``x`` of shape ``(b, c, s)``, or ``(b, s, c)`` when ``channels_last``."""
        b, c, s = (x.shape[0], x.shape[2], x.shape[1]) if channels_last else x.shape
        sizes = pattern.sizes((b, c, s), options)
        batch, channel, position = pattern.factors
        groups = (batch, position, channel) if channels_last else (batch, channel, position)
        names = [axis for group in groups for axis in group]
        whole = " ".join(f"({' '.join(group)})" for group in groups)
        single = " ".join(names)
        return cls(
            split=f"{whole} -> {single}",
            merge=f"{single} -> {whole}",
            sizes={axis: sizes[axis] for group in groups for axis in group if len(group) > 1},
            reduced=tuple(i for i, axis in enumerate(names) if axis not in pattern.kept),
            # channels-last puts position before channel; a statistic keeps the order of the layout it came from
            kept=tuple(sizes[axis] for axis in names if axis in pattern.kept),
            broadcast=tuple(sizes[axis] if axis in pattern.kept else 1 for axis in names),
        )


def standardize(
    x: Tensor,
    pattern: Pattern,
    options: Mapping[str, int],
    *,
    channels_last: bool = False,
    eps: float,
    centred: bool = True,
    mask: Tensor | None = None,
    given: Moments | None = None,
    sync: bool = False,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Moments]:
    r"""Subtract the mean and divide by the standard deviation of the elements that share a statistic.

    .. math:: \hat x = \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}}

    Args:
        x: ``(b, c, s)``, or ``(b, s, c)`` when ``channels_last``.
        pattern: which axes share a statistic.
        options: the size of each free axis of the pattern.
        channels_last: whether the last axis is the channel.
        eps: :math:`\varepsilon`, added to the variance.
        centred: ``False`` leaves the mean alone and divides by the root of the second moment.
        mask: ``(b, s)`` boolean, true where an element is real; the others take no part and come out as zero.
        given: statistics to use instead of those of ``x`` (running averages, for instance).
        sync: take the moments over all processes of ``group``.
        group: the processes; ``None`` is the default group.

    Returns:
        The standardised tensor in float32 or wider, and the (detached) statistics that were used.
    """
    axes = Axes.of(x, pattern, options, channels_last)
    if mask is not None:
        mask = mask.unsqueeze(-1 if channels_last else 1)
        x = torch.where(mask, x, 0)  # whatever is in the padding, NaN included, goes no further
        mask = _split(mask, axes, pattern, channels_last)
    x = rearrange(wide(x), axes.split, **axes.sizes)
    if given is None:
        mean, var, count = _moments(x, axes, centred, mask)
        if sync:
            mean, var, count = merge(mean, var, count, group)
    else:
        mean, var, count = (given.mean.reshape(axes.broadcast), given.var.reshape(axes.broadcast), given.number)
    if centred:
        x = x - mean
    x = x * torch.rsqrt(var + eps)
    if mask is not None:
        x = torch.where(mask, x, 0)
    x = rearrange(x, axes.merge, **axes.sizes)
    if isinstance(count, Tensor):
        count = count.expand(axes.broadcast).reshape(axes.kept)
    return x, Moments(mean.detach().reshape(axes.kept), var.detach().reshape(axes.kept), count)


def _split(mask: Tensor, axes: Axes, pattern: Pattern, channels_last: bool) -> Tensor:
    """Bring a mask with a channel axis of one to the elementary axes, so that it broadcasts."""
    sizes = {axis: 1 if axis in pattern.factors[1] else size for axis, size in axes.sizes.items()}
    return rearrange(mask, axes.split, **sizes)


def _moments(x: Tensor, axes: Axes, centred: bool, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | float]:
    """Two passes: the variance is the mean of the squared deviations, never a difference of large numbers."""
    elements = 1
    for axis in axes.reduced:
        elements *= x.shape[axis]
    if mask is None:
        count: Tensor | float = elements  # an int: a float would fix the batch size of an exported program
        n = max(elements, 1)
    else:
        repeated = 1  # reduced axes along which the mask is constant
        for axis in axes.reduced:
            repeated *= x.shape[axis] // max(mask.shape[axis], 1)
        real = mask.to(x.dtype)  # torch reads an empty tuple of dimensions as all of them
        count = (real.sum(axes.reduced, keepdim=True) if axes.reduced else real) * repeated
        n = count.clamp(min=1)
    if not axes.reduced:
        mean = x if centred else torch.zeros_like(x)
        return mean, (x - mean).square(), count
    if not centred:
        var = x.square().sum(axes.reduced, keepdim=True) / n
        return torch.zeros_like(var), var, count
    mean = x.sum(axes.reduced, keepdim=True) / n
    deviation = x - mean if mask is None else torch.where(mask, x - mean, 0)
    return mean, deviation.square().sum(axes.reduced, keepdim=True) / n, count


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, channels_last: bool) -> Tensor:
    """Scale and shift each channel of a canonical tensor, in its dtype or that of the parameters if wider."""
    shape = (-1,) if channels_last else (-1, 1)
    if weight is not None and bias is not None:
        dtype = torch.promote_types(x.dtype, weight.dtype)
        return torch.addcmul(bias.to(dtype).view(shape), x.to(dtype), weight.to(dtype).view(shape))
    if weight is not None:
        x = x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)
