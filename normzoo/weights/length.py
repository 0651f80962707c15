"""Weight norms that give each filter a length: weight normalization and its centred form."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.layers.base import Paper
from normzoo.weights.base import Filters, Reparametrization, centred, checked_positive, squares
from normzoo.weights.registry import register_weight_norm


@register_weight_norm("weight_norm", aliases=("wn", "weight_normalization"))
class WeightNorm(Reparametrization):
    r"""Give each filter a learned length.

    .. math:: w = g \frac{v}{\lVert v \rVert_2}

    for each output, over all its weights. The gain :math:`g` starts at :math:`\lVert v \rVert_2`, so that the layer
    does what it did; :func:`normzoo.weights.data_dependent_init` is the paper's other start.

    Shape:
        Weights of any layer to the same; the gain is ``(outputs,)``.

    Raises:
        NormzooError: when applied to weights with a filter of zeros.

    Example:
        >>> from normzoo.weights import apply_weight_norm
        >>> layer = apply_weight_norm(torch.nn.Linear(4, 2), "weight_norm")
        >>> layer.parametrizations.weight[0].gain.data = torch.tensor([1.0, 3.0])
        >>> layer.weight.norm(dim=1).round(decimals=3).tolist()
        [1.0, 3.0]

    Deviations:
        None.

    Reference:
        Salimans and Kingma 2016, Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep
        Neural Networks, arXiv 1602.07868.
    """

    paper = Paper(
        "Salimans & Kingma", 2016,
        "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural Networks",
        "1602.07868",
    )  # fmt: skip

    def __init__(self, filters: Filters) -> None:
        super().__init__(filters)
        self.gain = self.per_filter()

    def start(self, rows: Tensor) -> None:
        """The gain that changes nothing."""
        self.gain.copy_(rows.norm(dim=-1).flatten())

    def formula(self, rows: Tensor) -> Tensor:
        """Unit length, times the gain."""
        return rows * (self.column(self.gain, rows) * torch.rsqrt(squares(rows)))

    def extra_repr(self) -> str:
        """Outputs and weights of each."""
        return f"{self.filters.outputs} x {self.filters.fan_in}"


@register_weight_norm("centred_weight_norm", aliases=("centered_weight_norm", "cwn"))
class CentredWeightNorm(Reparametrization):
    r"""Centre each filter, and give it a learned length.

    .. math:: w = g \frac{v - \bar v}{\lVert v - \bar v \rVert_2}

    for each output, over all its weights: with inputs of one common mean, outputs have mean zero.

    Args:
        filters: the shape of the weights.
        scale: where the gain :math:`g` starts; ``None`` is :math:`\lVert v - \bar v \rVert_2`, for which the layer does
            what it did but for the mean of its filters.
        learned: learn the gain; otherwise it stays where it starts.

    Shape:
        Weights of any layer to the same; the gain is ``(outputs,)``.

    Raises:
        NormzooError: when applied to weights with a constant filter, as of a single weight.
        OptionError: for a scale that is not positive.

    Example:
        >>> from normzoo.weights import apply_weight_norm
        >>> w = apply_weight_norm(torch.nn.Linear(4, 2), "centred_weight_norm(scale=1.0)").weight.detach()
        >>> bool((w.sum(1).abs() < 1e-6).all()), w.norm(dim=1).round(decimals=3).tolist()
        (True, [1.0, 1.0])

    Deviations:
        The paper does not say where the gain starts. In the authors' code :math:`g` is 1.414 and fixed unless asked
        for, and :math:`10^{-5}` is added to the length: ``scale=1.414, learned=False`` is that.

    Reference:
        Huang, Liu, Liu, Lang, Tao 2017, Centered Weight Normalization in Accelerating Training of Deep Neural Networks,
        ICCV 2017.
    """

    paper = Paper(
        "Huang et al.", 2017, "Centered Weight Normalization in Accelerating Training of Deep Neural Networks",
        venue="ICCV 2017",
    )  # fmt: skip

    gain: Tensor

    def __init__(self, filters: Filters, *, scale: float | None = None, learned: bool = True) -> None:
        super().__init__(filters)
        self.scale = None if scale is None else checked_positive("scale", scale)
        gain = self.per_filter(1.0 if scale is None else scale)
        if learned:
            self.gain = gain
        else:
            self.register_buffer("gain", gain.detach())

    def start(self, rows: Tensor) -> None:
        """The gain that was asked for, or the one that changes least."""
        if self.scale is None:
            self.gain.copy_(centred(rows).norm(dim=-1).flatten())
        else:
            self.gain.fill_(self.scale)

    def formula(self, rows: Tensor) -> Tensor:
        """Centre, unit length, times the gain."""
        rows = centred(rows)
        return rows * (self.column(self.gain, rows) * torch.rsqrt(squares(rows)))

    def extra_repr(self) -> str:
        """Outputs and weights of each."""
        return f"{self.filters.outputs} x {self.filters.fan_in}"
