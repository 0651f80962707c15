"""Batch norms by moving averages, some of which carry averages in the backward pass too.

Where a norm of this file steers its gradient, the gradient is not that of its output: the forward pass takes averages
for constants, and the backward pass makes up for it by averages of what the gradient would have been. The steering
functions are made of differentiable operations, so that second derivatives exist: those of the steered gradient, with
the averages as constants. A backward pass under ``hold_statistics`` leaves the averages alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normzoo import ops
from normzoo.errors import OptionError
from normzoo.layers.base import Paper, Traits
from normzoo.layers.parts import BATCH, SAMPLE, HistoryNorm, column, mean, moments, number, total
from normzoo.ops import Moments, Pattern
from normzoo.registry import register

_JOINT = Pattern.parse("b c s -> b")


def projection(gradient: Tensor, z: Tensor, count: Tensor) -> Tensor:
    """Mean of the gradient times the normalised input over the real elements of each channel, ``(c,)``."""
    return (gradient * z).sum(BATCH) / count.clamp(min=1)


class SteeringNorm(HistoryNorm):
    """A norm whose backward pass keeps averages: abstract."""

    @property
    def steers(self) -> bool:
        """Whether the backward pass of this forward pass counts: each runs once, whatever checkpointing repeats."""
        return self.track_running_stats and self.training and not self.hold


_STEERED = {
    "gradcheck": "the paper's backward pass is not the derivative of its forward pass",
    "gradgradcheck": "the paper's backward pass is not the derivative of its forward pass",
    "backward_twice": "each backward pass renews the averages that the next one uses",
    "two_forwards": "each backward pass renews the averages that the next one uses",
}


class SecondMomentNorm(SteeringNorm):
    """A norm by a moving second moment, without centring: abstract; ``running_var`` is the second moment."""

    min_count = 1
    unused = ("running_mean",)

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float,
        eps: float,
        affine: bool,
        channel_dim: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, channel_dim=channel_dim, device=device, dtype=dtype
        )
        if momentum is None:
            raise OptionError(f"{type(self).__name__} with momentum=None; expected a number from 0 to 1")

    def counted(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The number of real elements of a channel as a tensor of one, for the steering functions."""
        return torch.as_tensor(total(x, mask), dtype=x.dtype, device=x.device).view(1)

    def push(self, name: str, value: Tensor) -> Tensor:
        """A window ``(k, c)`` of the latest values with a new one in front; the buffer itself stays."""
        window = self.recall(name).to(value.dtype)
        return torch.cat([value.view(1, -1), window[:-1]])


# ---- power norm ------------------------------------------------------------------------------------------------------


