"""Moments of a batch that is spread over processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class _AllGather(torch.autograd.Function):
    """Stack the tensors of all ranks; the gradient of a rank's share is the sum over all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        shares = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(shares, x.contiguous(), group=group)
        return torch.stack(shares)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None


def merge(
    mean: Tensor, var: Tensor, count: Tensor | float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Moments of the union of all ranks' elements from the moments of each (Chan et al. 1979), one collective call.

    .. math:: \mu = \tfrac{1}{n}\sum_i n_i\mu_i, \qquad
              \sigma^2 = \tfrac{1}{n}\sum_i n_i\big(\sigma_i^2 + (\mu_i-\mu)^2\big), \qquad n = \sum_i n_i

    Ranks count by their elements, so unequal, masked and empty shares are exact. Differentiable.
    """
    counts = torch.as_tensor(count, dtype=mean.dtype, device=mean.device).expand_as(mean)
    means, variances, counts = _AllGather.apply(torch.stack([mean, var, counts]), group).unbind(1)  # pyright: ignore[reportAttributeAccessIssue]
    total = counts.sum(0)
    share = counts / total.clamp(min=1)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), total
