"""Batch norms that standardise by more than the batch: its predecessors, a reference, the sample in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from normzoo.errors import NormzooError, OptionError
from normzoo.layers.base import Paper, Traits, unbiased
from normzoo.layers.parts import BATCH, SAMPLE, BatchFormulaNorm, HistoryNorm, column, moments, total
from normzoo.ops import Moments
from normzoo.registry import register


def blend(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], weight: Tensor | float) -> tuple[Tensor, Tensor]:
    r"""Mean and variance of a mixture that takes its elements from ``second`` with probability ``weight``.

    .. math:: \mu = (1-w)\mu_1 + w\mu_2, \qquad \sigma^2 = (1-w)\sigma_1^2 + w\sigma_2^2 + w(1-w)(\mu_1-\mu_2)^2

    The same as mixing the first two raw moments, without their cancellation.
    """
    (mean_1, var_1), (mean_2, var_2) = first, second
    between = weight * (1 - weight) * (mean_1 - mean_2).square()
    return (1 - weight) * mean_1 + weight * mean_2, (1 - weight) * var_1 + weight * var_2 + between


@register("eval_norm", aliases=("inference_example_weighting",))
class EvalNorm(BatchFormulaNorm):
    r"""Batch norm whose evaluation mixes the sample at hand into the running statistics.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta, \qquad
              \mu = (1-w)\,\mu_R + w\,\mu_b, \quad
              \sigma^2 = (1-w)\,\sigma_R^2 + w\,\sigma_b^2 + w(1-w)(\mu_R-\mu_b)^2

    in evaluation, with the running :math:`\mu_R, \sigma_R^2` and the sample's own :math:`\mu_b, \sigma_b^2` over its
    positions: the moments of a mixture. In training a sample is part of its batch; in batch norm's evaluation it is
    not, and the two differ, most for small batches. Training is that of batch norm, and ``w=0`` is batch norm
    throughout. A natural weight is the share of a sample in a training batch.

    Args:
        num_features: number of channels ``C``.
        sample_weight: the weight :math:`w` of the sample, from 0 to 1.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for a weight that is none.
        NormzooError: in training, when a channel has a single value.

    Example:
        >>> EvalNorm(8, sample_weight=0.1).eval()(torch.randn(1, 8, 5)).shape
        torch.Size([1, 8, 5])

    Deviations:
        The formula is that of Summers and Dinneen, who mix the first two raw moments; this is the same without their
        cancellation. Their running second moment includes the variance of the batches' means, torch's running
        variance does not. Singh and Shrivastava, who named it, learn a weight for the mean and one for the variance in
        each layer by an auxiliary loss; here there is one weight, chosen, as in the other paper.

    Reference:
        Summers and Dinneen 2019, Four Things Everyone Should Know to Improve Batch Normalization, arXiv 1906.03548.
        Singh and Shrivastava 2019, EvalNorm: Estimating Batch Normalization Statistics for Evaluation, arXiv
        1904.06031.
    """

    paper = Paper(
        "Summers & Dinneen", 2019, "Four Things Everyone Should Know to Improve Batch Normalization", "1906.03548"
    )

    def __init__(
        self,
        num_features: int,
        *,
        sample_weight: float = 1 / 32,
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
        if not 0 <= sample_weight <= 1:
            raise OptionError(f"eval_norm with sample_weight={sample_weight!r}; expected a number from 0 to 1")
        self.sample_weight = sample_weight
        self._shown = {"sample_weight": sample_weight} | self._shown

    @property
    def traits(self) -> Traits:
        """Those of batch norm; in evaluation a sample's positions share its statistics."""
        return Traits(
            batch_dependent=True, causal=self.sample_weight == 0, causal_in_training=False, stateful=True,
            scale_invariant=True, shift_invariant=True,
        )  # fmt: skip

    def statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the batch in training; the mixture in evaluation, ``(b, c, 1)``."""
        running = super().statistics(x, mask)
        if self.training or self.sample_weight == 0:
            return running
        return blend(running, moments(x, mask, SAMPLE), self.sample_weight)


@register("momentum_batch_norm", aliases=("mbn",), contrib=True)
class MomentumBatchNorm(HistoryNorm):
    r"""Batch norm by a moving average of the batches' statistics, with more memory the smaller the batch.

    .. math:: y = \gamma \frac{x - \mu_t}{\sqrt{\sigma_t^2 + \varepsilon}} + \beta, \qquad
              \mu_t = \lambda_t\mu_{t-1} + (1-\lambda_t)\mu_B, \quad
              \sigma_t^2 = \lambda_t\sigma_{t-1}^2 + (1-\lambda_t)\sigma_B^2

    with the batch's :math:`\mu_B, \sigma_B^2`, through which alone gradients flow. The memory grows over the first
    :math:`T` batches from none, which is batch norm, to that which makes up for a batch of :math:`m` samples instead of
    :math:`m_0`:

    .. math:: \lambda_t = \rho^{\max(T-t,\,0)\,/\,(T-1)} - \rho, \qquad \rho = \min(m/m_0, 1)

    Evaluation uses running averages of the batches' statistics, as batch norm does.

    Args:
        num_features: number of channels ``C``.
        ideal_batch_size: :math:`m_0`, from which on there is no memory.
        ramp: :math:`T`, batches until the memory is complete, at least 2.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages of evaluation; ``None`` is the cumulative average.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for options that are out of range.
        NormzooError: in training, when a channel has a single value.

    Example:
        >>> MomentumBatchNorm(8, ramp=100)(torch.randn(2, 8, 5)).shape
        torch.Size([2, 8, 5])

    Deviations:
        The paper counts :math:`t` and :math:`T` in stages of training, here they are batches. There is no code of the
        authors to compare with.

    Reference:
        Yong, Huang, Meng, Hua and Zhang 2020, Momentum Batch Normalization for Deep Learning with Small Batch Size,
        ECCV.
    """

    paper = Paper(
        "Yong et al.", 2020, "Momentum Batch Normalization for Deep Learning with Small Batch Size", venue="ECCV"
    )

    def __init__(
        self,
        num_features: int,
        *,
        ideal_batch_size: int = 32,
        ramp: int = 5_000,
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
        if ideal_batch_size < 1 or ramp < 2:
            raise OptionError(
                f"momentum_batch_norm with ideal_batch_size={ideal_batch_size!r} and ramp={ramp!r}; expected at least "
                "1 sample and 2 batches"
            )
        self.ideal_batch_size, self.ramp = ideal_batch_size, ramp
        self._shown |= {"ideal_batch_size": ideal_batch_size, "ramp": ramp}
        self.buffer("history_mean", 0.0, num_features)
        self.buffer("history_var", 1.0, num_features)
        self.remember("history_mean", "history_var", "num_batches_tracked")

    def memory(self, samples: int) -> Tensor:
        """The weight of the history for a batch of so many samples."""
        share = min(samples / self.ideal_batch_size, 1.0)
        history = self.recall("history_var")
        batch = self.recall("num_batches_tracked").to(history.dtype) + 1
        return share ** ((self.ramp - batch).clamp(min=0) / (self.ramp - 1)) - share

    def statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The history with the batch in it."""
        if self.evaluates:
            return super().statistics(x, mask)
        memory, number = self.memory(len(x)).to(x.dtype), total(x, mask)
        batch = moments(x, mask, BATCH)
        mean = torch.lerp(batch[0], column(self.recall("history_mean")).to(x.dtype), memory)
        var = torch.lerp(batch[1], column(self.recall("history_var")).to(x.dtype), memory)
        self.track(
            number,
            {"running_mean": batch[0].flatten(), "running_var": unbiased(batch[1].flatten(), number)},
            {"history_mean": mean, "history_var": var},
        )
        return mean, var


