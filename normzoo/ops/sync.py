"""Moments of a batch that is spread over processes.

Every rank takes part in one gathering forward and in one sum backward, of the same numbers whatever computes its share:
a kernel on one rank and the formula on another understand each other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Merge(torch.autograd.Function):
    """Mean, variance and count of all ranks, stacked, from those of this one."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        shares = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shares, own, group=group)
        means, variances, counts = torch.stack(shares, 1)
        total = counts.sum(0)
        share = counts / total.clamp(min=1)
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        ctx.save_for_backward(share[dist.get_rank(group)], own[0] - mean)
        ctx.group = group
        return torch.stack([mean, var, total])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        share, away = ctx.saved_tensors
        to_mean, to_var = total_gradients(grad[0], grad[1], ctx.group)
        to_mean = to_mean + 2 * away * to_var  # by way of the spread of the means
        return torch.stack([share * to_mean, share * to_var, torch.zeros_like(share)]), None


def merge(
    mean: Tensor, var: Tensor, count: Tensor | float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Moments of the union of all ranks' elements from the moments of each (Chan et al. 1979), one collective call.

    .. math:: \mu = \tfrac{1}{n}\sum_i n_i\mu_i, \qquad
              \sigma^2 = \tfrac{1}{n}\sum_i n_i\big(\sigma_i^2 + (\mu_i-\mu)^2\big), \qquad n = \sum_i n_i

    Ranks count by their elements, so unequal, masked and empty shares are exact. Mean and variance are differentiable,
    once: the gradient of a rank's own moments is that of the sum of all ranks' losses.
    """
    counts = torch.as_tensor(count, dtype=mean.dtype, device=mean.device).expand_as(mean)
    own = torch.stack([mean, var, counts]).view(3, -1)
    mean, var, total = _Merge.apply(own, group).view(3, *mean.shape)  # pyright: ignore[reportAttributeAccessIssue]
    return mean, var, total


def total_gradients(to_mean: Tensor, to_var: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The gradients of the common mean and variance over all ranks, from those of each; one collective call."""
    both = torch.stack([to_mean, to_var])
    dist.all_reduce(both.view(2, -1), group=group)
    to_mean, to_var = both
    return to_mean, to_var


def stand_in(x: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    """For a rank without a sample: one of zeros and a mask that leaves nothing of it.

    The rank is then treated as the others are, and meets them wherever they meet.

    >>> x, mask = stand_in(torch.ones(0, 6, 5), False)
    >>> x.shape, mask
    (torch.Size([1, 6, 5]), tensor([[False, False, False, False, False]]))
    """
    positions = x.shape[1:-1] if channels_last else x.shape[2:]
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])]), x.new_zeros(1, *positions, dtype=torch.bool)
