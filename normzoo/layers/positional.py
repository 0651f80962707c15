"""Norms within one sample beside the core ones: per position, per region, and the one that can be undone."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from normzoo.errors import NormzooError, OptionError
from normzoo.layers.base import FormulaNorm, MomentNorm, Norm, Paper, Traits
from normzoo.layers.parts import PER_POSITION_SCALED, CellNorm, moments, wide
from normzoo.layers.rms import unit
from normzoo.layers.sample import InstanceNorm
from normzoo.ops import Moments
from normzoo.registry import register

_STANDARDIZED = Traits(
    batch_dependent=False, causal=True, causal_in_training=True, scale_invariant=True, shift_invariant=True
)


_DETACHED = {
    name: "the gradient leaves out what the paper takes as constant" for name in ("gradcheck", "gradgradcheck")
}


@register("positional_norm", aliases=("pono",))
class PositionalNorm(MomentNorm):
    r"""Standardise each position over its channels, and hand out the moments to put back later.

    .. math:: y = \frac{x - \mu_{b,s}}{\sigma_{b,s}}, \qquad \sigma_{b,s} = \sqrt{\operatorname{var}_c x + \varepsilon}

    The function of ``layer_norm``, without gain and shift by default. The paper's point is the moment short-cut:
    :meth:`with_moments` returns the moments beside the output, differentiable, and :func:`moment_shortcut` gives them
    to a later layer of the same size (:math:`\sigma z + \mu`).

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: for a single channel.

    Example:
        >>> norm, x = PositionalNorm(8), torch.randn(4, 8, 5, 5)
        >>> y, mean, std = norm.with_moments(x)
        >>> torch.allclose(moment_shortcut(y, mean, std), x, atol=1e-5)
        True

    Deviations:
        The variance is biased, as in the paper's formula; the authors' code divides by ``C - 1``.

    Reference:
        Li et al. 2019, Positional Normalization, arXiv 1907.04312.
    """

    moments = "b c s -> b s"
    defaults = {"affine": False}
    paper = Paper("Li et al.", 2019, "Positional Normalization", "1907.04312")

    def with_moments(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the mean and standard deviation of each position: ``x`` with one channel.

        The moments are float32 at least; at masked positions they are 0 and 1.
        """
        y = self(x, mask)
        z = wide(x)
        if mask is not None:
            mask = mask.unsqueeze(self.channel_dim)
            z = torch.where(mask, z, 0)
        mean = z.mean(self.channel_dim, keepdim=True)
        std = ((z - mean).square().mean(self.channel_dim, keepdim=True) + self.eps).sqrt()
        return y, mean, std if mask is None else torch.where(mask, std, 1)


