"""Norms that divide by a root mean square: no centring. Root mean square norm itself is with the other core norms."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from normzoo import ops
from normzoo.errors import NormzooError, OptionError
from normzoo.layers.base import FormulaNorm, MomentNorm, Paper, Traits, choose_groups
from normzoo.layers.parts import (
    PER_POSITION,
    PER_POSITION_SCALED,
    WholeFormulaNorm,
    column,
    mean,
    safe_sqrt,
    wide,
)
from normzoo.ops.cells import thresholded
from normzoo.registry import register


@register("partial_rms_norm", aliases=("p_rms_norm", "prms"))
class PartialRMSNorm(FormulaNorm):
    r"""Divide each position by the root mean square of its first channels.

    .. math:: y = \gamma_c \frac{x}{\sqrt{\tfrac1k\sum_{c \le k} x_c^2 + \varepsilon}}, \qquad
              k = \lceil pC \rceil

    Args:
        num_features: number of channels ``C``.
        p: the part of the channels that is measured, above 0 and up to 1; 6.25 % in the paper. With 1 it is
            ``rms_norm``.
        eps: :math:`\varepsilon`, added to the mean square.
        affine: learn :math:`\gamma` (``weight``).
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when ``p`` is not in (0, 1].

    Example:
        >>> PartialRMSNorm(32, p=0.25)(torch.randn(4, 32, 5)).shape
        torch.Size([4, 32, 5])

    Deviations:
        The authors' code takes :math:`\lfloor pC \rfloor` channels and adds :math:`\varepsilon` to the root.

    Reference:
        Zhang and Sennrich 2019, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """

    has_bias = False
    paper = Paper("Zhang & Sennrich", 2019, "Root Mean Square Layer Normalization", "1910.07467")

    def __init__(
        self,
        num_features: int,
        *,
        p: float = 0.0625,
        eps: float = 1e-6,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        if not 0 < p <= 1:
            raise OptionError(f"p={p!r}; expected a part of the channels, above 0 and up to 1")
        self.p = p
        self.measured = math.ceil(round(p * num_features, 9))  # 0.1 * 30 is a little more than 3

    @property
    def traits(self) -> Traits:
        """Each position by itself."""
        return PER_POSITION_SCALED

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Measure the first channels, divide all."""
        return x * torch.rsqrt(x[:, : self.measured].square().mean(1, keepdim=True) + self.eps)

    def extra_repr(self) -> str:
        """With p."""
        return f"{super().extra_repr()}, p={self.p}"


@register("zero_centred_rms_norm", aliases=("zero_centered_rms_norm", "gemma_rms_norm"))
class ZeroCentredRMSNorm(MomentNorm):
    r"""Root mean square norm whose gain is stored as its difference from one, as in Gemma.

    .. math:: y = (1 + w_c) \frac{x}{\sqrt{\tfrac1C\sum_c x_c^2 + \varepsilon}}

    :math:`w` (``weight``) starts at zero, so that weight decay pulls the gain towards one. Gain and division are
    float32 for half-precision input, and the result is rounded once.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> ZeroCentredRMSNorm(8, channel_dim=-1)(torch.randn(4, 10, 8)).shape
        torch.Size([4, 10, 8])

    Reference:
        Gemma Team 2024, Gemma: Open Models Based on Gemini Research and Technology, arXiv 2403.08295 (the form of the
        gain is that of its published code).
    """

    moments = "b c s -> b s"
    centred = False
    defaults = {"eps": 1e-6}
    roles = {"weight": "gain_minus_one"}
    paper = Paper("Gemma Team", 2024, "Gemma: Open Models Based on Gemini Research and Technology", "2403.08295")

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        if self.weight is not None:
            nn.init.zeros_(self.weight)

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Root mean square norm with a gain of one plus the weight."""
        return ops.standardize(
            x, self.pattern, self.sizes, channels_last=channels_last, eps=self.eps, centred=False, mask=mask,
            weight=None if self.weight is None else 1 + wide(self.weight),
        )[0]  # fmt: skip


@register("simple_rms_norm", aliases=("srms_norm", "srms"))
class SimpleRMSNorm(MomentNorm):
    r"""Root mean square norm without a gain.

    .. math:: y = \frac{x}{\lVert x \rVert_2 / \sqrt{C}}

    over the channels of each position, with :math:`\varepsilon` added to the mean square. ``affine=True`` makes it
    ``rms_norm``.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> SimpleRMSNorm(8, channel_dim=-1)(torch.randn(4, 10, 8)).square().mean().round(decimals=3)
        tensor(1.)

    Reference:
        Qin et al. 2023, TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer,
        arXiv 2307.14995.
    """

    moments = "b c s -> b s"
    centred = False
    defaults = {"eps": 1e-6, "affine": False}
    paper = Paper("Qin et al.", 2023, "TransNormerLLM: A Faster and Better Large Language Model", "2307.14995")


@register("scale_norm")
class ScaleNorm(FormulaNorm):
    r"""Scale each position to one learned length.

    .. math:: y = g \frac{x}{\max(\lVert x \rVert_2, \varepsilon)}

    over channels, with one scalar :math:`g` (``weight``) that starts at :math:`\sqrt{C}`.

    Args:
        num_features: number of channels ``C``.
        eps: the smallest length to divide by.
        affine: learn :math:`g`; otherwise it stays at :math:`\sqrt{C}`.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameter lives.
        dtype: its dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> ScaleNorm(16)(torch.full((1, 16), 9.0)).norm()
        tensor(4., grad_fn=<LinalgVectorNormBackward0>)

    Deviations:
        None from the authors' code; the paper's formula has no :math:`\varepsilon`.

    Reference:
        Nguyen and Salazar 2019, Transformers without Tears: Improving the Normalization of Self-Attention,
        arXiv 1910.05895.
    """

    has_bias = False
    roles = {"weight": "scale"}
    paper = Paper("Nguyen & Salazar", 2019, "Transformers without Tears", "1910.05895")

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
        super().__init__(num_features, eps=eps, affine=False, channel_dim=channel_dim, device=device, dtype=dtype)
        self.length = math.sqrt(num_features)
        if affine:
            self.weight = nn.Parameter(torch.full((1,), self.length, device=device, dtype=dtype))

    @property
    def traits(self) -> Traits:
        """Each position by itself."""
        return PER_POSITION_SCALED

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Unit length; or the fixed length, where none is learned."""
        y = unit(x, self.eps)
        return y * self.length if self.weight is None else y


