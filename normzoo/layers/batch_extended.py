"""Batch norm with one scale for all channels."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.layers.base import Paper
from normzoo.layers.parts import BatchCellNorm
from normzoo.ops import Moments
from normzoo.ops.cells import pool
from normzoo.registry import register


@register("extended_batch_norm", aliases=("ebn",), contrib=True)
class ExtendedBatchNorm(BatchCellNorm):
    r"""Centre each channel over the batch; divide all of them by one standard deviation, over the channels too.

    .. math:: y = \gamma_c \frac{x - \mu_c}{\sqrt{\sigma^2 + \varepsilon}} + \beta_c, \qquad
              \mu_c \text{ over samples and positions}, \quad
              \sigma^2 \text{ over samples, channels and positions}

    More elements make the scale of a small batch less noisy.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: in training, when a channel has a single value.

    Example:
        >>> x = torch.randn(4, 8, 5, dtype=torch.float64)
        >>> expected = (x - x.mean((0, 2), keepdim=True)) / torch.sqrt(x.var(correction=0) + 1e-5)
        >>> torch.allclose(ExtendedBatchNorm(8, dtype=torch.float64)(x), expected, atol=1e-12)
        True

    Deviations:
        The paper's deviation is read as that from the mean of all elements. No number of the paper has been reproduced.

    Reference:
        Luo, Zhan, Li et al. 2020, Extended Batch Normalization, arXiv 2003.05569.
    """

    paper = Paper("Luo et al.", 2020, "Extended Batch Normalization", "2003.05569")

    def coefficients(self, own: Moments, batch: Moments, *tensors: Tensor) -> tuple[Tensor, Tensor, float]:
        """The variance of all from those of the channels, which can be merged, masked and averaged over time."""
        return batch.mean, torch.rsqrt(pool(batch, 1).var + self.eps).expand_as(batch.mean), 0.0
