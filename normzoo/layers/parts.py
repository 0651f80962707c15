"""What several norms share beyond the contract: moments with a mask, formulas of batch statistics, safe roots."""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from normzoo.layers.base import FormulaNorm, MomentNorm, Traits, world_size
from normzoo.ops import Moments, wide
from normzoo.ops.cells import cellwise, pool
from normzoo.ops.sync import merge

BATCH = (0, 2)
"""Samples and positions of ``(b, c, s)``: a statistic for each channel."""

SAMPLE = (2,)
"""Positions of ``(b, c, s)``: a statistic for each channel of each sample."""

PER_POSITION = Traits(batch_dependent=False, causal=True, causal_in_training=True)
"""Each position by itself, nothing invariant."""

PER_POSITION_SCALED = Traits(batch_dependent=False, causal=True, causal_in_training=True, scale_invariant=True)
"""Each position by itself, divided by its size."""


def number(x: Tensor, mask: Tensor | None, dims: tuple[int, ...]) -> Tensor | float:
    """How many real elements ``x`` has along ``dims``: a number, or a tensor where a mask decides, which broadcasts.

    >>> number(torch.ones(2, 3, 4), None, BATCH), number(torch.ones(2, 3, 4), torch.ones(2, 1, 4).bool(), BATCH)
    (8, tensor([[[8.]]]))
    """
    if mask is None:
        return math.prod([x.shape[dim] for dim in dims])
    repeated = math.prod([x.shape[dim] if mask.shape[dim] == 1 else 1 for dim in dims])
    return mask.to(x.dtype).sum(dims, keepdim=True) * repeated


def at_least_one(count: Tensor | float) -> Tensor | float:
    """A count to divide by."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def total(x: Tensor, mask: Tensor | None) -> Tensor | float:
    """How many real elements a channel of ``(b, c, s)`` has: a number, or a tensor of one where there is a mask."""
    count = number(x, mask, BATCH)
    return count.flatten() if isinstance(count, Tensor) else count


def mean(x: Tensor, mask: Tensor | None, dims: tuple[int, ...]) -> Tensor:
    """Mean of the real elements along ``dims``, which stay as ones; zero where there are none."""
    real = x if mask is None else torch.where(mask, x, 0)
    return real.sum(dims, keepdim=True) / at_least_one(number(x, mask, dims))


def moments(x: Tensor, mask: Tensor | None, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the real elements along ``dims``, in two passes.

    >>> mu, var = moments(torch.tensor([[[1.0, 3.0, 0.0]]]), torch.tensor([[[True, True, False]]]), SAMPLE)
    >>> mu.item(), var.item()
    (2.0, 1.0)
    """
    mu = mean(x, mask, dims)
    return mu, mean((x - mu).square(), mask, dims)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at zero is zero instead of infinite."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).sqrt()


def column(x: Tensor) -> Tensor:
    """A value for each channel, ``(c,)``, as it meets ``(b, c, s)``: ``(1, c, 1)``, in float32 at least."""
    return wide(x).view(1, -1, 1)


