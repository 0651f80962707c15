"""Norms whose statistics follow time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from normzoo.errors import OptionError
from normzoo.layers.base import FormulaNorm, Paper, Traits
from normzoo.registry import register


@register("assorted_time_norm", aliases=("atn",), contrib=True)
class AssortedTimeNorm(FormulaNorm):
    r"""Standardise each position over the channels of the last few positions.

    .. math:: y = \gamma_c \frac{x_t - \mu_t}{\sqrt{\sigma_t^2 + \varepsilon}} + \beta_c, \qquad
              \mu_t, \sigma_t^2 \text{ over channels and the positions } t-k+1, \dots, t

    Layer norm forgets how large a step was beside the one before it; with statistics of several steps that difference
    stays. The first positions have as many as there are. A window of one is layer norm.

    Args:
        num_features: number of channels ``C``.
        window: :math:`k`, positions that share a statistic, the present one included.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` and :math:`\beta`.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C, T)`` or ``(N, T, C)`` to the same; several dimensions of space are read as one, row by row.

    Raises:
        OptionError: when ``window`` is not a positive whole number.

    Example:
        >>> AssortedTimeNorm(8, window=4, channel_dim=-1)(torch.randn(2, 10, 8)).shape
        torch.Size([2, 10, 8])

    Deviations:
        The paper normalises the summed inputs inside a recurrent cell, step by step; this sees a sequence at once and
        stands between layers. No number of the paper has been reproduced.

    Reference:
        Pospisil, Zadorozhnyy and Ye 2022, Assorted-Time Normalization, arXiv 2209.12439.
    """

    paper = Paper("Pospisil, Zadorozhnyy & Ye", 2022, "Assorted-Time Normalization", "2209.12439")

    def __init__(
        self,
        num_features: int,
        *,
        window: int = 8,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        if not isinstance(window, int) or window < 1:
            raise OptionError(f"window={window!r}; expected a positive number of positions")
        self.window = window

    @property
    def traits(self) -> Traits:
        """Positions see earlier ones alone."""
        return Traits(
            batch_dependent=False, causal=True, causal_in_training=True, scale_invariant=True, shift_invariant=True
        )

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Moments of each position, then of its window: exact in two passes, and small beside the channels."""
        mean = x.mean(1)
        var = (x - mean.unsqueeze(1)).square().mean(1)
        real = torch.ones_like(mean) if mask is None else mask.squeeze(1).to(x.dtype)
        mean_k, var_k, real_k = (self.windows(value) for value in (mean, var, real))
        count = real_k.sum(-1).clamp(min=1)
        centre = (real_k * mean_k).sum(-1) / count
        spread = (real_k * (var_k + (mean_k - centre.unsqueeze(-1)).square())).sum(-1) / count
        return (x - centre.unsqueeze(1)) * torch.rsqrt(spread + self.eps).unsqueeze(1)

    def windows(self, values: Tensor) -> Tensor:
        """Each position's window, ``(b, s)`` to ``(b, s, k)``, with zeros before the first."""
        return F.pad(values, (self.window - 1, 0)).unfold(1, self.window, 1)

    def extra_repr(self) -> str:
        """The number of channels, the window, eps and the layout."""
        layout = "" if self.channel_dim == 1 else ", channel_dim=-1"
        return f"{self.num_features}, window={self.window}, eps={self.eps}{layout}"
