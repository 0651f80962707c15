"""What several norms share beyond the contract: moments with a mask, parameters inside the formula, safe roots."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from normzoo import ops
from normzoo.errors import NormzooError
from normzoo.layers.base import FormulaNorm, MomentNorm, Traits, through_formula, world_size
from normzoo.ops import Moments, wide
from normzoo.ops.sync import merge

PER_POSITION = Traits(batch_dependent=False, causal=True, causal_in_training=True)
"""Each position by itself, nothing invariant."""

PER_POSITION_SCALED = Traits(batch_dependent=False, causal=True, causal_in_training=True, scale_invariant=True)
"""Each position by itself, divided by its size."""


def number(x: Tensor, mask: Tensor | None, dims: tuple[int, ...]) -> Tensor | float:
    """How many real elements ``(b, c, s)`` has along ``dims``, as a float, or a tensor where a mask decides."""
    if mask is not None:
        return mask.expand_as(x).to(x.dtype).sum(dims, keepdim=True)
    count = 1
    for dim in dims:
        count *= x.shape[dim]
    return float(count)


def at_least_one(count: Tensor | float) -> Tensor | float:
    """A count to divide by."""
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1.0)


def mean(x: Tensor, mask: Tensor | None, dims: tuple[int, ...]) -> Tensor:
    """Mean of the real elements along ``dims``; masked ones must be zero already, as in a formula they are."""
    return x.sum(dims, keepdim=True) / at_least_one(number(x, mask, dims))


def moments(x: Tensor, mask: Tensor | None, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the real elements along ``dims``, in two passes.

    >>> mu, var = moments(torch.tensor([[[1.0, 3.0, 0.0]]]), torch.tensor([[[True, True, False]]]), (2,))
    >>> mu.item(), var.item()
    (2.0, 1.0)
    """
    mu = mean(x, mask, dims)
    deviation = x - mu if mask is None else torch.where(mask, x - mu, 0)
    return mu, mean(deviation.square(), mask, dims)


def safe_sqrt(x: Tensor) -> Tensor:
    """Square root whose gradient at zero is zero instead of infinite."""
    return x.clamp(min=torch.finfo(x.dtype).tiny).sqrt()


def column(parameter: Tensor) -> Tensor:
    """A parameter for each channel, as it meets ``(b, c, s)``: in float32 at least."""
    return wide(parameter).view(-1, 1)


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


class StatefulFormulaNorm(MomentNorm):
    """A formula norm with running averages: abstract. Gain and shift for each channel follow the formula."""

    moments = "b c s -> c"

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

    @abstractmethod
    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The norm without its affine part: ``x`` is ``(b, c, s)``, ``mask`` is ``(b, 1, s)`` or ``None``."""

    def check_count(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> None:
        """Refuse a batch with a single value for each channel, whose variance is zero whatever the input."""
        if mask is None and not self.sync and x.numel() == self.num_features:
            raise NormzooError(
                f"{type(self).__name__} got one value per channel, from a batch of one sample with one position: the "
                "variance of the batch is zero whatever the input. Use larger batches or feature maps (drop_last=True "
                "for a last batch of one), or a norm without batch statistics (layer_norm, group_norm)"
            )

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Bring the input to the formula, and its result back."""
        if self.training or not self.track_running_stats:
            self.check_count(x, mask, channels_last)
        return through_formula(
            x, mask, channels_last,
            lambda z, real: ops.affine(self.formula(z, real), self.weight, self.bias, channels_last=False),
        )  # fmt: skip


class BatchFormulaNorm(StatefulFormulaNorm):
    r"""A norm that mixes batch statistics with something else: abstract.

    The moments of the batch, :math:`\mu_c` and :math:`\sigma_c^2` (biased), come as differentiable tensors of shape
    ``(1, c, 1)``, synchronised and counted into the running averages; in evaluation the running averages come in
    their place.
    """

    @abstractmethod
    def combine(self, x: Tensor, mask: Tensor | None, mu: Tensor, var: Tensor) -> Tensor:
        """The norm without its affine part, from the moments of the batch."""

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Find the moments, then combine."""
        return self.combine(x, mask, *self.batch_moments(x, mask))

    def batch_moments(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The moments of the batch, counted into the running averages in training; else these averages."""
        if self.track_running_stats and not self.training:
            # copies: a later training step writes into the buffers, which a backward pass may still need
            population = self.population()
            return population.mean.clone().view(1, -1, 1), population.var.clone().view(1, -1, 1)
        count = number(x, mask, (0, 2))
        mu, var = moments(x, mask, (0, 2))
        if isinstance(count, Tensor):
            count = count.expand_as(mu)
        if self.sync and self.training and world_size(self.process_group) > 1:
            mu, var, count = merge(mu, var, count, self.process_group)
        seen = count.detach().flatten() if isinstance(count, Tensor) else torch.full_like(var[0, :, 0], count)
        self.update(Moments(mu.detach().flatten(), var.detach().flatten(), seen))
        return mu, var