def gate_weights(
    *shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> nn.Parameter:
    """Normal numbers over the root of the last size: random, for gates that must differ, yet the same in any process.

    >>> torch.equal(gate_weights(2, 8), gate_weights(2, 8))
    True
    """
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / shape[-1] ** 0.5
    return nn.Parameter(values.to(device=device, dtype=dtype or torch.get_default_dtype()))


class WholeFormulaNorm(FormulaNorm):
    """A formula norm whose formula holds its parameters too, for a gain and shift that are not last and plain."""

    def rescale(self, z: Tensor) -> Tensor:
        """The formula has done it."""
        return z


class BatchFormulaNorm(FormulaNorm, MomentNorm):
    r"""A norm of batch statistics whose author writes its formula on ``(b, c, s)``.

    .. math:: y = \gamma \frac{x - m}{\sqrt{v + \varepsilon}} + \beta

    A subclass says how the centre :math:`m` and the squared scale :math:`v` of a batch are measured
    (:meth:`measure`), or writes another formula over :meth:`statistics`. The formula gets float32 or wider, as in
    :class:`~normzoo.layers.base.FormulaNorm`; the running statistics are those of
    :class:`~normzoo.layers.base.MomentNorm`.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to the squared scale.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``) for each channel.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        sync: take mean and variance over all processes of ``torch.distributed``; only for a norm that measures these.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.
    """

    moments = "b c s -> c"

    unused: ClassVar[tuple[str, ...]] = ()
    """Running statistics that the formula does without."""

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
        MomentNorm.__init__(
            self, num_features, eps=eps, affine=affine, momentum=momentum, track_running_stats=track_running_stats,
            sync=sync, channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.drop(*self.unused)

    @property
    def synchronizable(self) -> bool:
        """Where the norm has the option; the statistics of others are those of this process."""
        return "sync" in inspect.signature(type(self)).parameters

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Bring the input to the formula, and its result back."""
        if not self.evaluates:
            self.check_count(x, mask, channels_last)
        return super().normalize(x, mask, channels_last)

    def measure(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Centre and squared scale of a batch ``(b, c, s)``, each ``(1, c, 1)``, differentiable."""
        return moments(x, mask, BATCH)

    def statistics(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The batch's centre and squared scale, which are counted, in training; the running ones in evaluation."""
        if self.evaluates:
            centre, squared_scale, _ = self.population()
            return column(centre), column(squared_scale)
        centre, squared_scale = self.measure(x, mask)
        count = total(x, mask)
        if self.sync and self.training and world_size(self.process_group) > 1:
            here = count.view(1, 1, 1) if isinstance(count, Tensor) else count
            centre, squared_scale, counts = merge(centre, squared_scale, here, self.process_group)
            count = counts.flatten()
        self.update(Moments(centre.detach().flatten(), squared_scale.detach().flatten(), count))
        return centre, squared_scale

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Subtract the centre and divide by the scale."""
        centre, squared_scale = self.statistics(x, mask)
        return (x - centre) * torch.rsqrt(squared_scale + self.eps)

    def buffer(self, name: str, value: float, *shape: int) -> None:
        """Register a constant buffer beside the running variance, with its dtype and device."""
        assert self.running_var is not None
        self.register_buffer(name, self.running_var.new_full(shape, value))

    def drop(self, *names: str) -> None:
        """Make running statistics that this norm has not a plain ``None``: torch.export trips over empty buffers."""
        for name in names:
            delattr(self, name)
            setattr(self, name, None)

    def reset_running_stats(self) -> None:
        """Forget the running statistics: variances and scales become one, all else zero."""
        for name, buffer in self.named_buffers(recurse=False):
            buffer.fill_(1 if name.endswith(("var", "scale")) else 0)

    def extra_repr(self) -> str:
        """The options that differ from their defaults, and the choices that were made."""
        return MomentNorm.extra_repr(self)


class CellNorm(FormulaNorm):
    r"""A norm that centres, scales and shifts each channel of each sample as the moments of these say.

    .. math:: y = \gamma_c \big((x - m_{bc})\, a_{bc} + h_{bc}\big) + \beta_c

    A subclass gives the coefficients, and the tensors in them that are learned; :func:`~normzoo.ops.cells.cellwise`
    does the rest, by compiled kernels where there are any.
    """

    @abstractmethod
    def coefficients(self, own: Moments, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """Centre, scale and shift from the moments of each sample over positions, each ``(b, c, 1)``."""

    def tensors(self) -> tuple[Tensor, ...]:
        """What :meth:`coefficients` gets besides: all tensors in it that may need a gradient."""
        return ()

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Measure and rescale."""
        return cellwise(
            x, mask, channels_last, self.coefficients, self.tensors(), weight=self.weight, bias=self.bias
        )[0]  # fmt: skip

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The norm without its affine part."""
        return cellwise(x, None if mask is None else mask.squeeze(1), False, self.coefficients, self.tensors())[0]


class BatchCellNorm(BatchFormulaNorm):
    r"""A norm as :class:`CellNorm` whose coefficients know the moments of the batch as well, or the running ones."""

    @abstractmethod
    def coefficients(
        self, own: Moments, batch: Moments, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | float]:  # fmt: skip
        """Centre, scale and shift from the moments of each sample, ``(b, c, 1)``, and of the batch, ``(1, c, 1)``."""

    def tensors(self) -> tuple[Tensor, ...]:
        """What :meth:`coefficients` gets besides: all tensors in it that may need a gradient."""
        return ()

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Measure, rescale and count the batch."""
        if not self.evaluates:
            self.check_count(x, mask, channels_last)
        return self._count(x, mask, channels_last, self.weight, self.bias)

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The norm without its affine part."""
        return self._count(x, None if mask is None else mask.squeeze(1), False, None, None)

    def _count(
        self, x: Tensor, mask: Tensor | None, channels_last: bool, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        running = self._running() if self.evaluates else None
        y, (mean, var, number) = self.measured(x, mask, channels_last, weight, bias, running)
        if self.counts:
            number = number.flatten() if isinstance(number, Tensor) else number
            self.update(Moments(mean.detach().flatten(), var.detach().flatten(), number))
        return y

    def measured(
        self, x: Tensor, mask: Tensor | None, channels_last: bool, weight: Tensor | None, bias: Tensor | None,
        running: Moments | None,
    ) -> tuple[Tensor, Moments]:  # fmt: skip
        """The output, and the moments of the batch that it was normalised by: the running ones where there are."""
        batches = []

        def coefficients(own: Moments, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
            batch = running or self._batch(own)
            if not batches:  # a second derivative comes here again
                batches.append(batch)
            return self.coefficients(own, batch, *tensors)

        y, _ = cellwise(x, mask, channels_last, coefficients, self.tensors(), weight=weight, bias=bias)
        return y, batches[0]

    def _running(self) -> Moments:
        centre, squared_scale, number = self.population()
        return Moments(column(centre), column(squared_scale), number)

    def _batch(self, own: Moments) -> Moments:
        batch = pool(own, 0)
        if self.sync and self.training and world_size(self.process_group) > 1:
            return Moments(*merge(*batch, self.process_group))
        return batch


class HistoryNorm(BatchFormulaNorm):
    """A norm of batch statistics in which earlier batches take part: abstract."""

    @property
    def traits(self) -> Traits:
        """Those of batch norm without its invariances: earlier batches had another mean and scale."""
        return Traits(batch_dependent=True, causal=True, causal_in_training=False, stateful=True)
