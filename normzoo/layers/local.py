"""Norms whose statistics come from a neighbourhood: of channels, or of positions."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from normzoo.errors import OptionError
from normzoo.layers.base import FormulaNorm, Paper, Traits, choose_groups
from normzoo.layers.parts import PER_POSITION, mean
from normzoo.ops import full_precision, wide
from normzoo.registry import register


def window_sum(x: Tensor, size: int, dims: tuple[int, ...]) -> Tensor:
    """Sum over a window around each element, cut off at the borders; an even window reaches further back.

    >>> window_sum(torch.tensor([1.0, 2.0, 3.0, 4.0]), 3, (0,))
    tensor([3., 6., 9., 7.])
    """
    for dim in dims:
        reach = max(x.shape[dim] - 1, 0)
        before, after = min(size // 2, reach), min((size - 1) // 2, reach)
        if before or after:
            padding = [0, 0] * (x.ndim - 1 - dim) + [before, after]
            x = F.pad(x, padding).unfold(dim, before + after + 1, 1).sum(-1)
    return x


def checked_size(name: str, size: int) -> int:
    """``size`` if it can be that of a window.

    Raises:
        OptionError: when it is no positive whole number.
    """
    if not isinstance(size, int) or size < 1:
        raise OptionError(f"{name}={size!r}; expected a positive whole number, the width of a window")
    return size


@register("local_response_norm", aliases=("lrn",))
class LocalResponseNorm(FormulaNorm):
    r"""Divide each channel by a power of the mean square of its neighbours.

    .. math:: y = \frac{x}{\big(k + \frac{\alpha}{n} \sum_{c' \in W(c)} x_{c'}^2\big)^{\beta}}

    over the window :math:`W(c)` of :math:`n` channels (``size``) around each channel, cut off at the first and last.
    The function of ``torch.nn.LocalResponseNorm``; the defaults are those of the paper, whose :math:`\alpha = 10^{-4}`
    multiplies the sum and is :math:`5 \cdot 10^{-4}` of the mean over five.

    Args:
        num_features: number of channels ``C``.
        size: channels in the window.
        alpha: :math:`\alpha`.
        beta: :math:`\beta`.
        k: :math:`k`; ``torch.nn`` has 1.
        affine: learn a gain and shift for each channel after all.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when ``size`` is no positive whole number.

    Example:
        >>> x = torch.randn(2, 8, 5, 5)
        >>> torch.allclose(LocalResponseNorm(8)(x), torch.nn.LocalResponseNorm(5, alpha=5e-4, k=2.0)(x))
        True

    Reference:
        Krizhevsky, Sutskever and Hinton 2012, ImageNet Classification with Deep Convolutional Neural Networks,
        NeurIPS 2012, section 3.3.
    """

    paper = Paper("Krizhevsky, Sutskever & Hinton", 2012, "ImageNet Classification", venue="NeurIPS 2012")

    def __init__(
        self,
        num_features: int,
        *,
        size: int = 5,
        alpha: float = 5e-4,
        beta: float = 0.75,
        k: float = 2.0,
        affine: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=0.0, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.size = checked_size("size", size)
        self.alpha, self.beta, self.k = alpha, beta, k

    @property
    def traits(self) -> Traits:
        """Each position by itself; the constant knows the scale."""
        return PER_POSITION

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Divide by the response of the neighbours."""
        response = window_sum(x.square(), self.size, (1,)) * (self.alpha / self.size)
        return x * (self.k + response).pow(-self.beta)

    def extra_repr(self) -> str:
        """The number of channels, the constants and the layout."""
        layout = "" if self.channel_dim == 1 else ", channel_dim=-1"
        return f"{self.num_features}, size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}{layout}"


class SpatialFormulaNorm(FormulaNorm):
    """A formula norm that sees the dimensions of space apart: abstract.

    The formula gets ``(N, C, *S)`` with a mask of shape ``(N, 1, *S)``.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise; see the class."""
        self.check_input(x, mask)
        z = x.movedim(self.channel_dim, 1)
        mask = None if mask is None else mask.unsqueeze(1)
        z = z if mask is None else torch.where(mask, z, 0)
        with full_precision(x):
            y = self.formula(wide(z), mask)
            shape = (-1,) + (1,) * (x.ndim - 2)
            y = y if self.weight is None else y * self.weight.view(shape)
            y = y if self.bias is None else y + self.bias.view(shape)
        y = (y if mask is None else torch.where(mask, y, 0)).to(x.dtype)
        return y.movedim(1, self.channel_dim)


def window_mean(x: Tensor, mask: Tensor | None, size: int) -> Tensor:
    """Mean of the real elements of ``(N, ·, *S)`` in a window around each position."""
    dims = tuple(range(2, x.ndim))
    real = x.new_ones((1, 1, *x.shape[2:])) if mask is None else mask.to(x.dtype)
    return window_sum(x, size, dims) / window_sum(real, size, dims).clamp(min=1)