def unit(x: Tensor, eps: float, dim: int = 1) -> Tensor:
    r"""Divide by :math:`\max(\lVert x \rVert_2, \varepsilon)` along ``dim``, with finite gradients at zero.

    >>> unit(torch.tensor([[3.0, 4.0]]), 1e-12)
    tensor([[0.6000, 0.8000]])
    """
    least = max(eps * eps, torch.finfo(x.dtype).tiny)
    return x * torch.rsqrt(x.square().sum(dim, keepdim=True).clamp(min=least))


@register("pixel_norm", aliases=("pixelwise_norm",))
class PixelNorm(MomentNorm):
    r"""Scale the feature vector of each pixel to a mean square of one; nothing is learned.

    .. math:: y = \frac{x}{\sqrt{\tfrac1C\sum_c x_c^2 + \varepsilon}}, \qquad \varepsilon = 10^{-8}

    ``affine=True`` makes it ``rms_norm`` with this :math:`\varepsilon`.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> PixelNorm(8)(torch.randn(4, 8, 5, 5)).square().mean().round(decimals=3)
        tensor(1.)

    Reference:
        Karras et al. 2017, Progressive Growing of GANs for Improved Quality, Stability, and Variation,
        arXiv 1710.10196, section 4.2.
    """

    moments = "b c s -> b s"
    centred = False
    defaults = {"eps": 1e-8, "affine": False}
    paper = Paper("Karras et al.", 2017, "Progressive Growing of GANs", "1710.10196")


