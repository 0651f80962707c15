"""Norms with several sets of batch statistics, one for each mode of the data."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor, nn

from normzoo.errors import OptionError
from normzoo.layers.base import Paper, Traits
from normzoo.layers.parts import (
    BATCH,
    SAMPLE,
    BatchFormulaNorm,
    at_least_one,
    gate_weights,
    moments,
    number,
    total,
    wide,
)
from normzoo.ops import Moments
from normzoo.registry import register


@register("mode_norm", aliases=("mode_normalization",))
class ModeNorm(BatchFormulaNorm):
    r"""Standardise by the moments of several modes, to which a gate assigns each sample in shares.

    .. math:: y = \gamma_c \sum_k g_{b,k} \frac{x - \mu_{k,c}}{\sqrt{\sigma_{k,c}^2 + \varepsilon}} + \beta_c, \qquad
              g_b = \operatorname{softmax}\big(W \operatorname{mean}_s x + w\big)

    The moments of mode :math:`k` are those of the batch (samples and positions), each sample weighed by its share
    :math:`g_{b,k}`; in evaluation they are running averages, buffers of shape ``(modes, C)``. One mode is
    ``batch_norm``.

    Args:
        num_features: number of channels ``C``.
        modes: number of modes; the paper finds two enough.
        eps: :math:`\varepsilon`, added to the variances.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``); the gate (``gate_weight``, random but
            always alike, and ``gate_bias``, zero) is learned in any case.
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when ``modes`` is no positive whole number.
        NormzooError: in training, for one sample with one position.

    Example:
        >>> norm = ModeNorm(8, modes=2)
        >>> norm(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])
        >>> norm.running_mean.shape
        torch.Size([2, 8])

    Deviations:
        The variance in the running averages is unbiased by the size of the batch, as in batch norm here.

    Reference:
        Deecke, Murray and Bilen 2018, Mode Normalization, arXiv 1810.05466.
    """

    roles = {"weight": "gain", "bias": "shift", "gate_weight": "gate", "gate_bias": "gate"}
    paper = Paper("Deecke, Murray & Bilen", 2018, "Mode Normalization", "1810.05466")

    def __init__(
        self,
        num_features: int,
        *,
        modes: int = 2,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(modes, int) or modes < 1:
            raise OptionError(f"modes={modes!r}; expected a positive whole number")
        self._modes = modes  # the shape of the running averages is wanted before the modules are set up
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, track_running_stats=track_running_stats,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.modes = modes
        self._shown |= {"modes": modes}
        self.gate_weight = gate_weights(modes, num_features, device=device, dtype=dtype)  # equal modes would stay equal
        self.gate_bias = nn.Parameter(torch.zeros(modes, device=device, dtype=dtype))

    def _population_shape(self) -> tuple[int, ...]:
        return (self._modes, self.num_features)

    @property
    def traits(self) -> Traits:
        """The gate sees the whole sample, and its scale."""
        single = self.modes == 1
        return Traits(
            batch_dependent=True,
            causal=single and self.track_running_stats,
            causal_in_training=False,
            stateful=self.track_running_stats,
            scale_invariant=single,
            shift_invariant=single,
        )

    def gates(self, mean: Tensor) -> Tensor:
        """The share of each mode, ``(b, k)``, from the means of a sample over positions, ``(b, c)``."""
        # products and sums in place of matrix products, which autocast would round, in the backward pass too
        logits = (mean.unsqueeze(1) * wide(self.gate_weight)).sum(2) + wide(self.gate_bias)
        return logits.to(mean.dtype).softmax(1)

    def mode_moments(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The gates, ``(b, k)``, and the mean and variance of each mode, ``(k, c)``."""
        own_mean, own_var = (moment.flatten(1) for moment in moments(x, mask, SAMPLE))
        gates = self.gates(own_mean)
        if self.evaluates:
            mu, var, _ = self.population()
            return gates, mu, var
        count = number(x, mask, SAMPLE)
        mass = gates * (count[:, 0] if isinstance(count, Tensor) else at_least_one(count))
        share = (mass / mass.sum(0).clamp(min=torch.finfo(x.dtype).tiny)).unsqueeze(2)
        mu = (share * own_mean.unsqueeze(1)).sum(0)
        var = (share * (own_var.unsqueeze(1) + (own_mean.unsqueeze(1) - mu).square())).sum(0)
        self.update(Moments(mu.detach(), var.detach(), total(x, mask)))
        return gates, mu, var

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Standardise by each mode, in the shares of each sample."""
        gates, mu, var = self.mode_moments(x, mask)
        inverse = torch.rsqrt(var + self.eps)
        y = torch.zeros_like(x)
        for k in range(self.modes):
            y = y + gates[:, k, None, None] * ((x - mu[k, :, None]) * inverse[k, :, None])
        return y


@register("mixture_norm", aliases=("mixture_normalization",), contrib=True)
class MixtureNorm(BatchFormulaNorm):
    r"""Standardise by the components of a Gaussian mixture that is fitted to the batch.

    .. math:: y = \gamma_c \sum_k \frac{p_k(x)}{\sqrt{\lambda_k}}
              \frac{x - \mu_{k,c}}{\sqrt{\sigma_{k,c}^2 + \varepsilon}} + \beta_c, \qquad
              p_k(x) = \frac{\lambda_k N(x; \mu_k, \sigma_k^2)}{\sum_j \lambda_j N(x; \mu_j, \sigma_j^2)}

    Each position of each sample is a point in ``C`` dimensions with responsibilities :math:`p_k`, which are constants
    for the gradient; :math:`\mu_k, \sigma_k^2` are the moments of the batch weighed by them, :math:`\lambda_k` is
    their mean. In evaluation all three are running averages. One component is ``batch_norm``.

    Args:
        num_features: number of channels ``C``.
        components: number of components.
        iterations: steps of expectation maximisation for each batch.
        eps: :math:`\varepsilon`, added to the variances.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``).
        momentum: weight of the new value in the running averages; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same.

    Raises:
        OptionError: when ``components`` or ``iterations`` is no positive whole number.
        NormzooError: in training, for one sample with one position.

    Example:
        >>> MixtureNorm(8, components=3)(torch.randn(4, 8, 5, 5)).shape
        torch.Size([4, 8, 5, 5])

    Deviations:
        The paper starts from random seeds (k-means++) on a part of the batch. Here the components start along the
        diagonal, at quantiles of a normal distribution with the moments of the batch: no random numbers, and a
        component is the same one from batch to batch, which the running averages need.
        The fit itself takes no part in the gradient.

    Reference:
        Kalayeh and Shah 2018, Training Faster by Separating Modes of Variation in Batch-normalized Models,
        arXiv 1806.02892.
    """

    expected_failures = {
        name: "the responsibilities are constants for the gradient" for name in ("gradcheck", "gradgradcheck")
    }
    running_weight: Tensor | None
    paper = Paper("Kalayeh & Shah", 2018, "Training Faster by Separating Modes of Variation", "1806.02892")

    def __init__(
        self,
        num_features: int,
        *,
        components: int = 2,
        iterations: int = 3,
        eps: float = 1e-5,
        affine: bool = True,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in {"components": components, "iterations": iterations}.items():
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"{name}={value!r}; expected a positive whole number")
        self._components = components  # the shape of the running averages is wanted before the modules are set up
        super().__init__(
            num_features, eps=eps, affine=affine, momentum=momentum, track_running_stats=track_running_stats,
            channel_dim=channel_dim, device=device, dtype=dtype,
        )  # fmt: skip
        self.components, self.iterations = components, iterations
        self.places = [NormalDist().inv_cdf((k + 0.5) / components) for k in range(components)]
        self._shown |= {"components": components, "iterations": iterations}
        if track_running_stats:
            self.buffer("running_weight", 1 / components, components)
        else:
            self.running_weight = None

    def _population_shape(self) -> tuple[int, ...]:
        return (self._components, self.num_features)

    @property
    def traits(self) -> Traits:
        """A fit that moves and grows with the data."""
        return Traits(
            batch_dependent=True,
            causal=self.track_running_stats,
            causal_in_training=False,
            stateful=self.track_running_stats,
            scale_invariant=True,
            shift_invariant=True,
        )

    def responsibilities(self, x: Tensor, weight: Tensor, mu: Tensor, var: Tensor) -> Tensor:
        """:math:`p_k(x)` as ``(k, b, 1, s)`` from ``(k)``, ``(k, c)`` and ``(k, c)``."""
        spread = (var + self.eps).unsqueeze(2)
        scores = [
            weight[k].clamp(min=torch.finfo(x.dtype).tiny).log()
            - 0.5 * (spread[k].log() + (x - mu[k].unsqueeze(1)).square() / spread[k]).sum(1, keepdim=True)
            for k in range(self.components)
        ]
        return torch.stack(scores).softmax(0)

    def component_moments(self, x: Tensor, mask: Tensor | None, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many points each component has, ``(k)``, and its mean and variance, ``(k, c)``."""
        p = p if mask is None else torch.where(mask, p, 0)
        mass = p.sum((1, 2, 3))
        share = p / mass.clamp(min=torch.finfo(x.dtype).tiny).view(-1, 1, 1, 1)
        mu = torch.stack([(q * x).sum((0, 2)) for q in share])
        var = torch.stack([(q * (x - m.unsqueeze(1)).square()).sum((0, 2)) for q, m in zip(share, mu, strict=True)])
        return mass, mu, var

    @torch.no_grad()
    def fit(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Responsibilities of the components for ``(b, c, s)``, by expectation maximisation."""
        mean, whole = moments(x, mask, BATCH)
        mu = torch.stack([(mean + place * whole.sqrt()).flatten() for place in self.places])
        var = whole.flatten().expand_as(mu)
        weight = x.new_full((self.components,), 1 / self.components)
        for _ in range(self.iterations - 1):
            mass, mu, var = self.component_moments(x, mask, self.responsibilities(x, weight, mu, var))
            weight = mass / mass.sum().clamp(min=1)
        return self.responsibilities(x, weight, mu, var)

    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Standardise by each component, by its responsibility."""
        if self.evaluates:
            population = self.population()
            weight, mu, var = (t.to(x.dtype) for t in (self.recall("running_weight"), population.mean, population.var))
            with torch.no_grad():
                p = self.responsibilities(x, weight, mu, var)
        else:
            p = self.fit(x, mask)
            mass, mu, var = self.component_moments(x, mask, p)
            weight = mass / mass.sum().clamp(min=1)
            self.update(Moments(mu.detach(), var.detach(), mass.unsqueeze(1).expand_as(var)))
        scale = torch.rsqrt(weight.clamp(min=torch.finfo(x.dtype).eps))
        inverse = torch.rsqrt(var + self.eps)
        y = torch.zeros_like(x)
        for k in range(self.components):
            y = y + (p[k] * scale[k]) * ((x - mu[k].unsqueeze(1)) * inverse[k].unsqueeze(1))
        return y

    @torch.no_grad()
    def update(self, moments: Moments) -> None:
        """Count a training batch into the running averages, the weights of the components among them."""
        super().update(moments)
        if not self.counts:
            return
        assert self.running_weight is not None
        assert isinstance(moments.number, Tensor)
        mass = moments.number[:, 0].to(self.running_weight.dtype)
        whole = mass.sum()
        self.running_weight.lerp_(
            mass / whole.clamp(min=1), self.latest_weight(mass.dtype) * (whole > 0).to(mass.dtype)
        )

    def reset_running_stats(self) -> None:
        """Forget the running averages."""
        super().reset_running_stats()
        if self.running_weight is not None:
            self.running_weight.fill_(1 / self.components)
