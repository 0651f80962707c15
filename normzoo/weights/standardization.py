"""Weight norms that standardise each filter: weight standardization and its scaled form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from normzoo.errors import OptionError, unknown
from normzoo.layers.base import Paper
from normzoo.weights.base import Filters, Reparametrization, centred, checked_positive
from normzoo.weights.registry import register_weight_norm


@register_weight_norm("weight_standardization", aliases=("ws",))
class WeightStandardization(Reparametrization):
    r"""Give the weights of each filter mean zero and variance one.

    .. math:: \hat W_{i} = \frac{W_{i} - \mu_i}{\sigma_i}, \qquad
              \sigma_i = \sqrt{\tfrac1N \sum_j (W_{ij} - \mu_i)^2 + \varepsilon}

    for each output, over its :math:`N` weights. A normalization of activations is meant to follow: the scale of the
    output grows with :math:`\sqrt N`.

    Args:
        filters: the shape of the weights.
        eps: :math:`\varepsilon`.
        variant: ``"official"`` divides by the unbiased standard deviation plus :math:`\varepsilon`, as the authors'
            code does.

    Shape:
        Weights of any layer to the same.

    Raises:
        NormzooError: when applied to weights with a constant filter, as of a single weight.
        OptionError: for an unknown variant or a negative ``eps``.

    Example:
        >>> from normzoo.weights import apply_weight_norm
        >>> w = apply_weight_norm(torch.nn.Conv2d(8, 2, 3), "weight_standardization(eps=1e-10)").weight
        >>> w.flatten(1).std(1, correction=0).round(decimals=3).tolist()
        [1.0, 1.0]

    Deviations:
        Of the authors' code, see ``variant``; this is the paper's formula.

    Reference:
        Qiao, Wang, Liu, Shen, Yuille 2019, Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, arXiv 1903.10520.
    """

    paper = Paper(
        "Qiao et al.", 2019,
        "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", "1903.10520",
    )  # fmt: skip

    def __init__(self, filters: Filters, *, eps: float = 1e-5, variant: Literal["paper", "official"] = "paper") -> None:
        super().__init__(filters)
        self.eps = checked_positive("eps", eps, zero=True)
        if variant not in ("paper", "official"):
            raise OptionError(f"variant={variant!r}; expected 'paper' or 'official'")
        self.variant = variant

    def formula(self, rows: Tensor) -> Tensor:
        """Centre, divide."""
        rows = centred(rows)
        total = rows.square().sum(-1, keepdim=True)
        if self.variant == "official":
            var = total / max(self.filters.fan_in - 1, 1)
            return rows / (var.clamp(min=torch.finfo(rows.dtype).tiny).sqrt() + self.eps)
        var = total / self.filters.fan_in + self.eps
        return rows * torch.rsqrt(var.clamp(min=torch.finfo(rows.dtype).tiny))

    def extra_repr(self) -> str:
        """Shape and options."""
        variant = "" if self.variant == "paper" else f", variant={self.variant!r}"
        return f"{self.filters.outputs} x {self.filters.fan_in}, eps={self.eps}{variant}"


@register_weight_norm("scaled_weight_standardization", aliases=("sws", "scaled_ws"))
class ScaledWeightStandardization(Reparametrization):
    r"""Give each filter mean zero and a learned length, so that inputs of variance one give outputs of variance one.

    .. math:: \hat W_{i} = \gamma\, g_i \frac{W_{i} - \mu_i}{\sqrt{\max(N \sigma_i^2, \varepsilon)}}

    for each output, over its :math:`N` weights (fan-in), with a learned gain :math:`g` that starts at one. The constant
    :math:`\gamma = \mathrm{Var}[\phi(z)]^{-1/2}`, :math:`z \sim \mathcal N(0, 1)`, makes up for the activation
    :math:`\phi` before the layer: :math:`\sqrt{2 / (1 - 1/\pi)}` for ReLU. A network may have it at the activation
    instead.

    Args:
        filters: the shape of the weights.
        gain: learn :math:`g`.
        activation: name of the activation before the layer, for :math:`\gamma`; ``None`` is :math:`\gamma = 1`.
        eps: :math:`\varepsilon`.

    Shape:
        Weights of any layer to the same; the gain is ``(outputs,)``.

    Raises:
        NormzooError: when applied to weights with a constant filter, as of a single weight; for an unknown activation.
        OptionError: for a negative ``eps``.

    Example:
        >>> from normzoo.weights import apply_weight_norm
        >>> w = apply_weight_norm(torch.nn.Conv2d(8, 2, 3), "scaled_weight_standardization").weight
        >>> w.flatten(1).norm(dim=1).round(decimals=3).tolist()
        [1.0, 1.0]

    Deviations:
        None from the authors' code. For transposed convolutions with a stride, fan-in counts the whole kernel.

    Reference:
        Brock, De, Smith 2021, Characterizing signal propagation to close the performance gap in unnormalized ResNets,
        arXiv 2101.08692.
    """

    paper = Paper(
        "Brock et al.", 2021,
        "Characterizing signal propagation to close the performance gap in unnormalized ResNets", "2101.08692",
    )  # fmt: skip

    gain: Tensor | None

    def __init__(
        self, filters: Filters, *, gain: bool = True, activation: str | None = None, eps: float = 1e-4
    ) -> None:
        super().__init__(filters)
        self.eps = checked_positive("eps", eps, zero=True)
        self.activation = activation
        self.gamma = 1.0 if activation is None else activation_gain(activation)
        self.register_parameter("gain", self.per_filter() if gain else None)

    def formula(self, rows: Tensor) -> Tensor:
        """Centre, scale."""
        rows = centred(rows)
        total = rows.square().sum(-1, keepdim=True).clamp(min=max(self.eps, torch.finfo(rows.dtype).tiny))
        scale = self.gamma * torch.rsqrt(total)
        return rows * (scale if self.gain is None else scale * self.column(self.gain, rows))

    def extra_repr(self) -> str:
        """Shape and options."""
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        return f"{self.filters.outputs} x {self.filters.fan_in}, eps={self.eps}{activation}"


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "celu": F.celu,
    "elu": F.elu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "relu": F.relu,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
}


@cache
def activation_gain(activation: str) -> float:
    r"""The factor that gives an activation of standard normal values variance one.

    .. math:: \gamma = \mathrm{Var}[\phi(z)]^{-1/2}, \qquad z \sim \mathcal N(0, 1)

    >>> round(activation_gain("relu"), 4), round(activation_gain("gelu"), 4)
    (1.7129, 1.7009)

    Raises:
        NormzooError: for an unknown activation.
    """
    if activation not in ACTIVATIONS:
        raise unknown("activation", activation, ACTIVATIONS)
    return gain_of(ACTIVATIONS[activation])


def gain_of(phi: Callable[[Tensor], Tensor]) -> float:
    """:func:`activation_gain` of a function of one's own."""
    z = torch.linspace(-12, 12, 240_001, dtype=torch.float64)
    density = torch.exp(-z.square() / 2)
    density[1:-1:2] *= 4  # Simpson's rule, with kinks at 0 and 6 where its parabolas meet
    density[2:-1:2] *= 2
    density /= density.sum()
    y = phi(z)
    mean = (density * y).sum()
    return (density * (y - mean).square()).sum().rsqrt().item()