@register("filter_response_norm", aliases=("frn",))
class FilterResponseNorm(WholeFormulaNorm):
    r"""Divide each channel of each sample by its root mean square over positions; then a learned threshold.

    .. math:: y = \max\Big(\gamma_c \frac{x}{\sqrt{\nu^2_{b,c} + \varepsilon}} + \beta_c,\; \tau_c\Big), \qquad
              \nu^2_{b,c} = \tfrac1S\sum_s x_s^2

    The threshold, the paper's TLU, takes the place of the activation: the trait ``includes_activation`` says so, and
    models leave theirs out. On a single position the first part is nearly the sign of ``x``; the paper's remedy is
    ``learned_eps``.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to the mean square; 1e-6 in the paper.
        affine: learn :math:`\gamma` (``weight``), :math:`\beta` (``bias``) and :math:`\tau` (``tau``, from zero).
        tlu: apply the threshold; without it only the normalization is left. Fixed at zero (a ReLU) when not ``affine``.
        learned_eps: add :math:`|\varepsilon_l|`, one learned number (``eps_l``, from 1e-4), to ``eps``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> FilterResponseNorm(8)(torch.randn(4, 8, 5, 5)).min() >= 0
        tensor(True)

    Reference:
        Singh and Krishnan 2019, Filter Response Normalization Layer: Eliminating Batch Dependence in the Training of
        Deep Neural Networks, arXiv 1911.09737.
    """

    roles = {"weight": "gain", "bias": "shift", "tau": "threshold", "eps_l": "eps"}
    paper = Paper("Singh & Krishnan", 2019, "Filter Response Normalization Layer", "1911.09737")

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        tlu: bool = True,
        learned_eps: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.tlu = tlu
        learned = tlu and affine
        self.tau = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if learned else None
        self.eps_l = nn.Parameter(torch.full((1,), 1e-4, device=device, dtype=dtype)) if learned_eps else None

    @property
    def traits(self) -> Traits:
        """Positions of a sample share a statistic; a learned eps may grow until the scale counts."""
        return Traits(
            batch_dependent=False,
            causal=False,
            causal_in_training=False,
            scale_invariant=self.eps_l is None,
            includes_activation=self.tlu,
        )

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """In one compiled operation where there is one for the input; it takes no learned eps."""
        y = None
        if self.eps_l is None:
            floor = self.tau if self.tau is not None else x.new_zeros(self.num_features) if self.tlu else None
            y = thresholded(x, mask, channels_last, floor, eps=self.eps, weight=self.weight, bias=self.bias)
        return super().normalize(x, mask, channels_last) if y is None else y

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Normalise, scale, shift, threshold."""
        eps = self.eps if self.eps_l is None else self.eps + wide(self.eps_l).abs()
        y = x * torch.rsqrt(mean(x.square(), mask, (2,)) + eps)
        y = ops.affine(y, self.weight, self.bias, channels_last=False)
        if not self.tlu:
            return y
        floor = y.new_zeros(()) if self.tau is None else column(self.tau)
        return torch.where(y < floor, floor, y)  # what is equal to the threshold passes, as in the compiled operation

    def extra_repr(self) -> str:
        """With the choice of activation and eps."""
        learned = "" if self.eps_l is None else ", learned_eps=True"
        return f"{super().extra_repr()}, tlu={self.tlu}{learned}"


@register("grn", aliases=("global_response_norm",))
class GRN(WholeFormulaNorm):
    r"""Let channels compete: scale each by its share in the response of the sample, beside a residual path.

    .. math:: y = \gamma_c\, x\, n_{b,c} + \beta_c + x, \qquad
              n_{b,c} = \frac{\lVert x_{b,c} \rVert_2}{\tfrac1C\sum_{c'} \lVert x_{b,c'} \rVert_2 + \varepsilon}

    with norms over positions. :math:`\gamma` and :math:`\beta` start at zero: the layer starts as the identity.
    Without ``affine``, :math:`\gamma = 1` and :math:`\beta = 0`.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> x = torch.randn(4, 8, 5, 5)
        >>> torch.equal(GRN(8)(x), x)
        True

    Deviations:
        None; the authors' code calls the parameters ``gamma`` and ``beta``.

    Reference:
        Woo et al. 2023, ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders, arXiv 2301.00808.
    """

    roles = {"weight": "response", "bias": "shift"}
    paper = Paper("Woo et al.", 2023, "ConvNeXt V2", "2301.00808")

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-6,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        if self.weight is not None:
            nn.init.zeros_(self.weight)

    @property
    def traits(self) -> Traits:
        """Positions of a sample share a statistic."""
        return Traits(batch_dependent=False, causal=False, causal_in_training=False)

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The response of each channel over the mean response; masked positions are zero and add nothing."""
        response = safe_sqrt(x.square().sum(2, keepdim=True))
        share = response / (response.mean(1, keepdim=True) + self.eps)
        return ops.affine(x * share, self.weight, self.bias, channels_last=False) + x