def moment_shortcut(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    r"""Give moments that a norm took away to a later tensor: :math:`\sigma x + \mu`, in the dtype of ``x``.

    >>> moment_shortcut(torch.ones(1, 2, 1), torch.zeros(1, 1, 1), torch.full((1, 1, 1), 3.0)).flatten()
    tensor([3., 3.])
    """
    return (x * std + mean).to(x.dtype)


@register("ada_norm")
class AdaNorm(FormulaNorm):
    r"""Layer norm whose gain falls with the value that it scales, and learns nothing.

    .. math:: y = C\,(1 - k \hat x) \odot \hat x, \qquad
              \hat x = \frac{x - \mu_{b,s}}{\sqrt{\sigma_{b,s}^2 + \varepsilon}}

    over the channels of each position. The factor :math:`C(1 - k \hat x)` is a constant for the gradient.

    Args:
        num_features: number of channels ``C``.
        scale: the constant :math:`C` of the formula; the paper tunes it for each task (0.3 to 2).
        k: :math:`k` of the formula; 1/10 in the paper.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn a gain and shift after all (the paper leaves them out).
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: for a single channel.

    Example:
        >>> AdaNorm(8, channel_dim=-1)(torch.randn(4, 10, 8)).shape
        torch.Size([4, 10, 8])

    Deviations:
        The authors' code takes the unbiased variance and adds :math:`\varepsilon` to its root.

    Reference:
        Xu et al. 2019, Understanding and Improving Layer Normalization, arXiv 1911.07013.
    """

    expected_failures = _DETACHED
    paper = Paper("Xu et al.", 2019, "Understanding and Improving Layer Normalization", "1911.07013")

    def __init__(
        self,
        num_features: int,
        *,
        scale: float = 1.0,
        k: float = 0.1,
        eps: float = 1e-5,
        affine: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        several_channels(self)
        self.scale, self.k = scale, k

    @property
    def traits(self) -> Traits:
        """Those of layer norm."""
        return _STANDARDIZED

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Standardise, then scale by a constant that depends on the value."""
        mu, var = moments(x, None, (1,))
        y = (x - mu) * torch.rsqrt(var + self.eps)
        return (self.scale * (1 - self.k * y.detach())) * y

    def extra_repr(self) -> str:
        """With the constants."""
        return f"{super().extra_repr()}, scale={self.scale}, k={self.k}"


@register("detach_norm")
class DetachNorm(FormulaNorm):
    r"""Layer norm that takes its mean and variance as constants: the forward pass without its gradients.

    .. math:: y = \gamma_c \frac{x - \mu_{b,s}}{\sqrt{\sigma_{b,s}^2 + \varepsilon}} + \beta_c

    with :math:`\mu` and :math:`\sigma^2` over the channels of each position, through which no gradient flows. The
    paper's experiment, in which it falls behind layer norm: the gradients through the moments are what helps.

    Args:
        num_features: number of channels ``C``.
        detach_mean: no gradient through the mean.
        detach_variance: no gradient through the variance.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` and :math:`\beta`; the paper compares without them.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: for a single channel.

    Example:
        >>> DetachNorm(8, channel_dim=-1)(torch.randn(4, 10, 8)).shape
        torch.Size([4, 10, 8])

    Deviations:
        The authors' code takes the unbiased variance and adds :math:`\varepsilon` to its root.

    Reference:
        Xu et al. 2019, Understanding and Improving Layer Normalization, arXiv 1911.07013.
    """

    expected_failures = _DETACHED
    paper = Paper("Xu et al.", 2019, "Understanding and Improving Layer Normalization", "1911.07013")

    def __init__(
        self,
        num_features: int,
        *,
        detach_mean: bool = True,
        detach_variance: bool = True,
        eps: float = 1e-5,
        affine: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        several_channels(self)
        self.detach_mean, self.detach_variance = detach_mean, detach_variance

    @property
    def traits(self) -> Traits:
        """Those of layer norm."""
        return _STANDARDIZED

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Standardise by constants."""
        mu, var = moments(x, None, (1,))
        mu = mu.detach() if self.detach_mean else mu
        var = var.detach() if self.detach_variance else var
        return (x - mu) * torch.rsqrt(var + self.eps)


def several_channels(norm: Norm) -> None:
    """Refuse to standardise one channel alone.

    Raises:
        NormzooError: for a norm of one channel.
    """
    if norm.num_features < 2:
        raise NormzooError(
            f"{type(norm).__name__} got num_features=1; each position is standardised over its channels, and of one "
            "nothing is left. Expected at least 2"
        )


@register("unit_norm", aliases=("unit_normalization", "l2_norm"))
class UnitNorm(FormulaNorm):
    r"""Divide each position by its length, and multiply by a power of the number of channels.

    .. math:: y = C^{k/2}\, \frac{x}{\max(\lVert x \rVert_2, \varepsilon)}

    over channels. With :math:`k = 0` the length is one, as in the unit normalization of Keras; :math:`k = 1` is
    ``simple_rms_norm``. The paper chooses :math:`k` for each task, to make attention sparse or dense.

    Args:
        num_features: number of channels ``C``.
        k: the exponent.
        eps: the smallest length to divide by; Keras has 1e-6.
        affine: learn a gain for each channel after all.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> UnitNorm(2)(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])

    Deviations:
        None but :math:`\varepsilon`, which the paper does not have.

    Reference:
        Huang, Kümmerle and Zhang 2024, UnitNorm: Rethinking Normalization for Transformers in Time Series,
        arXiv 2405.15903.
    """

    has_bias = False
    paper = Paper("Huang, Kümmerle & Zhang", 2024, "UnitNorm: Rethinking Normalization for Transformers", "2405.15903")

    def __init__(
        self,
        num_features: int,
        *,
        k: float = 0.0,
        eps: float = 1e-6,
        affine: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.k = k

    @property
    def traits(self) -> Traits:
        """Each position by itself."""
        return PER_POSITION_SCALED

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Unit length, or a power of the width."""
        y = unit(x, self.eps)
        return y if self.k == 0 else y * self.num_features ** (self.k / 2)

    def extra_repr(self) -> str:
        """With the exponent."""
        return f"{super().extra_repr()}, k={self.k}"


@register("revin", aliases=("reversible_instance_norm",))
class RevIN(CellNorm):
    r"""Instance norm of a time series that a forecast is given back to.

    .. math:: y = \gamma_c \frac{x - \mu_{b,c}}{\sqrt{\sigma_{b,c}^2 + \varepsilon}} + \beta_c, \qquad
              \tilde x = \frac{\tilde y - \beta_c}{\gamma_c} \sqrt{\sigma_{b,c}^2 + \varepsilon} + \mu_{b,c}

    with moments over positions (time). :meth:`with_moments` normalises the input of a network and returns the moments
    of each series; :meth:`denormalize` puts a forecast :math:`\tilde y`, of any length, back into them.

    Args:
        num_features: number of channels (variables of the series) ``C``.
        variant: ``"paper"``, or ``"official"``: no gradient through the moments, as in the authors' code.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``).
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C, *S)`` or ``(N, *S, C)`` to the same, with more than one position.

    Raises:
        NormzooError: for a single position.

    Example:
        >>> norm, past = RevIN(3, channel_dim=-1), 100 + torch.randn(4, 24, 3)
        >>> y, mean, std = norm.with_moments(past)
        >>> torch.allclose(norm.denormalize(y, mean, std), past, atol=1e-3)
        True
        >>> norm.denormalize(torch.zeros(4, 12, 3), mean, std).shape
        torch.Size([4, 12, 3])

    Deviations:
        The authors' code keeps the moments in the module; here they are returned, so that nothing depends on what the
        module saw last. It also adds :math:`\varepsilon^2` to :math:`\gamma` when it divides by it.

    Reference:
        Kim et al. 2022, Reversible Instance Normalization for Accurate Time-Series Forecasting against Distribution
        Shift, ICLR 2022.
    """

    paper = Paper("Kim et al.", 2022, "Reversible Instance Normalization", venue="ICLR 2022")

    def __init__(
        self,
        num_features: int,
        *,
        variant: Literal["paper", "official"] = "paper",
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        if variant not in ("paper", "official"):
            raise OptionError(f"variant={variant!r}; expected 'paper' or 'official' (no gradient through the moments)")
        self.variant = variant

    @property
    def traits(self) -> Traits:
        """Those of instance norm."""
        return Traits(
            batch_dependent=False, causal=False, causal_in_training=False, scale_invariant=True, shift_invariant=True
        )

    def check_positions(self, x: Tensor, mask: Tensor | None) -> None:
        """Refuse a single position of ``(b, c, s)``.

        Raises:
            NormzooError: for a single position.
        """
        if x.shape[2] == 1 and mask is None and len(x):
            raise NormzooError(
                f"RevIN got one position from input with {len(x)} samples and {x.shape[1]} channels: centred, it is "
                "zero whatever the input. Expected a time series, (N, C, T) with channel_dim=1 or (N, T, C) with -1"
            )

    def coefficients(self, own: Moments, *tensors: Tensor) -> tuple[Tensor, Tensor, float]:
        """Standardise each series."""
        mu, var, _ = own
        if self.variant == "official":
            mu, var = mu.detach(), var.detach()
        return mu, torch.rsqrt(var + self.eps), 0.0

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Standardise each series, of more than one position."""
        self.check_positions(x.mT if channels_last else x, mask)
        return super().normalize(x, mask, channels_last)

    def with_moments(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the mean and standard deviation of each series: ``x`` with one position."""
        y = self(x, mask)
        z = wide(x.movedim(self.channel_dim, 1).flatten(2))
        if mask is not None:
            mask = mask.flatten(1).unsqueeze(1)
            z = torch.where(mask, z, 0)
        shape = [len(x)] + [1] * (x.ndim - 1)
        shape[self.channel_dim] = self.num_features
        mu, var = moments(z, mask, (2,))
        if self.variant == "official":
            mu, var = mu.detach(), var.detach()
        return y, mu.view(shape), (var + self.eps).sqrt().view(shape)

    def denormalize(self, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Put ``y``, a forecast of any length, back into the moments of the input."""
        shape = [1] * y.ndim
        shape[self.channel_dim] = self.num_features
        z = wide(y)
        if self.bias is not None:
            z = z - self.bias.view(shape)
        if self.weight is not None:
            z = z / self.weight.view(shape)
        return (z * std + mean).to(y.dtype)


@register("region_norm", aliases=("region_normalization", "rn_b"))
class RegionNorm(Norm):
    r"""Instance norm of the inside and of the outside of a region, each by itself.

    .. math:: y = \gamma_{k,c} \frac{x - \mu_{b,c,k}}{\sqrt{\sigma_{b,c,k}^2 + \varepsilon}} + \beta_{k,c}, \qquad
              \mu, \sigma^2 \text{ over the positions of region } k

    with gains and shifts of its own for each of the two. ``forward(x, mask, region)`` takes the region as ``(N, *S)``
    boolean, true inside (the hole of inpainting, say), apart from the mask, which says what is real at all. Without a
    region everything is inside: ``instance_norm``.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to the variances.
        affine: learn :math:`\gamma` and :math:`\beta` (``inside.weight``, ``outside.weight``, …).
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: for a single position, or a region that does not fit.

    Example:
        >>> region = torch.zeros(4, 5, 5, dtype=torch.bool)
        >>> region[:, 1:3, 1:3] = True
        >>> RegionNorm(8)(torch.randn(4, 8, 5, 5), region=region).shape
        torch.Size([4, 8, 5, 5])

    Deviations:
        This is the paper's basic form, RN-B; RN-L, which learns the region, is not here. The authors' code takes the
        moments over the whole batch, scales each region by the root of its share, and starts the gains at one as
        :math:`1 + \gamma`.

    Reference:
        Yu et al. 2019, Region Normalization for Image Inpainting, arXiv 1911.10375.
    """

    expected_failures = {
        name: "without a region everything is inside, and the parameters of the outside wait for one"
        for name in ("gradients_reach", "distributed_data_parallel")
    }
    paper = Paper("Yu et al.", 2019, "Region Normalization for Image Inpainting", "1911.10375")

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, channel_dim=channel_dim)
        self.inside = InstanceNorm(
            num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype
        )
        self.outside = InstanceNorm(
            num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype
        )

    @property
    def traits(self) -> Traits:
        """Those of instance norm."""
        return self.inside.traits

    def forward(self, x: Tensor, mask: Tensor | None = None, region: Tensor | None = None) -> Tensor:
        """Normalise ``x``; ``region`` is ``(N, *S)``, true inside."""
        if region is None:
            return self.inside(x, mask)
        self.check_input(x, region)
        inside, outside = (region, ~region) if mask is None else (region & mask, ~region & mask)
        return self.inside(x, inside) + self.outside(x, outside)
