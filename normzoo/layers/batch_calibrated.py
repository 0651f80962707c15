"""Batch norm with something beside it: a residual path, a gate from each sample, a channel norm after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normzoo import ops
from normzoo.layers.base import MomentNorm, Paper, Traits, choose_groups
from normzoo.layers.parts import BATCH, SAMPLE, BatchCellNorm, BatchFormulaNorm, column, mean, moments, total
from normzoo.ops import Moments, Pattern
from normzoo.registry import register


def vector(size: int, value: float, device: torch.device | str | None, dtype: torch.dtype | None) -> nn.Parameter:
    """A parameter with ``size`` equal values."""
    return nn.Parameter(torch.full((size,), value, device=device, dtype=dtype))


@register("rep_batch_norm", aliases=("rep_bn", "repbn"))
class RepBatchNorm(MomentNorm):
    r"""Batch norm with a scaled copy of its input beside it, which folds into one affine map after training.

    .. math:: y = \operatorname{BN}(x) + \eta\, x

    :math:`\eta` is one number for the layer, learned, one at the start. In evaluation this is batch norm with
    :math:`\gamma + \eta\sqrt{\sigma^2 + \varepsilon}` and :math:`\beta + \eta\mu` in place of :math:`\gamma` and
    :math:`\beta` (lemma 4.1 of the paper).

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` and :math:`\beta`; :math:`\eta` is learned in any case.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        sync: take the statistics over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: in training, when a channel has a single value.

    Example:
        >>> RepBatchNorm(8, channel_dim=-1)(torch.randn(4, 10, 8)).shape
        torch.Size([4, 10, 8])

    Deviations:
        The paper's progressive replacement of layer norm by this norm during training is a matter of the model.

    Reference:
        Guo, Chen, Tang and Wang 2024, SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
        Re-parameterized Batch Normalization, arXiv 2405.11582.
    """

    moments = "b c s -> c"
    paper = Paper(
        "Guo et al.", 2024,
        "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch "
        "Normalization", "2405.11582",
    )  # fmt: skip

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
            num_features, eps=eps, affine=affine, momentum=momentum, track_running_stats=track_running_stats, sync=sync,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.eta = vector(1, 1.0, device, dtype)

    @property
    def traits(self) -> Traits:
        """Those of batch norm without its invariances, which the copy of the input takes away."""
        return Traits(
            batch_dependent=True, causal=self.track_running_stats, causal_in_training=False,
            stateful=self.track_running_stats,
        )  # fmt: skip

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Batch norm, and the scaled input."""
        wide = ops.wide(x)
        if mask is not None:
            wide = torch.where(mask.unsqueeze(-1 if channels_last else 1), wide, 0)
        return (super().normalize(wide, mask, channels_last) + self.eta * wide).to(x.dtype)


@register("representative_batch_norm", aliases=("rbn", "representative_bn"))
class RepresentativeBatchNorm(BatchFormulaNorm):
    r"""Batch norm between two calibrations by each sample's own mean: of the centre before, of the scale after.

    .. math:: y = \gamma\, \hat x\, \operatorname{sigmoid}(w_v \bar{\hat x} + w_b) + \beta, \qquad
              \hat x = \frac{z - \mu(z)}{\sqrt{\sigma^2(z) + \varepsilon}}, \quad z = x + w_m \bar x

    with :math:`\bar x` the mean over the positions of a sample, and :math:`\mu, \sigma^2` over samples and positions
    (running averages in evaluation). :math:`w_m, w_v, w_b` are learned for each channel, from 0, 0 and 1: at the start
    this is batch norm times 0.73.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` and :math:`\beta`; the calibrations are learned in any case.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: in training, when a channel has a single value.

    Example:
        >>> RepresentativeBatchNorm(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Deviations:
        The authors' code writes the centred input over the layer's input; here the input stays as it is.

    Reference:
        Gao, Han, Li, Cheng and Peng 2021, Representative Batch Normalization with Feature Calibration, CVPR.
    """

    paper = Paper("Gao et al.", 2021, "Representative Batch Normalization with Feature Calibration", venue="CVPR")

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, track_running_stats=track_running_stats,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.center_weight = vector(num_features, 0.0, device, dtype)
        self.scale_weight = vector(num_features, 0.0, device, dtype)
        self.scale_bias = vector(num_features, 1.0, device, dtype)

    @property
    def traits(self) -> Traits:
        """Those of batch norm; the means over a sample's positions end causality."""
        return Traits(
            batch_dependent=True, causal=False, causal_in_training=False, stateful=self.track_running_stats,
            scale_invariant=True, shift_invariant=True,
        )  # fmt: skip

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Calibrate the centre, standardise, calibrate the scale."""
        x = super().formula(x + column(self.center_weight) * mean(x, mask, SAMPLE), mask)
        return x * torch.sigmoid(column(self.scale_weight) * mean(x, mask, SAMPLE) + column(self.scale_bias))


@register("instance_enhancement_batch_norm", aliases=("iebn",))
class InstanceEnhancementBatchNorm(BatchCellNorm):
    r"""Batch norm whose gain is gated, for each channel of each sample, by the mean of the sample's input.

    .. math:: y = \gamma\, \operatorname{sigmoid}(\hat\gamma\, \bar x + \hat\beta)\,
              \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta

    with :math:`\bar x` the mean over the positions of a sample, and :math:`\mu, \sigma^2` over samples and positions
    (running averages in evaluation). :math:`\hat\gamma` and :math:`\hat\beta` are learned for each channel, from 0
    and -1.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` and :math:`\beta`; the gate is learned in any case.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: in training, when a channel has a single value.

    Example:
        >>> InstanceEnhancementBatchNorm(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Reference:
        Liang, Huang, Liang and Yang 2019, Instance Enhancement Batch Normalization: an Adaptive Regulator of Batch
        Noise, arXiv 1908.04008.
    """

    paper = Paper(
        "Liang et al.", 2019, "Instance Enhancement Batch Normalization: an Adaptive Regulator of Batch Noise",
        "1908.04008",
    )  # fmt: skip

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, track_running_stats=track_running_stats,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.gate_weight = vector(num_features, 0.0, device, dtype)
        self.gate_bias = vector(num_features, -1.0, device, dtype)

    @property
    def traits(self) -> Traits:
        """Those of batch norm without its invariances, which the gate takes away, and its causality."""
        return Traits(batch_dependent=True, causal=False, causal_in_training=False, stateful=self.track_running_stats)

    def tensors(self) -> tuple[Tensor, ...]:
        """The weights of the gate."""
        return self.gate_weight, self.gate_bias

    def coefficients(self, own: Moments, batch: Moments, *tensors: Tensor) -> tuple[Tensor, Tensor, float]:
        """Standardise and gate."""
        weight, bias = (column(p) for p in tensors)
        return batch.mean, torch.rsqrt(batch.var + self.eps) * torch.sigmoid(weight * own.mean + bias), 0.0


@register("batch_channel_norm", aliases=("bcn", "batch_channel_normalization"))
class BatchChannelNorm(BatchFormulaNorm):
    r"""Batch norm, and after it a group norm with a gain and a shift for each group.

    .. math:: y = \gamma'_g \frac{z - \mu_{b,g}(z)}{\sqrt{\sigma^2_{b,g}(z) + \varepsilon}} + \beta'_g, \qquad
              z = \gamma_c \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \varepsilon}} + \beta_c

    For batches of a few images ``estimate=True`` standardises by the running averages in training too, after counting
    the batch, and lets no gradient through them; their variance is then taken about the running mean. The channel norm
    keeps such a net from the states where a channel is constant.

    Args:
        num_features: number of channels ``C``.
        groups: number of groups of the channel norm, or ``"auto"`` as in ``group_norm``.
        estimate: standardise by running averages in training.
        eps: :math:`\varepsilon`, added to both variances.
        affine: learn :math:`\gamma, \beta` and, for each group, :math:`\gamma', \beta'`.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when the groups do not divide the channels.
        NormzooError: in training without ``estimate``, when a channel has a single value.

    Example:
        >>> BatchChannelNorm(64, groups=8, estimate=True)(torch.randn(1, 64, 5, 5)).shape
        torch.Size([1, 64, 5, 5])

    Deviations:
        The authors set the speed of the running averages by the learning rate; here it is ``momentum``.

    Reference:
        Qiao, Wang, Liu, Shen and Yuille 2019, Rethinking Normalization and Elimination Singularity in Neural Networks,
        arXiv 1911.09738.
    """

    paper = Paper(
        "Qiao et al.", 2019, "Rethinking Normalization and Elimination Singularity in Neural Networks", "1911.09738"
    )
    roles = {"weight": "gain", "bias": "shift", "group_weight": "gain", "group_bias": "shift"}

    def __init__(
        self,
        num_features: int,
        *,
        groups: int | str = "auto",
        estimate: bool = False,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, channel_dim=channel_dim, device=device, dtype=dtype
        )
        self.groups = choose_groups(num_features, groups, None)  # pyright: ignore[reportArgumentType]
        self.estimate = estimate
        self._shown |= {"groups": self.groups} | ({"estimate": True} if estimate else {})
        self.group_weight = vector(self.groups, 1.0, device, dtype) if affine else None
        self.group_bias = vector(self.groups, 0.0, device, dtype) if affine else None

    @property
    def traits(self) -> Traits:
        """Those of batch norm; the channel norm spans positions."""
        return Traits(
            batch_dependent=True, causal=False, causal_in_training=False, stateful=True,
            scale_invariant=not self.estimate, shift_invariant=not self.estimate,
        )  # fmt: skip

    def check_count(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> None:
        """Refuse a single value for each channel; estimates take it."""
        if not self.estimate:
            super().check_count(x, mask, channels_last)

    def statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the batch, or estimates that have counted it."""
        if self.evaluates or not self.estimate:
            return super().statistics(x, mask)
        with torch.no_grad():
            centre, var = moments(x, mask, BATCH)
            var = var + (centre - column(self.population().mean)).square()
            self.track(total(x, mask), {"running_mean": centre.flatten(), "running_var": var.flatten()})
        running = self.population()
        return column(running.mean), column(running.var)

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Batch norm with its affine part, then the channel norm, whose own repeats over each group."""
        repeat = self.num_features // self.groups
        y, _ = ops.standardize(
            super().normalize(ops.wide(x), mask, channels_last), _CHANNEL, {"g": self.groups},
            channels_last=channels_last,
            weight=None if self.group_weight is None else self.group_weight.repeat_interleave(repeat),
            bias=None if self.group_bias is None else self.group_bias.repeat_interleave(repeat),
            eps=self.eps, mask=mask,
        )  # fmt: skip
        return y.to(x.dtype)


_CHANNEL = Pattern.parse("b (g c) s -> b g")