@register("bias_norm", aliases=("basic_norm",))
class BiasNorm(WholeFormulaNorm):
    r"""Divide each position by its root mean square distance from a learned point, with one learned scale.

    .. math:: y = \frac{x}{\sqrt{\tfrac1C\sum_c (x_c - b_c)^2 + \varepsilon}}\, e^{s}

    The input itself is not centred: :math:`b` (``bias``) serves the measurement alone, and lets a channel that is
    always large drop out of it. Without ``affine``, :math:`b = 0` and :math:`s = 0`.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to the mean square.
        affine: learn :math:`b` (``bias``, from zero) and :math:`s` (``log_scale``).
        log_scale: where :math:`s` starts; 1 in the authors' code.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> BiasNorm(8, channel_dim=-1)(torch.randn(4, 10, 8)).shape
        torch.Size([4, 10, 8])

    Deviations:
        The paper has no :math:`\varepsilon`. The authors' code starts :math:`b` at random numbers of size 1e-4, where
        this starts at zero, and keeps :math:`s` within ±1.5 by a change of its gradient.

    Reference:
        Yao et al. 2023, Zipformer: A faster and better encoder for automatic speech recognition, arXiv 2310.11230.
    """

    roles = {"bias": "point", "log_scale": "scale"}
    paper = Paper("Yao et al.", 2023, "Zipformer: A faster and better encoder", "2310.11230")

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-8,
        affine: bool = True,
        log_scale: float = 1.0,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=False, channel_dim=channel_dim, device=device, dtype=dtype)
        self.log_scale = None
        if affine:
            self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
            self.log_scale = nn.Parameter(torch.full((1,), float(log_scale), device=device, dtype=dtype))

    @property
    def traits(self) -> Traits:
        """The learned point does not grow with the input."""
        return PER_POSITION if self.bias is not None else PER_POSITION_SCALED

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Measure from the point, divide the input."""
        measured = x if self.bias is None else x - column(self.bias)
        y = x * torch.rsqrt(measured.square().mean(1, keepdim=True) + self.eps)
        return y if self.log_scale is None else y * wide(self.log_scale).exp()


@register("seed_norm", aliases=("self_rescaled_dynamic_norm",))
class SeeDNorm(WholeFormulaNorm):
    r"""Root mean square norm whose gain depends on the input, so that its length is not lost.

    .. math:: y = \big(\tanh(x \cdot \beta)\, \alpha + \gamma\big) \odot
              \frac{x}{\sqrt{\tfrac1C\sum_c x_c^2 + \varepsilon}}

    at each position, with vectors :math:`\alpha, \beta, \gamma` of one number for each channel; :math:`\beta` starts
    at zero, so that it starts as ``rms_norm``. With several heads the product :math:`x \cdot \beta` is taken within
    each head, and its tanh scales the channels of that head.

    Args:
        num_features: number of channels ``C``.
        heads: number of heads, a divisor of ``C``.
        alpha: where :math:`\alpha` starts.
        eps: :math:`\varepsilon`, added to the mean square.
        affine: learn :math:`\gamma` (``weight``), :math:`\alpha` (``alpha``) and :math:`\beta` (``beta``); without
            them it is ``simple_rms_norm``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the heads do not divide the channels.

    Example:
        >>> SeeDNorm(8, heads=2, channel_dim=-1)(torch.randn(4, 10, 8)).shape
        torch.Size([4, 10, 8])

    Deviations:
        Where :math:`\alpha` starts is a choice made here. There is no public code of the authors to compare with, and
        the paper's regularisation of the dynamic part is left to the optimizer.

    Reference:
        Cai et al. 2025, SeeDNorm: Self-Rescaled Dynamic Normalization, arXiv 2510.22777.
    """

    has_bias = False
    roles = {"weight": "gain", "alpha": "alpha", "beta": "beta"}
    paper = Paper("Cai et al.", 2025, "SeeDNorm: Self-Rescaled Dynamic Normalization", "2510.22777")

    def __init__(
        self,
        num_features: int,
        *,
        heads: int = 1,
        alpha: float = 1.0,
        eps: float = 1e-6,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.heads = checked_heads(num_features, heads)
        self.alpha = self.beta = None
        if affine:
            self.alpha = nn.Parameter(torch.full((num_features,), float(alpha), device=device, dtype=dtype))
            self.beta = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    @property
    def traits(self) -> Traits:
        """The gain depends on the length of the input, by design."""
        return PER_POSITION if self.beta is not None else PER_POSITION_SCALED

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """A gain from the input, on the input over its root mean square."""
        y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps)
        if self.weight is None or self.alpha is None or self.beta is None:
            return y
        products = (x * column(self.beta)).unflatten(1, (self.heads, -1)).sum(2)
        dynamic = products.tanh().repeat_interleave(self.num_features // self.heads, 1)
        return y * (dynamic * column(self.alpha) + column(self.weight))

    def extra_repr(self) -> str:
        """With the heads."""
        return super().extra_repr() + (f", heads={self.heads}" if self.heads > 1 else "")


def checked_heads(channels: int, heads: int) -> int:
    """``heads`` if they divide the channels.

    Raises:
        OptionError: when they do not.
    """
    if not isinstance(heads, int) or heads < 1 or channels % heads:
        raise OptionError(f"heads={heads!r} does not divide {channels} channels; expected a divisor of {channels}")
    return heads


@register("multihead_rms_norm", aliases=("multi_head_rms_norm", "per_head_rms_norm"), contrib=True)
class MultiheadRMSNorm(MomentNorm):
    r"""Root mean square norm within each head, with a gain for each channel of each head.

    .. math:: y = \gamma_{h,c} \frac{x}{\sqrt{\tfrac1c\sum_{c} x_{h,c}^2 + \varepsilon}}

    for ``heads`` :math:`h` of :math:`c = C / \text{heads}` channels, heads first, at each position.

    Args:
        num_features: number of channels ``C`` of all heads together.
        heads: number of heads, or ``"auto"``: the largest divisor of ``C`` up to 32 that leaves at least four channels
            a head.
        eps: :math:`\varepsilon`, added to the mean square.
        affine: learn :math:`\gamma` (``weight``).
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the heads do not divide the channels.

    Example:
        >>> MultiheadRMSNorm(32, heads=4, channel_dim=-1)(torch.randn(2, 10, 32)).shape
        torch.Size([2, 10, 32])

    Deviations:
        The paper standardises each head of the queries and keys by layer norm; dividing by the root mean square alone
        is what most later models do, and has no paper of its own.

    Reference:
        Dehghani et al. 2023, Scaling Vision Transformers to 22 Billion Parameters, arXiv 2302.05442.
    """

    moments = "b (heads c) s -> b heads s"
    centred = False
    paper = Paper("Dehghani et al.", 2023, "Scaling Vision Transformers to 22 Billion Parameters", "2302.05442")

    def __init__(
        self,
        num_features: int,
        *,
        heads: int | Literal["auto"] = "auto",
        eps: float = 1e-6,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if heads == "auto" and isinstance(num_features, int) and num_features > 0:
            heads = choose_groups(num_features, "auto", None)
        elif heads != "auto":
            heads = checked_heads(num_features, heads)
        super().__init__(
            num_features, heads=heads, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype
        )


@register("qk_norm", aliases=("query_key_norm",))
class QKNorm(FormulaNorm):
    r"""Scale each head of the queries, or of the keys, to one learned length.

    .. math:: y = g \frac{x}{\max(\lVert x_h \rVert_2, \varepsilon)}, \qquad
              g_0 = \sqrt{\log_2(L^2 - L)}

    with the length of the head :math:`h` that ``x`` is in, of :math:`C / \text{heads}` channels. One such norm on the
    queries and one on the keys make the paper's attention weights
    :math:`\operatorname{softmax}(g^2\, \hat q \hat k^\top)`: the attention itself must not divide by the root of the
    head's width.

    Args:
        num_features: number of channels ``C`` of all heads together.
        heads: number of heads, a divisor of ``C``.
        length: :math:`L`, the length of a long sequence of the training data (the paper takes the 97.5th percentile).
        eps: the smallest length to divide by.
        affine: learn :math:`g` (``weight``); otherwise it stays at :math:`g_0`.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameter lives.
        dtype: its dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the heads do not divide the channels.
        NormzooError: when ``length`` is below 2.

    Example:
        >>> QKNorm(16, heads=4, length=256)(torch.full((1, 16), 9.0)).square().sum().round(decimals=2)
        tensor(63.9800, grad_fn=<RoundBackward1>)

    Deviations:
        The paper has one :math:`g` on the product, here each side has its own root of it; they start alike, and the
        product is as free.

    Reference:
        Henry et al. 2020, Query-Key Normalization for Transformers, arXiv 2010.04245.
    """

    has_bias = False
    roles = {"weight": "scale"}
    paper = Paper("Henry et al.", 2020, "Query-Key Normalization for Transformers", "2010.04245")

    def __init__(
        self,
        num_features: int,
        *,
        heads: int = 1,
        length: int = 1024,
        eps: float = 1e-6,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=False, channel_dim=channel_dim, device=device, dtype=dtype)
        self.heads = checked_heads(num_features, heads)
        if length < 2:
            raise NormzooError(f"length is {length!r}; expected the length of a long training sequence, at least 2")
        self.length = length
        self.scale = math.sqrt(math.log2(length**2 - length))
        if affine:
            self.weight = nn.Parameter(torch.full((1,), self.scale, device=device, dtype=dtype))

    @property
    def traits(self) -> Traits:
        """Each position by itself."""
        return PER_POSITION_SCALED

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Unit length for each head; or the fixed length, where none is learned."""
        y = unit(x.unflatten(1, (self.heads, -1)), self.eps, 2).flatten(1, 2)
        return y * self.scale if self.weight is None else y

    def extra_repr(self) -> str:
        """With the heads and the length."""
        return f"{super().extra_repr()}, heads={self.heads}, length={self.length}"
