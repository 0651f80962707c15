"""Metrics that torchmetrics lacks: means over what was counted, which a NaN does not leave unnoticed."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class CountedMean(Metric):
    """The mean of a loss over everything that was counted, in batches of any size.

    Unlike :class:`torchmetrics.MeanMetric` it keeps a NaN: a training that has diverged must not look well.

    Example:
        >>> mean = CountedMean()
        >>> mean.update(torch.tensor(1.0), torch.tensor(3))
        >>> mean.update(torch.tensor(5.0), torch.tensor(1))
        >>> mean.compute()
        tensor(2.)
    """

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, mean: Tensor, count: Tensor) -> None:
        """Count a batch.

        Args:
            mean: Mean over the batch; whatever it is when nothing is counted.
            count: What it is a mean of.
        """
        self.total += torch.where(count > 0, mean.detach() * count, 0.0)
        self.count += count

    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.count


class BitsPerSymbol(CountedMean):
    """The mean of a loss given in nats, in bits.

    Example:
        >>> bits = BitsPerSymbol()
        >>> bits.update(torch.tensor(96.0).log(), torch.tensor(10))
        >>> round(bits.compute().item(), 3)
        6.585
    """

    def compute(self) -> Tensor:
        """The mean in bits."""
        return super().compute() / math.log(2)
