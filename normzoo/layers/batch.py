"""Norms whose statistics are taken over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.errors import NormzooError, OptionError
from normzoo.layers.base import MomentNorm, Paper
from normzoo.ops import Moments
from normzoo.registry import register


@register("batch_norm", aliases=("bn",))
class BatchNorm(MomentNorm):
    r"""Standardise each channel over the batch; by running averages in evaluation.

    .. math:: y = \gamma_c \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \varepsilon}} + \beta_c, \qquad
              \mu_c, \sigma_c^2 \text{ over samples and positions}

    Training divides by the biased variance and averages the unbiased one, as torch does.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: in training, when a channel has a single value.

    Example:
        >>> BatchNorm(8)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Reference:
        Ioffe and Szegedy 2015, Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
        Shift, arXiv 1502.03167.
    """

    moments = "b c s -> c"
    paper = Paper("Ioffe & Szegedy", 2015, "Batch Normalization: Accelerating Deep Network Training", "1502.03167")


@register("sync_batch_norm", aliases=("sync_bn",))
class SyncBatchNorm(MomentNorm):
    r"""Batch norm whose statistics are taken over all processes, each weighed by its number of real elements.

    .. math:: y = \gamma_c \frac{x - \mu_c}{\sqrt{\sigma_c^2 + \varepsilon}} + \beta_c, \qquad
              \mu = \tfrac{1}{n}\sum_i n_i\mu_i, \quad
              \sigma^2 = \tfrac{1}{n}\sum_i n_i\big(\sigma_i^2 + (\mu_i-\mu)^2\big)

    over the processes :math:`i`. Works on CPU (gloo) and CUDA (NCCL), with unequal and empty local batches; without
    ``torch.distributed`` it is batch norm. Every norm with batch statistics does the same with ``sync=True``.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> SyncBatchNorm(8)(torch.randn(4, 8, 5)).shape
        torch.Size([4, 8, 5])

    Reference:
        Peng et al. 2017, MegDet: A Large Mini-Batch Object Detector, arXiv 1711.07240.
    """

    moments = "b c s -> c"
    defaults = {"sync": True}
    paper = Paper("Peng et al.", 2017, "MegDet: A Large Mini-Batch Object Detector", "1711.07240")


@register("ghost_batch_norm", aliases=("ghost_norm",))
class GhostBatchNorm(MomentNorm):
    r"""Batch norm over virtual batches: in training, each part of the batch has statistics of its own.

    .. math:: y = \gamma_c \frac{x - \mu_{n,c}}{\sqrt{\sigma_{n,c}^2 + \varepsilon}} + \beta_c, \qquad
              \mu_{n,c}, \sigma_{n,c}^2 \text{ over virtual batch } n

    A batch of ``N`` samples is cut into ``max(1, N // ghost_batch_size)`` parts whose sizes differ by at most one, so
    that no part is smaller than asked unless the batch is. Evaluation uses the running averages, into which a training
    step counts once, with the mean over its virtual batches (the paper updates once for each virtual batch).

    Args:
        num_features: number of channels ``C``.
        ghost_batch_size: samples in a virtual batch.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> GhostBatchNorm(8, ghost_batch_size=4)(torch.randn(10, 8, 5)).shape
        torch.Size([10, 8, 5])

    Reference:
        Hoffer, Hubara and Soudry 2017, Train longer, generalize better: closing the generalization gap in large batch
        training of neural networks, arXiv 1705.08741.
    """

    moments = "(n b) c s -> n c"
    paper = Paper("Hoffer et al.", 2017, "Train longer, generalize better", "1705.08741")

    def __init__(
        self,
        num_features: int,
        *,
        ghost_batch_size: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(ghost_batch_size, int) or ghost_batch_size < 1:
            raise OptionError(f"ghost_batch_size={ghost_batch_size!r}; expected a positive number of samples")
        super().__init__(
            num_features, n=1, eps=eps, affine=affine, momentum=momentum,
            track_running_stats=track_running_stats, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.ghost_batch_size = ghost_batch_size
        self._shown |= {"ghost_batch_size": ghost_batch_size}
        del self._shown["n"]

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Cut the batch into virtual batches; an uneven cut is filled up with masked samples."""
        parts = max(1, x.shape[0] // self.ghost_batch_size) if self.training else 1
        self.sizes = {"n": parts}
        if x.shape[0] % parts == 0:
            return super().normalize(x, mask, channels_last)
        order, real, back = _uneven(x.shape[0], parts, x.device)
        positions = x.shape[1 if channels_last else 2]
        real_positions = real[:, None].expand(-1, positions) if mask is None else mask[order] & real[:, None]
        return super().normalize(x[order], real_positions, channels_last)[back]


def _uneven(samples: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A cut into parts of which the first are larger by one, in rows of equal length.

    Returns:
        The sample in each place, whether it is there or fills a row up, and the place of each sample.
    """
    size, larger = divmod(samples, parts)
    places = torch.arange(parts * (size + 1), device=device)
    part, place = places // (size + 1), places % (size + 1)
    real = place < size + (part < larger).long()
    first = part * size + part.clamp(max=larger)
    sample = torch.arange(samples, device=device)
    later = sample - larger  # what comes after the larger parts has lost one sample for each of them
    back = torch.where(sample < larger * (size + 1), sample, later + later // size)
    return torch.where(real, first + place, first), real, back


@register("batch_renorm", aliases=("batch_renormalization",))
class BatchRenorm(MomentNorm):
    r"""Batch norm corrected towards the running averages, so that training computes what evaluation will.

    .. math:: y = \gamma\Big(\frac{x - \mu_B}{\sigma_B}\, r + d\Big) + \beta, \qquad
              r = \operatorname{clip}\Big(\frac{\sigma_B}{\sigma}, \frac{1}{r_\max}, r_\max\Big), \quad
              d = \operatorname{clip}\Big(\frac{\mu_B - \mu}{\sigma}, -d_\max, d_\max\Big)

    with the batch's :math:`\mu_B, \sigma_B` and the running :math:`\mu, \sigma`; :math:`r` and :math:`d` are constants
    for the gradient. The limits follow the number of batches seen, a buffer that is saved with the model: batch norm
    (:math:`r_\max=1, d_\max=0`) for the first ``warmup`` batches, then linear ramps to ``r_max`` at ``r_ramp`` and to
    ``d_max`` at ``d_ramp``; the defaults are the paper's. A single value per channel is allowed; :math:`d` moves it.

    Args:
        num_features: number of channels ``C``.
        r_max: final limit of :math:`r`, at least 1.
        d_max: final limit of :math:`d`, at least 0.
        warmup: batches of plain batch norm.
        r_ramp: the batch at which ``r_max`` is reached.
        d_ramp: the batch at which ``d_max`` is reached.
        eps: added to both variances.
        affine: learn :math:`\gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages (the paper's :math:`\alpha`).
        sync: take the statistics over all processes of ``torch.distributed``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Example:
        >>> BatchRenorm(8, warmup=0, r_ramp=100, d_ramp=50)(torch.randn(2, 8, 5)).shape
        torch.Size([2, 8, 5])

    Reference:
        Ioffe 2017, Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models,
        arXiv 1702.03275.
    """

    moments = "b c s -> c"
    min_count = 1
    paper = Paper("Ioffe", 2017, "Batch Renormalization: Towards Reducing Minibatch Dependence", "1702.03275")

    def __init__(
        self,
        num_features: int,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        warmup: int = 5_000,
        r_ramp: int = 40_000,
        d_ramp: int = 25_000,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.01,
        sync: bool = False,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, sync=sync,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        if r_max < 1 or d_max < 0 or not 0 <= warmup <= min(r_ramp, d_ramp):
            raise NormzooError(
                f"batch renorm with r_max={r_max}, d_max={d_max}, warmup={warmup}, r_ramp={r_ramp}, d_ramp={d_ramp}; "
                "expected r_max >= 1, d_max >= 0 and 0 <= warmup <= r_ramp, d_ramp (counted in batches)"
            )
        self.r_max, self.d_max, self.warmup, self.r_ramp, self.d_ramp = r_max, d_max, warmup, r_ramp, d_ramp
        self._shown |= {"r_max": r_max, "d_max": d_max, "warmup": warmup, "r_ramp": r_ramp, "d_ramp": d_ramp}
        self.remember("running_mean", "running_var", "num_batches_tracked")

    def limits(self) -> tuple[Tensor, Tensor]:
        """The present :math:`r_max` and :math:`d_max`, from the number of batches seen."""
        assert self.running_var is not None
        seen = self.recall("num_batches_tracked").to(self.running_var.dtype) - self.warmup

        def ramp(end: int) -> Tensor:
            return (seen / (end - self.warmup)).clamp(0, 1) if end > self.warmup else (seen >= 0).to(seen.dtype)

        return 1 + ramp(self.r_ramp) * (self.r_max - 1), ramp(self.d_ramp) * self.d_max

    def correction(self, batch: Moments) -> tuple[Tensor, Tensor]:
        """:math:`r` and :math:`d` for the moments of a batch."""
        running = self.population()
        r_max, d_max = self.limits()
        dtype = running.var.dtype
        inverse = torch.rsqrt(running.var + self.eps)
        r = (torch.sqrt(batch.var.to(dtype) + self.eps) * inverse).clamp(1 / r_max, r_max)
        d = ((batch.mean.to(dtype) - running.mean) * inverse).clamp(-d_max, d_max)
        return r, d

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Batch norm, corrected by r and d in training."""
        if not self.training:
            return super().normalize(x, mask, channels_last)
        self.check_count(x, mask, channels_last)

        def rescale(batch: Moments) -> tuple[Tensor | None, Tensor | None]:
            r, d = self.correction(batch)
            self.update(batch)
            weight = r if self.weight is None else self.weight * r
            bias = d if self.weight is None else self.weight * d
            return weight, bias if self.bias is None else bias + self.bias

        return self.standardize(x, mask, channels_last, rescale=rescale)[0]