class RecentBatchesNorm(HistoryNorm):
    r"""A batch norm over the last batches together: abstract; the current one is the first in the memory.

    .. math:: \mu = \sum_i w_i\mu_i, \qquad \sigma^2 = \sum_i w_i\big(\sigma_i^2 + (\mu_i - \mu)^2\big)
    """

    def set_up(self, window: int, decay: float) -> None:
        """Add the memory."""
        name = type(self).__name__
        if not isinstance(window, int) or window < 1:
            raise OptionError(f"{name} with window={window!r}; expected a positive number of batches")
        if not 0 <= decay <= 1:
            raise OptionError(f"{name} with decay={decay!r}; expected a number from 0 to 1")
        self.window, self.decay = window, decay
        self.buffer("memory_mean", 0.0, window, self.num_features)
        self.buffer("memory_var", 1.0, window, self.num_features)
        self.remember("memory_mean", "memory_var", "num_batches_tracked")

    def pool(self, mean: Tensor, var: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Moments of all batches ``(k, c)`` that are ``there``, latest first, weighed by their age."""
        age = torch.arange(len(mean), device=mean.device, dtype=mean.dtype)
        weight = (self.decay**age * there.to(mean.dtype))[:, None]
        weight = weight / weight.sum().clamp(min=torch.finfo(mean.dtype).tiny)
        pooled = (weight * mean).sum(0)
        return pooled, (weight * (var + (mean - pooled).square())).sum(0)

    def window_with(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The moments ``(k, c)`` of a batch, whose own are ``(1, c, 1)``, and of those before it."""
        mean, var = (moment.view(1, -1) for moment in batch)
        older = (self.recall(name)[:-1].to(mean.dtype) for name in ("memory_mean", "memory_var"))
        return torch.cat([mean, next(older)]), torch.cat([var, next(older)])

    def there(self, start: int = 0) -> Tensor:
        """Which places of the window are taken once the current batch is in; only its own in the first ``start``."""
        before = self.recall("num_batches_tracked")
        age = torch.arange(self.window, device=before.device)
        return (age <= before) & ((before >= start) | (age == 0))


@register("memorized_batch_norm", aliases=("memorised_batch_norm",), contrib=True)
class MemorizedBatchNorm(RecentBatchesNorm):
    r"""Batch norm over the last few batches, in evaluation as in training.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta, \qquad
              \mu = \sum_{i<k} w_i\mu_{t-i}, \quad
              \sigma^2 = \sum_{i<k} w_i\big(\sigma_{t-i}^2 + (\mu_{t-i} - \mu)^2\big), \quad
              w_i \propto \lambda^i

    :math:`i=0` is the current batch, through which alone gradients flow; evaluation uses the memory as training left
    it. With a window of one this is batch norm in training.

    Args:
        num_features: number of channels ``C``.
        window: :math:`k`, the number of batches, the current one included.
        decay: :math:`\lambda`, the weight of a batch relative to its successor.
        eps: :math:`\varepsilon`, added to the variance.
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
        >>> norm = MemorizedBatchNorm(8, window=3)
        >>> [tuple(norm(torch.randn(4, 8)).shape) for _ in range(4)][-1], int(norm.num_batches_tracked)
        ((4, 8), 4)

    Deviations:
        The paper passes each batch a second time after the weights have changed, to bring the memory up to date
        (double forward): that is the training loop's, which can pass the batch again in training mode. The paper
        leaves the weights open; the geometric ones here are a choice. There is no code of the authors.

    Reference:
        Guo, Wu, Deng, Chen and Tan 2018, Double Forward Propagation for Memorized Batch Normalization, AAAI; arXiv
        2010.04947.
    """

    paper = Paper(
        "Guo et al.", 2018, "Double Forward Propagation for Memorized Batch Normalization", "2010.04947", "AAAI"
    )

    def __init__(
        self,
        num_features: int,
        *,
        window: int = 5,
        decay: float = 0.9,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.set_up(window, decay)
        self.drop("running_mean", "running_var")
        self._shown = {"eps": self.eps, "window": window, "decay": decay}

    def population(self) -> Moments:
        """The moments of all batches in the memory."""
        mean, var = self.recall("memory_mean"), self.recall("memory_var")
        # an empty memory counts as one batch with mean 0 and variance 1, as it was made
        there = torch.arange(self.window, device=mean.device) < self.recall("num_batches_tracked").clamp(min=1)
        return Moments(*self.pool(mean, var, there), 1.0)

    def statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of all batches in the memory, the current one included in training."""
        if self.evaluates:
            return super().statistics(x, mask)
        means, variances = self.window_with(moments(x, mask, BATCH))
        pooled = self.pool(means, variances, self.there())
        self.track(total(x, mask), {}, {"memory_mean": means, "memory_var": variances})
        return column(pooled[0]), column(pooled[1])


@register("cross_iteration_batch_norm", aliases=("cbn", "cross_iteration_bn"), contrib=True)
class CrossIterationBatchNorm(RecentBatchesNorm):
    r"""Batch norm over the examples of the last few iterations together.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta, \qquad
              \mu = \tfrac1k \sum_{i<k} \mu_{t-i}, \quad
              \sigma^2 = \tfrac1k \sum_{i<k} \max(\nu_{t-i}, \mu_{t-i}^2) - \mu^2

    with the mean :math:`\mu_{t-i}` and the second moment :math:`\nu_{t-i}` of each batch; gradients flow through the
    current one. Evaluation uses running averages of the batches' statistics, as batch norm does. Computed as the mean
    of :math:`\sigma_{t-i}^2 + (\mu_{t-i}-\mu)^2`, which is the same without its cancellation.

    Args:
        num_features: number of channels ``C``.
        window: :math:`k`, the number of batches, the current one included.
        burn_in: batches of plain batch norm at the start.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` and :math:`\beta`.
        momentum: weight of the new value in the running averages of evaluation; ``None`` is the cumulative average.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: for options that are out of range.
        NormzooError: in training, when a channel has a single value.

    Example:
        >>> CrossIterationBatchNorm(8, window=3)(torch.randn(2, 8, 5)).shape
        torch.Size([2, 8, 5])

    Deviations:
        The paper corrects the statistics of earlier iterations to first order for the change of the preceding
        layer's weights. A norm does not see these; here the correction is left out, which is the paper's naive CBN:
        good as far as the weights move slowly. A window that is not yet full is used as far as it goes; the authors'
        code waits for it, and divides by :math:`\sqrt{\sigma^2} + \varepsilon`.

    Reference:
        Yao, Cao, Zheng, Huang and Lin 2020, Cross-Iteration Batch Normalization, arXiv 2002.05712.
    """

    paper = Paper("Yao et al.", 2020, "Cross-Iteration Batch Normalization", "2002.05712")

    def __init__(
        self,
        num_features: int,
        *,
        window: int = 8,
        burn_in: int = 0,
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
        if not isinstance(burn_in, int) or burn_in < 0:
            raise OptionError(f"cross_iteration_batch_norm with burn_in={burn_in!r}; expected a number of batches")
        self.burn_in = burn_in
        self.set_up(window, 1.0)
        self._shown |= {"window": window} | ({"burn_in": burn_in} if burn_in else {})

    def statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of all batches in the window; the current one is counted into the running averages."""
        if self.evaluates:
            return super().statistics(x, mask)
        batch, number = moments(x, mask, BATCH), total(x, mask)
        means, variances = self.window_with(batch)
        pooled = self.pool(means, variances, self.there(self.burn_in))
        self.track(
            number,
            {"running_mean": batch[0].flatten(), "running_var": unbiased(batch[1].flatten(), number)},
            {"memory_mean": means, "memory_var": variances},
        )
        return column(pooled[0]), column(pooled[1])


@register("virtual_batch_norm", aliases=("vbn", "virtual_bn"))
class VirtualBatchNorm(BatchFormulaNorm):
    r"""Standardise each sample by a reference batch, chosen once, with the sample itself added to it.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta, \qquad
              \mu = (1-w)\,\mu_R + w\,\mu_b, \quad
              \sigma^2 = (1-w)\,\sigma_R^2 + w\,\sigma_b^2 + w(1-w)(\mu_R-\mu_b)^2, \quad w = \frac{1}{R+1}

    with the moments of the :math:`R` samples of the reference and those of the sample over its positions; training and
    evaluation are the same. The reference is the first batch seen in training, standardised by its own moments, or
    what passes in training mode within :func:`capture_reference`. Until there is one, evaluation takes mean 0 and
    variance 1.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` and :math:`\beta`.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        NormzooError: for a reference whose channels have a single value.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 8), VirtualBatchNorm(8))
        >>> with torch.no_grad(), capture_reference(model):
        ...     _ = model(torch.randn(64, 3))
        >>> model(torch.randn(1, 3)).shape
        torch.Size([1, 8])

    Deviations:
        The paper passes the reference through the net with the present weights at every step, and gradients through
        its moments: call :func:`capture_reference` before each step for the former; the moments are constants here.
        Computed without the cancellation of raw second moments.

    Reference:
        Salimans, Goodfellow, Zaremba, Cheung, Radford and Chen 2016, Improved Techniques for Training GANs,
        arXiv 1606.03498, section 3.5.
    """

    paper = Paper("Salimans et al.", 2016, "Improved Techniques for Training GANs", "1606.03498")

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
        super().__init__(num_features, eps=eps, affine=affine, channel_dim=channel_dim, device=device, dtype=dtype)
        self.buffer("reference_mean", 0.0, num_features)
        self.buffer("reference_var", 1.0, num_features)
        self.buffer("reference_samples", 0.0, 1)  # torch.compile forgets to write a scalar
        self.drop("running_mean", "running_var")
        self.remember("reference_mean", "reference_var", "reference_samples", "num_batches_tracked")
        self.capturing = False
        self._shown = {"eps": self.eps}

    @property
    def traits(self) -> Traits:
        """Samples meet in the reference batch only; a sample's positions share its statistics."""
        return Traits(batch_dependent=True, causal=False, causal_in_training=False, stateful=True)

    def population(self) -> Moments:
        """The moments of the reference batch."""
        return Moments(self.recall("reference_mean"), self.recall("reference_var"), 1.0)

    def check_count(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> None:
        """Refuse a reference with a single value for each channel."""
        if self.capturing:
            super().check_count(x, mask, channels_last)

    def statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the reference with each sample, ``(b, c, 1)``; in its own pass, of the reference, ``(1, c, 1)``."""
        reference = column(self.recall("reference_mean")), column(self.recall("reference_var"))
        samples = self.recall("reference_samples")
        # a sample of which nothing is real, and any while there is no reference, adds nothing
        weight = torch.where(samples > 0, 1 / (samples + 1), 0)
        mean, var = blend(reference, moments(x, mask, SAMPLE), weight)
        if not self.training:
            return mean, var
        capture = (samples == 0) | self.capturing  # a tensor: a graph has no branch that depends on data
        batch = moments(x, mask, BATCH)
        present = torch.full_like(samples, len(x)) if mask is None else mask.any(2).sum().view(1)
        news = {"reference_mean": batch[0], "reference_var": batch[1], "reference_samples": present.to(samples.dtype)}
        self.track(
            total(x, mask),
            {},
            {name: torch.where(capture.view(()), new, self.recall(name).view(new.shape)) for name, new in news.items()},
        )
        return torch.where(capture, batch[0], mean), torch.where(capture, batch[1], var)


@contextmanager
def capture_reference(model: nn.Module) -> Iterator[None]:
    """Let all of a model's virtual batch norms take what passes in training mode for their reference batch.

    Raises:
        NormzooError: when the model has no virtual batch norm.
    """
    norms = [module for module in model.modules() if isinstance(module, VirtualBatchNorm)]
    if not norms:
        raise NormzooError(f"{type(model).__name__} has no virtual_batch_norm that could take a reference batch")
    for norm in norms:
        norm.capturing = True
    try:
        yield
    finally:
        for norm in norms:
            norm.capturing = False