class _PowerSteering(torch.autograd.Function):
    """The identity, whose backward pass subtracts the running projection of the gradient, and renews it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, average: Tensor, warm: Tensor, count: Tensor, rate: float, counts: bool) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, ctx.average, warm, count, ctx.rate, ctx.counts = inputs
        ctx.save_for_backward(z, warm, count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grads
        z, warm, count = ctx.saved_tensors
        before = ctx.average.clone().to(z.dtype)
        steered = gradient - column(torch.where(warm, 0, before)) * z
        if ctx.counts:
            with torch.no_grad():
                decay = 1 - ctx.rate * projection(z, z, count)
                ctx.average.copy_(before * decay + ctx.rate * projection(gradient, z, count))
        return steered, None, None, None, None, None


@register("power_norm", aliases=("pn",))
class PowerNorm(SecondMomentNorm):
    r"""Divide each channel by its running quadratic mean; the backward pass runs on averages too.

    .. math:: y = \gamma\, \hat x + \beta, \qquad \hat x = \frac{x}{\sqrt{\psi_{t-1}^2 + \varepsilon}}, \quad
              \psi_t^2 = \alpha\,\psi_{t-1}^2 + (1-\alpha)\,\overline{x^2}

    with the mean over samples and positions. With :math:`g = \partial L / \partial \hat x`, the input's gradient is

    .. math:: \frac{\partial L}{\partial x} = \frac{g - \nu_{t-1}\hat x}{\sqrt{\psi_{t-1}^2 + \varepsilon}}, \qquad
              \nu_t = \nu_{t-1}\big(1 - (1-\alpha)\,\overline{\hat x^2}\big) + (1-\alpha)\,\overline{g \hat x}

    which is not the derivative of the formula; second derivatives take :math:`\nu` for a constant. The first batches
    are standardised by their own quadratic mean, with its exact gradient (the paper's PN-V).

    Args:
        num_features: number of channels ``C``.
        warmup: batches at the start that are standardised by themselves.
        momentum: weight of the new value in :math:`\psi^2`, which is :math:`1-\alpha` of the paper.
        backward_momentum: the same for :math:`\nu`.
        eps: :math:`\varepsilon`, added to the second moment.
        affine: learn :math:`\gamma` and :math:`\beta`.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for options that are out of range.

    Example:
        >>> PowerNorm(8, channel_dim=-1)(torch.randn(4, 10, 8)).shape
        torch.Size([4, 10, 8])

    Deviations:
        The authors' code puts an RMS norm of each token in front (``rms_norm`` before this does the same), divides the
        gradient by the batch's quadratic mean where the forward pass used the running one, counts a batch of the
        warm-up twice, in a plain average too, and steers the gradient in the warm-up. This is the paper's algorithm.

    Reference:
        Shen, Yao, Gholami, Mahoney and Keutzer 2020, PowerNorm: Rethinking Batch Normalization in Transformers,
        arXiv 2003.07845.
    """

    paper = Paper("Shen et al.", 2020, "PowerNorm: Rethinking Batch Normalization in Transformers", "2003.07845")

    def __init__(
        self,
        num_features: int,
        *,
        warmup: int = 4_000,
        momentum: float = 0.1,
        backward_momentum: float = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, channel_dim=channel_dim, device=device, dtype=dtype
        )
        if not 0 <= backward_momentum <= 1 or not isinstance(warmup, int) or warmup < 0:
            raise OptionError(
                f"power_norm with warmup={warmup!r}, momentum={momentum!r}, backward_momentum={backward_momentum!r}; "
                "expected a number of batches, and weights from 0 to 1"
            )
        self.warmup, self.backward_momentum = warmup, backward_momentum
        self._shown = {"warmup": warmup} | self._shown | {"backward_momentum": backward_momentum}
        self.buffer("gradient_average", 0.0, num_features)
        self.remember("running_var", "num_batches_tracked")

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Divide by the running quadratic mean, or in the warm-up by the batch's."""
        if self.evaluates:
            return super().formula(x, mask)
        power, seen = self.recall("running_var").to(x.dtype), self.recall("num_batches_tracked")
        batch, count = mean(x.square(), mask, BATCH), self.counted(x, mask)
        warm = seen < self.warmup
        z = x * torch.rsqrt(torch.where(warm, batch, column(power)) + self.eps)
        z = _PowerSteering.apply(
            z, self.get_buffer("gradient_average"), warm, count, self.backward_momentum, self.steers
        )
        assert self.momentum is not None
        self.track(count, {}, {"running_var": torch.lerp(power, batch.detach().flatten(), self.momentum)})
        assert isinstance(z, Tensor)
        return z


# ---- moving windows --------------------------------------------------------------------------------------------------


class _WindowSteering(torch.autograd.Function):
    """The identity, whose backward pass subtracts the projection of the gradient averaged over the latest batches."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, window: Tensor, warm: Tensor, count: Tensor, counts: bool) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, ctx.window, warm, count, ctx.counts = inputs
        ctx.save_for_backward(z, warm, count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grads
        z, warm, count = ctx.saved_tensors
        present = projection(gradient, z, count).view(1, -1)
        window = torch.cat([present, ctx.window.clone()[:-1].to(z.dtype)])
        steered = gradient - column(torch.where(warm, 0, window.mean(0))) * z
        if ctx.counts:
            with torch.no_grad():
                ctx.window.copy_(window)
        return steered, None, None, None, None


@register("mabn", aliases=("moving_average_batch_norm",))
class MovingAverageBatchNorm(SecondMomentNorm):
    r"""Divide each channel by its quadratic mean over the latest batches, forwards and backwards: for tiny batches.

    .. math:: y = \gamma\, r\, z + \beta, \qquad z = \frac{x}{\sqrt{\bar\chi^2 + \varepsilon}}, \quad
              \bar\chi^2 = \tfrac1m \sum_{i<m} \overline{x_{t-i}^2}, \quad
              r = \operatorname{clip}\Big(\sqrt{\frac{\bar\chi^2+\varepsilon}{\hat\chi^2+\varepsilon}},
              \tfrac{1}{r_\max}, r_\max\Big)

    :math:`\hat\chi^2` is the exponential average of :math:`\bar\chi^2`, which evaluation uses. With
    :math:`g = \partial L/\partial z`, the gradient of the input is

    .. math:: \frac{\partial L}{\partial x} = \frac{g - z\,\bar\Phi}{\sqrt{\bar\chi^2 + \varepsilon}}, \qquad
              \bar\Phi = \tfrac1m\sum_{i<m} \overline{g_{t-i} z_{t-i}}

    which is not the derivative of the formula; second derivatives take the earlier batches for constants. Until the
    window is full and ``warmup`` batches have passed, a batch is divided by its own quadratic mean, with its exact
    gradient; :math:`r` is one for the first ``rescale_after`` batches.

    Args:
        num_features: number of channels ``C``.
        window: :math:`m`, the number of batches.
        warmup: batches at the start that are standardised by themselves.
        rescale_after: batches at the start for which :math:`r` is one; at least ``warmup`` in effect.
        r_max: limit of :math:`r`.
        momentum: weight of the new value in the exponential average.
        eps: :math:`\varepsilon`, added to the second moment.
        affine: learn :math:`\gamma` and :math:`\beta`.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for options that are out of range.

    Example:
        >>> MovingAverageBatchNorm(8, window=4)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])

    Deviations:
        The paper centres the weights of the layer before, in place of the activations: that is a parametrization of
        the weights, not part of this norm. The limits, the warm-up and the 1000 batches without :math:`r` are those of
        the authors' code.

    Reference:
        Yan, Wan, Zhang, Zhang, Wei and Sun 2020, Towards Stabilizing Batch Statistics in Backward Propagation of Batch
        Normalization, arXiv 2001.06838.
    """

    paper = Paper(
        "Yan et al.", 2020,
        "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization", "2001.06838",
    )  # fmt: skip

    def __init__(
        self,
        num_features: int,
        *,
        window: int = 16,
        warmup: int = 100,
        rescale_after: int = 1_000,
        r_max: float = 5.0,
        momentum: float = 0.02,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, channel_dim=channel_dim, device=device, dtype=dtype
        )
        if window < 1 or warmup < 0 or rescale_after < 0 or r_max < 1:
            raise OptionError(
                f"mabn with window={window!r}, warmup={warmup!r}, rescale_after={rescale_after!r}, r_max={r_max!r}, "
                f"momentum={momentum!r}; expected a window and an r_max of at least 1, numbers of batches, and a weight"
            )
        self.window, self.warmup, self.rescale_after, self.r_max = window, warmup, rescale_after, r_max
        self._shown = {"window": window, "warmup": warmup} | self._shown
        self.buffer("power_window", 0.0, window, num_features)
        self.buffer("gradient_window", 0.0, window, num_features)
        self.remember("running_var", "power_window", "num_batches_tracked")

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Divide by the quadratic mean of the window, or in the warm-up by the batch's."""
        if self.evaluates:
            return super().formula(x, mask)
        running, seen = self.recall("running_var").to(x.dtype), self.recall("num_batches_tracked")
        batch, count = mean(x.square(), mask, BATCH), self.counted(x, mask)
        powers = self.push("power_window", batch.detach())
        warm = (seen < self.window) | (seen + 1 < self.warmup)
        power = torch.where(warm, batch, column(powers.mean(0)))
        z = _WindowSteering.apply(
            x * torch.rsqrt(power + self.eps), self.get_buffer("gradient_window"), warm, count, self.steers
        )
        r = torch.sqrt((power.detach() + self.eps) / (column(running) + self.eps)).clamp(1 / self.r_max, self.r_max)
        r = torch.where(seen < max(self.rescale_after, self.warmup), 1, r)
        assert self.momentum is not None
        renewed = torch.lerp(running, power.detach().flatten(), self.momentum)
        self.track(count, {}, {"running_var": renewed, "power_window": powers})
        return z * r