@register("divisive_norm", aliases=("divisive_normalization",))
class DivisiveNorm(SpatialFormulaNorm):
    r"""Subtract the mean of a neighbourhood, then divide by the energy of a neighbourhood.

    .. math:: y = \gamma_c \frac{v}{\sqrt{\sigma^2 + \operatorname{mean}_{B(s)} v^2}} + \beta_c, \qquad
              v = x - \operatorname{mean}_{A(s)} x

    over all channels in windows :math:`A` and :math:`B` of positions, cut off at the borders. The constant
    :math:`\sigma`, which the paper adds to layer norm and batch norm as well, keeps quiet regions quiet. Windows over
    the whole map make it ``layer_norm_joint``.

    Args:
        num_features: number of channels ``C``.
        window: width of the summation window :math:`A` in each dimension of space.
        suppression: width of the suppression window :math:`B`.
        sigma: :math:`\sigma`.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``).
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when a window is no positive whole number.

    Example:
        >>> DivisiveNorm(8, window=3, suppression=5)(torch.randn(4, 8, 9, 9)).shape
        torch.Size([4, 8, 9, 9])

    Deviations:
        At the borders the authors' code counts zeros outside the map, this only what is there. The widths of the
        windows, which the paper tunes, are choices made here. The paper's L1 penalty on :math:`v` belongs to the loss.

    Reference:
        Ren et al. 2016, Normalizing the Normalizers: Comparing and Extending Network Normalization Schemes,
        arXiv 1611.04520.
    """

    paper = Paper("Ren et al.", 2016, "Normalizing the Normalizers", "1611.04520")

    def __init__(
        self,
        num_features: int,
        *,
        window: int = 3,
        suppression: int = 5,
        sigma: float = 1.0,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=0.0, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.window, self.suppression = checked_size("window", window), checked_size("suppression", suppression)
        self.sigma = sigma

    @property
    def traits(self) -> Traits:
        """Neighbours on both sides, if there are any; the constant knows the scale."""
        alone = self.window == self.suppression == 1
        return Traits(batch_dependent=False, causal=alone, causal_in_training=alone, shift_invariant=True)

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Subtract, then divide."""
        v = x - window_mean(x.mean(1, keepdim=True), mask, self.window)
        v = v if mask is None else torch.where(mask, v, 0)
        energy = window_mean(v.square().mean(1, keepdim=True), mask, self.suppression)
        return v * torch.rsqrt(energy + self.sigma**2)

    def extra_repr(self) -> str:
        """The number of channels, the windows, the constant and the layout."""
        layout = "" if self.channel_dim == 1 else ", channel_dim=-1"
        return f"{self.num_features}, window={self.window}, suppression={self.suppression}, sigma={self.sigma}{layout}"


@register("local_context_norm", aliases=("lcn", "local_context_normalization"))
class LocalContextNorm(SpatialFormulaNorm):
    r"""Standardise each position by the moments of a few channels in a window around it.

    .. math:: y = \gamma_c \frac{x - \mu_{b,g,s}}{\sqrt{\sigma_{b,g,s}^2 + \varepsilon}} + \beta_c

    over the channels of group :math:`g` in the window around position :math:`s`, cut off at the borders. A window of
    at least ``2 * size - 1`` covers the map from everywhere: ``group_norm``.

    Args:
        num_features: number of channels ``C``.
        window: width of the window in each dimension of space; 227 in the paper's experiments on large images.
        group_size: channels a group, or ``"auto"``: two, the paper's choice, where they divide ``C``, otherwise one.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``).
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the window is no positive whole number, or the groups do not divide the channels.

    Example:
        >>> LocalContextNorm(8, window=5)(torch.randn(4, 8, 9, 9)).shape
        torch.Size([4, 8, 9, 9])

    Deviations:
        At the borders the authors' code takes the nearest window that lies within the map; here the window is cut
        off, so that padding behind a mask is not taken for a map. Their code also writes into its input, passes no
        gradient through the moments, and loses digits to squares of integral images. Here the squares are taken
        around the mean of the group.

    Reference:
        Ortiz et al. 2019, Local Context Normalization: Revisiting Local Normalization, arXiv 1912.05845.
    """

    paper = Paper("Ortiz et al.", 2019, "Local Context Normalization: Revisiting Local Normalization", "1912.05845")

    def __init__(
        self,
        num_features: int,
        *,
        window: int = 227,
        group_size: int | Literal["auto"] = "auto",
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.window = checked_size("window", window)
        size = 2 - num_features % 2 if group_size == "auto" else group_size
        self.groups = choose_groups(num_features, "auto", size)

    @property
    def traits(self) -> Traits:
        """Neighbours on both sides, if there are any."""
        alone = self.window == 1
        return Traits(
            batch_dependent=False, causal=alone, causal_in_training=alone, scale_invariant=True, shift_invariant=True
        )

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Moments of the windows, around the mean of the group."""
        grouped = lambda z: z.unflatten(1, (self.groups, -1)).mean(2)  # noqa: E731
        spread = lambda z: z.repeat_interleave(self.num_features // self.groups, 1)  # noqa: E731
        x = x - spread(mean(grouped(x), mask, tuple(range(2, x.ndim)))) if x.ndim > 2 else x
        x = x if mask is None else torch.where(mask, x, 0)
        mu = window_mean(grouped(x), mask, self.window)
        var = (window_mean(grouped(x.square()), mask, self.window) - mu.square()).clamp(min=0)
        return (x - spread(mu)) * spread(torch.rsqrt(var + self.eps))

    def extra_repr(self) -> str:
        """With the window and the groups."""
        return f"{super().extra_repr()}, window={self.window}, groups={self.groups}"
