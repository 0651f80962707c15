"""Norms that exchange or recalibrate the style of a feature map, its moments over positions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from normzoo.errors import OptionError
from normzoo.layers.base import Paper, Traits
from normzoo.layers.parts import CellNorm, WholeFormulaNorm, column, moments
from normzoo.ops import Moments
from normzoo.registry import register

_PAPER = Paper("Tang et al.", 2021, "CrossNorm and SelfNorm for Generalization under Distribution Shifts", "2102.02811")


def _shuffled(size: int, real: Tensor | None, device: torch.device) -> Tensor:
    """A random permutation; samples that are all padding, and have no style to give, are left out of it."""
    keys = torch.rand(size, device=device)
    if real is None:
        return keys.argsort()
    order = torch.where(real, keys, 2).argsort()
    return order[(real.cumsum(0) - 1).clamp(min=0)]


@register("cross_norm", aliases=("crossnorm",))
class CrossNorm(WholeFormulaNorm):
    r"""In training, give each sample the moments of another; in evaluation do nothing.

    .. math:: y = \sigma_{\pi(b),c} \frac{x - \mu_{b,c}}{\sigma_{b,c}} + \mu_{\pi(b),c}, \qquad
              \sigma = \sqrt{\operatorname{var}_s x + \varepsilon}

    with moments over positions and a random permutation :math:`\pi` of the batch, or of the channels of each sample.
    It widens the styles that a network sees, and has no parameters. With probability ``1 - p`` a training batch
    passes unchanged.

    Args:
        num_features: number of channels ``C``.
        exchange: ``"samples"`` (the paper's 2-instance mode) or ``"channels"`` (1-instance mode).
        p: probability that a training batch is exchanged.
        eps: :math:`\varepsilon`, added to the variance.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: taken for the sake of the common signature; there are no parameters.
        dtype: likewise.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for another ``exchange``, or a ``p`` that is no probability.

    Example:
        >>> x = torch.randn(4, 8, 5, 5)
        >>> torch.equal(CrossNorm(8).eval()(x), x)
        True

    Deviations:
        The paper's cropping, which takes the moments from random boxes, is not here. The authors' training loop
        switches a random choice of modules on for each batch, where ``p`` is each module's own; their variance is
        unbiased.

    Reference:
        Tang et al. 2021, CrossNorm and SelfNorm for Generalization under Distribution Shifts, arXiv 2102.02811.
    """

    paper = _PAPER

    def __init__(
        self,
        num_features: int,
        *,
        exchange: Literal["samples", "channels"] = "samples",
        p: float = 0.5,
        eps: float = 1e-5,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=False, channel_dim=channel_dim, device=device, dtype=dtype)
        if exchange not in ("samples", "channels"):
            raise OptionError(f"exchange={exchange!r}; expected 'samples' or 'channels'")
        if not 0 <= p <= 1:
            raise OptionError(f"p={p!r}; expected a probability, from 0 to 1")
        self.exchange, self.p = exchange, p

    @property
    def traits(self) -> Traits:
        """The identity in evaluation."""
        return Traits(
            batch_dependent=self.exchange == "samples", causal=True, causal_in_training=False, stochastic=True
        )

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Exchange the moments."""
        if not self.training:
            return x
        chosen = torch.rand((), device=x.device) < self.p
        mu, var = moments(x, mask, (2,))
        std = (var + self.eps).sqrt()
        if self.exchange == "samples":
            other = _shuffled(len(x), None if mask is None else mask.any(2).squeeze(1), x.device)
        else:
            other = _shuffled(x.shape[1], None, x.device)
        dim = 0 if self.exchange == "samples" else 1
        style_mu, style_std = mu.index_select(dim, other), std.index_select(dim, other)
        return torch.where(chosen, (x - mu) * (style_std / std) + style_mu, x)

    def extra_repr(self) -> str:
        """With the choices."""
        return f"{super().extra_repr()}, exchange={self.exchange!r}, p={self.p}"


@register("self_norm", aliases=("selfnorm",), contrib=True)
class SelfNorm(CellNorm):
    r"""Turn the mean and the deviation of each channel up or down, as they themselves say.

    .. math:: y = g_c(\mu_{b,c}, \sigma_{b,c})\, (x - \mu_{b,c}) + f_c(\mu_{b,c}, \sigma_{b,c})\, \mu_{b,c}

    with moments over positions, :math:`\sigma = \sqrt{\operatorname{var}_s x + \varepsilon}`, and for each channel two
    gates :math:`f_c, g_c = \operatorname{sigmoid}(w_\mu \mu + w_\sigma \sigma + w)`: the output has mean
    :math:`f\mu` and deviation :math:`g\sigma`.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to the variance.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> SelfNorm(8)(torch.ones(4, 8, 5, 5)).mean().round(decimals=3)
        tensor(0.5000, grad_fn=<RoundBackward1>)

    Deviations:
        The authors' code standardises the gates over the batch before the sigmoid and has only :math:`g` (for both) by
        default; here nothing depends on the batch. All weights start at zero, so that both gates start at one half.

    Reference:
        Tang et al. 2021, CrossNorm and SelfNorm for Generalization under Distribution Shifts, arXiv 2102.02811.
    """

    roles = {"f_weight": "gate", "f_bias": "gate", "g_weight": "gate", "g_bias": "gate"}
    paper = _PAPER

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=False, channel_dim=channel_dim, device=device, dtype=dtype)
        self.f_weight = nn.Parameter(torch.zeros(2, num_features, device=device, dtype=dtype))
        self.f_bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        self.g_weight = nn.Parameter(torch.zeros(2, num_features, device=device, dtype=dtype))
        self.g_bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    @property
    def traits(self) -> Traits:
        """Positions of a sample share a statistic; the gates know its size."""
        return Traits(batch_dependent=False, causal=False, causal_in_training=False)

    def tensors(self) -> tuple[Tensor, ...]:
        """The weights of both gates."""
        return self.f_weight, self.f_bias, self.g_weight, self.g_bias

    def coefficients(self, own: Moments, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate the moments."""
        std = (own.var + self.eps).sqrt()
        f, g = (
            (column(w[0]) * own.mean + column(w[1]) * std + column(b)).sigmoid() for w, b in (tensors[:2], tensors[2:])
        )
        return own.mean, g, f * own.mean