class _UnifiedSteering(torch.autograd.Function):
    """Scale the gradient, subtract an exponential average of its projection's average over the latest batches."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor, r: Tensor, window: Tensor, average: Tensor, warm: Tensor, skip: Tensor, count: Tensor,
        momentum: float, counts: bool,
    ) -> Tensor:  # fmt: skip
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, r, ctx.window, ctx.average, warm, skip, count, ctx.momentum, ctx.counts = inputs
        ctx.save_for_backward(z, r, warm, skip, count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, r, warm, skip, count = ctx.saved_tensors
        gradient = grads[0] * r
        before = ctx.average.clone().to(z.dtype)
        present = projection(gradient, z, count)
        window = torch.cat([torch.where(skip, before, present).view(1, -1), ctx.window.clone()[:-1].to(z.dtype)])
        mean = torch.where(warm, present, window.mean(0))
        average = torch.lerp(before, mean, ctx.momentum)
        steered = gradient - column(torch.where(skip, mean, average)) * z
        if ctx.counts:
            with torch.no_grad():
                ctx.window.copy_(window)
                ctx.average.copy_(average)
        return steered, None, None, None, None, None, None, None, None


@register("unified_norm", aliases=("un", "unified_normalization"))
class UnifiedNorm(SecondMomentNorm):
    r"""Divide each channel by the geometric mean of the latest batches' second moments, unless one of them sticks out.

    .. math:: y = \gamma\, z + \beta, \qquad z = \frac{x}{\sqrt{\hat\sigma^2 + \varepsilon}}, \quad
              \hat\sigma^2 = \Big(\prod_{i<m} \overline{x_{t-i}^2}\Big)^{1/m}

    With :math:`g = r\,\partial L/\partial z`, where
    :math:`r = \operatorname{clip}(\hat\sigma / \sigma_R, \tfrac15, 5)` makes up for the running :math:`\sigma_R^2` that
    evaluation uses, the gradient of the input is

    .. math:: \frac{\partial L}{\partial x} = \frac{g - \psi_t z}{\sqrt{\hat\sigma^2+\varepsilon}}, \qquad
              \psi_t = \alpha\psi_{t-1} + (1-\alpha)\,\tfrac1m\sum_{i<m} \overline{g_{t-i} z_{t-i}}

    which is not the derivative of the formula; second derivatives take the averages for constants. A batch is an
    outlier when in any channel the window's arithmetic mean exceeds its geometric mean by more than :math:`m` times
    the variance of the roots of the window before: it is then standardised by itself, with its exact gradient, and
    leaves the running values in the windows. In the warm-up, and until the windows are full, batches are standardised
    by themselves, and the window's mean in :math:`\psi` is the batch's.

    Args:
        num_features: number of channels ``C``.
        window: :math:`m`, the number of batches; one standardises every batch by itself.
        warmup: batches at the start that are standardised by themselves.
        rescale_after: batches at the start for which :math:`r` is one; at least ``warmup`` in effect.
        filter_outliers: treat batches that stick out by themselves; the authors do so for images, not for language.
        momentum: weight of the new value in the running averages, :math:`1-\alpha`.
        eps: :math:`\varepsilon`, added to the second moment.
        affine: learn :math:`\gamma` and :math:`\beta`.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for options that are out of range.

    Example:
        >>> UnifiedNorm(8, channel_dim=-1)(torch.randn(4, 10, 8)).shape
        torch.Size([4, 10, 8])

    Deviations:
        None from the authors' code, whose details (the test for outliers, the limits of :math:`r`, the warm-up) these
        are; its gradient of :math:`\gamma` is scaled by :math:`r` as well, here it is exact.

    Reference:
        Yang, Zhang, Wang, Li, Zhang, Wu, Pu and Zhou 2022, Unified Normalization for Accelerating and Stabilizing
        Transformers, arXiv 2208.01313.
    """

    paper = Paper(
        "Yang et al.", 2022, "Unified Normalization for Accelerating and Stabilizing Transformers", "2208.01313"
    )
    expected_failures = _STEERED

    def __init__(
        self,
        num_features: int,
        *,
        window: int = 4,
        warmup: int = 4_000,
        rescale_after: int = 1_000,
        filter_outliers: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, channel_dim=channel_dim, device=device, dtype=dtype
        )
        if window < 1 or warmup < 0 or rescale_after < 0:
            raise OptionError(
                f"unified_norm with window={window!r}, warmup={warmup!r}, rescale_after={rescale_after!r}, "
                f"momentum={momentum!r}; expected a window of at least 1, numbers of batches, and a weight"
            )
        self.window, self.warmup, self.rescale_after = window, warmup, rescale_after
        self.filter_outliers = filter_outliers
        self._shown = {"window": window, "warmup": warmup} | self._shown
        self._shown |= {} if filter_outliers else {"filter_outliers": False}
        self.buffer("power_window", 0.0, window, num_features)
        self.buffer("gradient_window", 0.0, window, num_features)
        self.buffer("gradient_average", 0.0, num_features)
        self.remember("running_var", "power_window", "num_batches_tracked")

    def outlier(self, powers: Tensor, seen: Tensor) -> Tensor:
        """Whether the latest batch of the window sticks out."""
        if not self.filter_outliers:
            return torch.zeros((), dtype=torch.bool, device=powers.device)
        before = self.recall("power_window").to(powers.dtype).sqrt()
        spread = (before - before.mean()).square().sum() / max(before.numel() - 1, 1)
        excess = powers.mean(0) - powers.log().mean(0).exp()
        return (seen + 1 >= self.warmup) & (excess > spread * self.window).any()

    @torch.no_grad()
    def scales(self, x: Tensor, mask: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Count a batch: its second moment, the gradient's factor, whether it stands by itself, and why."""
        running, seen = self.recall("running_var").to(x.dtype), self.recall("num_batches_tracked")
        batch = mean(x.square(), mask, BATCH).flatten()
        powers = self.push("power_window", batch)
        outlier = self.outlier(powers, seen)
        skip = outlier if self.window > 1 else torch.ones_like(outlier)
        warm = (seen < self.window) | (seen + 1 < self.warmup) | skip
        power = torch.where(warm, batch, powers.log().mean(0).exp())
        r = torch.sqrt((power + self.eps) / (running + self.eps)).clamp(1 / 5, 5)
        r = torch.where((seen < max(self.rescale_after, self.warmup)) | skip, 1, r)
        assert self.momentum is not None
        kept = torch.cat([torch.where(outlier, running, batch).view(1, -1), powers[1:]])
        self.track(count, {}, {"running_var": torch.lerp(running, power, self.momentum), "power_window": kept})
        return column(power), column(r), warm, skip

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Divide by the root of the window's geometric mean, or of the batch's second moment."""
        if self.evaluates:
            return super().formula(x, mask)
        count = self.counted(x, mask)
        power, r, warm, skip = self.scales(x, mask, count)
        assert self.momentum is not None
        z = _UnifiedSteering.apply(
            x * torch.rsqrt(power + self.eps), r, self.get_buffer("gradient_window"),
            self.get_buffer("gradient_average"), warm, skip, count, self.momentum, self.steers,
        )  # fmt: skip
        assert isinstance(z, Tensor)
        return z


# ---- sample by sample ------------------------------------------------------------------------------------------------


class _OnlineSteering(torch.autograd.Function):
    """Divide by constants; the backward pass keeps the gradient orthogonal to the output and to one, on average."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, mean: Tensor, inverse: Tensor, along: Tensor, level: Tensor, count: Tensor, rate: float, counts: bool
    ) -> Tensor:
        return (x - mean) * inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, inverse, ctx.along, ctx.level, count, ctx.rate, ctx.counts = inputs
        ctx.save_for_backward(output, inverse, count)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grads
        z, inverse, count = ctx.saved_tensors  # (b, c, s), (b, c, 1), (b, 1, 1)
        share = 1 / count.clamp(min=1)
        here = (count > 0).to(z.dtype)
        squares, products = ((z * other).sum(2) * share[..., 0] for other in (z, gradient))
        sums = gradient.sum(2) * share[..., 0]
        ones = z.sum(2) * share[..., 0]
        along, level = ctx.along.clone().to(z.dtype), ctx.level.clone().to(z.dtype)
        alongs, levels = [], []
        for i in range(len(z)):
            alongs.append(along)
            levels.append(level)
            mean = (sums[i] - ctx.rate * along * ones[i]) * inverse[i, :, 0]  # of the gradient before its level goes
            level = level + here[i, 0] * (mean - ctx.rate * level)
            along = along + here[i, 0] * (products[i] - ctx.rate * along * squares[i])
        if not alongs:
            return gradient, None, None, None, None, None, None, None
        steered = (gradient - ctx.rate * torch.stack(alongs)[..., None] * z) * inverse
        steered = steered - ctx.rate * torch.stack(levels)[..., None]
        if ctx.counts:
            with torch.no_grad():
                ctx.along.copy_(along)
                ctx.level.copy_(level)
        return steered, None, None, None, None, None, None, None


