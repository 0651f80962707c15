"""EvoNorms: normalization and activation in one expression, found by evolution."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from normzoo.layers.base import FormulaNorm, Paper, Traits, choose_groups
from normzoo.layers.parts import SAMPLE, BatchFormulaNorm, column, mean, moments
from normzoo.registry import register

_PAPER = Paper("Liu et al.", 2020, "Evolving Normalization-Activation Layers", "2004.02967")


class EvoNormB(BatchFormulaNorm):
    """The larger of the batch's standard deviation and something of the sample: abstract."""

    paper = _PAPER
    roles = {"weight": "gain", "bias": "shift", "v": "alpha"}
    unused = ("running_mean",)
    invariant = False
    """Whether scaling the input changes nothing."""

    @property
    def traits(self) -> Traits:
        """Batch statistics, and moments over the positions of each sample in evaluation too."""
        return Traits(
            batch_dependent=True,
            causal=False,
            causal_in_training=False,
            stateful=self.track_running_stats,
            scale_invariant=self.invariant,
            includes_activation=True,
        )

    def spread(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The standard deviation of the batch, which is counted, in training; the running one in evaluation."""
        return (self.statistics(x, mask)[1] + self.eps).sqrt()


@register("evonorm_b0", aliases=("evo_norm_b0",))
class EvoNormB0(EvoNormB):
    r"""Divide by the batch's standard deviation, or by a line in ``x`` above the sample's, whichever is larger.

    .. math:: y = \gamma_c \frac{x}{\max\big(\sqrt{\sigma_c^2 + \varepsilon},\;
              v_c x + \sqrt{\sigma_{b,c}^2 + \varepsilon}\big)} + \beta_c

    with :math:`\sigma_c^2` over samples and positions (in evaluation the running average) and
    :math:`\sigma_{b,c}^2` over positions. The norm includes the activation.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to each second moment.
        affine: learn :math:`\gamma` (``weight``), :math:`\beta` (``bias``) and :math:`v` (``v``, fixed at 1 without).
        momentum: weight of the new value in the running average of the variance; ``None`` is the cumulative average.
        track_running_stats: keep a running variance and use it in evaluation.
        sync: take the batch's variance over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: in training, for one sample with one position.

    Example:
        >>> EvoNormB0(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Reference:
        Liu et al. 2020, Evolving Normalization-Activation Layers, arXiv 2004.02967, table 2.
    """

    invariant = True
    v: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        sync: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, track_running_stats=track_running_stats,
            sync=sync, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.v = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if affine else None

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The expression B0."""
        own = (moments(x, mask, SAMPLE)[1] + self.eps).sqrt()
        return x / torch.maximum(self.spread(x, mask), (x if self.v is None else column(self.v) * x) + own)


@register("evonorm_b1", aliases=("evo_norm_b1",))
class EvoNormB1(EvoNormB):
    r"""Divide by the batch's standard deviation, or by ``x + 1`` times the sample's root mean square.

    .. math:: y = \gamma_c \frac{x}{\max\big(\sqrt{\sigma_c^2 + \varepsilon},\;
              (x + 1) \sqrt{\nu_{b,c}^2 + \varepsilon}\big)} + \beta_c

    with :math:`\sigma_c^2` over samples and positions (in evaluation the running average) and the second moment
    :math:`\nu_{b,c}^2` over positions. The norm includes the activation.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to each second moment.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``).
        momentum: weight of the new value in the running average of the variance; ``None`` is the cumulative average.
        track_running_stats: keep a running variance and use it in evaluation.
        sync: take the batch's variance over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: in training, for one sample with one position.

    Example:
        >>> EvoNormB1(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Reference:
        Liu et al. 2020, Evolving Normalization-Activation Layers, arXiv 2004.02967, appendix.
    """

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The expression B1."""
        own = (mean(x.square(), mask, SAMPLE) + self.eps).sqrt()
        return x / torch.maximum(self.spread(x, mask), (x + 1) * own)


@register("evonorm_b2", aliases=("evo_norm_b2",))
class EvoNormB2(EvoNormB):
    r"""Divide by the batch's standard deviation, or by how far the sample's root mean square is above ``x``.

    .. math:: y = \gamma_c \frac{x}{\max\big(\sqrt{\sigma_c^2 + \varepsilon},\;
              \sqrt{\nu_{b,c}^2 + \varepsilon} - x\big)} + \beta_c

    with :math:`\sigma_c^2` over samples and positions (in evaluation the running average) and the second moment
    :math:`\nu_{b,c}^2` over positions. The norm includes the activation.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to each second moment.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``).
        momentum: weight of the new value in the running average of the variance; ``None`` is the cumulative average.
        track_running_stats: keep a running variance and use it in evaluation.
        sync: take the batch's variance over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: in training, for one sample with one position.

    Example:
        >>> EvoNormB2(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Reference:
        Liu et al. 2020, Evolving Normalization-Activation Layers, arXiv 2004.02967, appendix.
    """

    invariant = True

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The expression B2."""
        own = (mean(x.square(), mask, SAMPLE) + self.eps).sqrt()
        return x / torch.maximum(self.spread(x, mask), own - x)


class EvoNormS(FormulaNorm):
    """An activation of ``x`` over a moment of its group: abstract."""

    paper = _PAPER
    roles = {"weight": "gain", "bias": "shift", "v": "alpha"}

    def __init__(
        self,
        num_features: int,
        *,
        groups: int | Literal["auto"] = "auto",
        group_size: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.groups = choose_groups(num_features, groups, group_size)

    @property
    def traits(self) -> Traits:
        """Positions of a sample share a statistic; the activation knows the scale."""
        return Traits(batch_dependent=False, causal=False, causal_in_training=False, includes_activation=True)

    def grouped(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """``x`` as ``(b, g, c, s)``, and its mask."""
        return x.unflatten(1, (self.groups, -1)), None if mask is None else mask.unsqueeze(1)

    def extra_repr(self) -> str:
        """With the groups."""
        return f"{super().extra_repr()}, groups={self.groups}"


@register("evonorm_s0", aliases=("evo_norm_s0",))
class EvoNormS0(EvoNormS):
    r"""A swish of learned steepness over the standard deviation of its group.

    .. math:: y = \gamma_c \frac{x \operatorname{sigmoid}(v_c x)}{\sqrt{\sigma_{b,g}^2 + \varepsilon}} + \beta_c

    with :math:`\sigma_{b,g}^2` over the channels of the group and positions. The norm includes the activation.

    Args:
        num_features: number of channels ``C``.
        groups: number of groups, or ``"auto"``: the largest divisor of ``C`` up to 32 that leaves at least four
            channels a group. The paper uses 32.
        group_size: channels a group, in place of ``groups``.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` (``weight``), :math:`\beta` (``bias``) and :math:`v` (``v``, fixed at 1 without).
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the groups do not divide the channels.

    Example:
        >>> EvoNormS0(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Reference:
        Liu et al. 2020, Evolving Normalization-Activation Layers, arXiv 2004.02967, table 2.
    """

    v: nn.Parameter | None

    def __init__(
        self,
        num_features: int,
        *,
        groups: int | Literal["auto"] = "auto",
        group_size: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, groups=groups, group_size=group_size, eps=eps, affine=affine,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.v = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if affine else None

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The expression S0."""
        swish = x * (x if self.v is None else column(self.v) * x).sigmoid()
        z, mask = self.grouped(x, mask)
        inverse = torch.rsqrt(moments(z, mask, (2, 3))[1] + self.eps)
        return (swish.unflatten(1, (self.groups, -1)) * inverse).flatten(1, 2)


@register("evonorm_s1", aliases=("evo_norm_s1",))
class EvoNormS1(EvoNormS):
    r"""A swish over the standard deviation of its group.

    .. math:: y = \gamma_c \frac{x \operatorname{sigmoid}(x)}{\sqrt{\sigma_{b,g}^2 + \varepsilon}} + \beta_c

    with :math:`\sigma_{b,g}^2` over the channels of the group and positions. The norm includes the activation.

    Args:
        num_features: number of channels ``C``.
        groups: number of groups, or ``"auto"``: the largest divisor of ``C`` up to 32 that leaves at least four
            channels a group. The paper uses 32.
        group_size: channels a group, in place of ``groups``.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``).
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the groups do not divide the channels.

    Example:
        >>> EvoNormS1(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Reference:
        Liu et al. 2020, Evolving Normalization-Activation Layers, arXiv 2004.02967, appendix.
    """

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The expression S1."""
        z, mask = self.grouped(x, mask)
        return (z * z.sigmoid() * torch.rsqrt(moments(z, mask, (2, 3))[1] + self.eps)).flatten(1, 2)


@register("evonorm_s2", aliases=("evo_norm_s2",))
class EvoNormS2(EvoNormS):
    r"""A swish over the root mean square of its group.

    .. math:: y = \gamma_c \frac{x \operatorname{sigmoid}(x)}{\sqrt{\nu_{b,g}^2 + \varepsilon}} + \beta_c

    with :math:`\nu_{b,g}^2` over the channels of the group and positions. The norm includes the activation.

    Args:
        num_features: number of channels ``C``.
        groups: number of groups, or ``"auto"``: the largest divisor of ``C`` up to 32 that leaves at least four
            channels a group. The paper uses 32.
        group_size: channels a group, in place of ``groups``.
        eps: :math:`\varepsilon`, added to the second moment.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``).
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the groups do not divide the channels.

    Example:
        >>> EvoNormS2(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Reference:
        Liu et al. 2020, Evolving Normalization-Activation Layers, arXiv 2004.02967, appendix.
    """

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The expression S2."""
        z, mask = self.grouped(x, mask)
        return (z * z.sigmoid() * torch.rsqrt(mean(z.square(), mask, (2, 3)) + self.eps)).flatten(1, 2)