@register("online_norm", aliases=("online_normalization",))
class OnlineNorm(SteeringNorm):
    r"""Standardise each sample by averages over the samples before it, without batches.

    .. math:: y = S\Big(\gamma\, z + \beta\Big), \qquad
              z_t = \frac{x_t - \mu_{t-1}}{\sqrt{\sigma_{t-1}^2 + \varepsilon}}

    sample by sample, in the order of the batch, where with a sample's mean :math:`m_t` and variance :math:`v_t` over
    its positions

    .. math:: \sigma_t^2 = \alpha\sigma_{t-1}^2 + (1-\alpha)v_t + \alpha(1-\alpha)(m_t-\mu_{t-1})^2, \qquad
              \mu_t = \alpha\mu_{t-1} + (1-\alpha)m_t

    and :math:`S` divides each sample by its root mean square over all channels and positions (layer scaling), or clamps
    (``guard="clamp"``). The gradient :math:`g_t = \partial L/\partial z_t` passes two controllers, which keep it on
    average orthogonal to :math:`z` and to one:

    .. math:: g'_t = g_t - (1-\alpha_b)\,a_{t-1} z_t, \quad a_t = a_{t-1} + \overline{g'_t z_t}, \qquad
              \frac{\partial L}{\partial x_t} = \frac{g'_t}{\sqrt{\sigma_{t-1}^2+\varepsilon}} - (1-\alpha_b)\,b_{t-1},
              \quad b_t = b_{t-1} + \overline{\partial L/\partial x_t}

    which is not the derivative of the formula; second derivatives take the controllers for constants.

    Args:
        num_features: number of channels ``C``.
        forward_decay: :math:`\alpha`, from 0 to 1.
        backward_decay: :math:`\alpha_b`, from 0 to 1.
        guard: ``"layer_scaling"``, ``"clamp"`` (to plus or minus five) or ``None``.
        eps: :math:`\varepsilon`, added to the variance, and to the second moment of layer scaling.
        affine: learn :math:`\gamma` and :math:`\beta`.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for options that are out of range.

    Example:
        >>> OnlineNorm(8)(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])

    Deviations:
        The default guard is the paper's; the authors' later code clamps. Passes over a batch take a step for each
        sample, of a few operations on the channels.

    Reference:
        Chiley, Sharapov, Kosson, Koster, Reece, Samaniego de la Fuente, Subbiah and James 2019, Online Normalization
        for Training Neural Networks, arXiv 1905.05894.
    """

    paper = Paper("Chiley et al.", 2019, "Online Normalization for Training Neural Networks", "1905.05894")
    min_count = 1
    expected_failures = _STEERED

    def __init__(
        self,
        num_features: int,
        *,
        forward_decay: float = 0.999,
        backward_decay: float = 0.99,
        guard: str | None = "layer_scaling",
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        if not (0 <= forward_decay <= 1 and 0 <= backward_decay <= 1):
            raise OptionError(
                f"online_norm with forward_decay={forward_decay!r} and backward_decay={backward_decay!r}; expected "
                "numbers from 0 to 1"
            )
        if guard not in ("layer_scaling", "clamp", None):
            raise OptionError(f"online_norm with guard={guard!r}; expected 'layer_scaling', 'clamp' or None")
        self.forward_decay, self.backward_decay, self.guard = forward_decay, backward_decay, guard
        self._shown = {"forward_decay": forward_decay, "backward_decay": backward_decay, "eps": self.eps}
        self._shown |= {} if guard == "layer_scaling" else {"guard": guard}
        self.buffer("gradient_along", 0.0, num_features)
        self.buffer("gradient_level", 0.0, num_features)
        self.remember("running_mean", "running_var", "num_batches_tracked")

    @property
    def traits(self) -> Traits:
        """A sample depends on those before it; layer scaling spans its positions."""
        apart = self.guard != "layer_scaling"
        return Traits(batch_dependent=True, causal=apart, causal_in_training=False, stateful=True)

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Standardise each sample by the averages before it."""
        if self.evaluates:
            return super().formula(x, mask)
        means, variances = (moment[..., 0].detach() for moment in moments(x, mask, SAMPLE))
        count = torch.as_tensor(number(x, mask, SAMPLE), dtype=x.dtype, device=x.device).view(-1, 1, 1)
        count = count.expand(len(x), 1, 1)
        mean, var = self.recall("running_mean").to(x.dtype), self.recall("running_var").to(x.dtype)
        centres, spreads = [mean], [var]
        for i in range(len(x)):
            rate = (1 - self.forward_decay) * (count[i, 0] > 0).to(x.dtype)
            difference = means[i] - mean
            var = var + rate * (variances[i] + self.forward_decay * difference.square() - var)
            mean = mean + rate * difference
            centres.append(mean)
            spreads.append(var)
        self.track(total(x, mask), {}, {"running_mean": mean, "running_var": var})
        z = _OnlineSteering.apply(
            x, torch.stack(centres)[:-1, :, None], torch.rsqrt(torch.stack(spreads)[:-1, :, None] + self.eps),
            self.get_buffer("gradient_along"), self.get_buffer("gradient_level"), count, 1 - self.backward_decay,
            self.steers,
        )  # fmt: skip
        assert isinstance(z, Tensor)
        return z

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Standardise, scale and shift, and guard."""
        y = super().normalize(ops.wide(x), mask, channels_last)
        if self.guard == "clamp":
            y = y.clamp(-5, 5)
        if self.guard == "layer_scaling":
            y, _ = ops.standardize(y, _JOINT, {}, channels_last=channels_last, eps=self.eps, centred=False, mask=mask)
        return y.to(x.dtype)


@register("streaming_norm", aliases=("streaming_batch_norm",), contrib=True)
class StreamingNorm(HistoryNorm):
    r"""Standardise by a mixture of a long memory and of the batches since it was renewed, the current one included.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{s^2 + \varepsilon}} + \beta, \qquad
              \mu = \alpha\,\mu_\ell + (1-\alpha)\,\mu_k, \quad s = \alpha\,s_\ell + (1-\alpha)\,s_k, \quad
              s_B = \big(\overline{|x-\mu_B|^p}\big)^{1/p}

    with the plain averages :math:`\mu_k, s_k` of the batches' :math:`\mu_B, s_B` since the renewal and the long-term
    :math:`\mu_\ell, s_\ell`, which after every ``period`` batches move by ``momentum`` towards the averages. A
    period is what lies between two changes of the weights: the micro-batches of a step, the time steps of a recurrent
    net. Gradients flow through the current batch. Evaluation uses the long-term statistics.

    Args:
        num_features: number of channels ``C``.
        long_weight: :math:`\alpha`, from 0 to 1.
        p: order of the moment, 1 or 2.
        period: batches between two renewals of the long-term statistics.
        momentum: weight of the new value in the long-term statistics.
        eps: :math:`\varepsilon`, added to the squared scale.
        affine: learn :math:`\gamma` and :math:`\beta`.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for options that are out of range.
        NormzooError: in training, when a channel has a single value.

    Example:
        >>> StreamingNorm(8, period=4)(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])

    Deviations:
        The paper streams the gradients of the statistics as well, with weights of its own; here the gradient is that
        of the formula. It leaves the weights open and there is no code of the authors to compare with.

    Reference:
        Liao, Kawaguchi and Poggio 2016, Streaming Normalization: Towards Simpler and More Biologically-plausible
        Normalizations for Online and Recurrent Learning, arXiv 1610.06160.
    """

    paper = Paper(
        "Liao, Kawaguchi & Poggio", 2016,
        "Streaming Normalization: Towards Simpler and More Biologically-plausible Normalizations for Online and "
        "Recurrent Learning", "1610.06160",
    )  # fmt: skip

    def __init__(
        self,
        num_features: int,
        *,
        long_weight: float = 0.5,
        p: int = 1,
        period: int = 1,
        momentum: float = 0.1,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, channel_dim=channel_dim, device=device, dtype=dtype
        )
        if momentum is None or not 0 <= long_weight <= 1 or p not in (1, 2) or period < 1:
            raise OptionError(
                f"streaming_norm with long_weight={long_weight!r}, p={p!r}, period={period!r}, momentum={momentum!r}; "
                "expected weights from 0 to 1, p of 1 or 2 and a positive number of batches"
            )
        self.long_weight, self.p, self.period = long_weight, p, period
        self._shown = {"long_weight": long_weight, "p": p, "period": period} | self._shown
        self.buffer("running_scale", 1.0, num_features)
        self.buffer("short_mean", 0.0, num_features)
        self.buffer("short_scale", 0.0, num_features)
        self.drop("running_var")
        self.remember("running_mean", "running_scale", "short_mean", "short_scale", "num_batches_tracked")

    def population(self) -> Moments:
        """The long-term mean, and the square of the long-term scale."""
        return Moments(self.recall("running_mean"), self.recall("running_scale").square(), 1.0)

    def reset_running_stats(self) -> None:
        """Forget the statistics."""
        super().reset_running_stats()
        for name in ("short_scale", "before_short_scale"):
            self.get_buffer(name).zero_()

    def measured(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and scale of a batch, each ``(c,)``."""
        centre = mean(x, mask, BATCH)
        if self.p == 1:
            return centre.flatten(), mean((x - centre).abs(), mask, BATCH).flatten()
        var = mean((x - centre).square(), mask, BATCH).flatten()
        varies = var > 0
        return centre.flatten(), torch.where(varies, torch.where(varies, var, 1).sqrt(), 0)  # no slope at zero

    def statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The mixture of the long and the short memory."""
        if self.evaluates:
            return super().statistics(x, mask)
        place = self.recall("num_batches_tracked") % self.period  # in the present period
        written, mixed = {}, []
        for name, new in zip(("mean", "scale"), self.measured(x, mask), strict=True):
            long, short = (self.recall(f"{kind}_{name}").to(x.dtype) for kind in ("running", "short"))
            short = (short * place + new) / (place + 1)
            mixed.append(self.long_weight * long + (1 - self.long_weight) * short)
            assert self.momentum is not None
            over = place + 1 == self.period
            written[f"running_{name}"] = torch.where(over, torch.lerp(long, short, self.momentum), long)
            written[f"short_{name}"] = torch.where(over, 0, short)
        self.track(total(x, mask), {}, written)
        return column(mixed[0]), column(mixed[1].square())
