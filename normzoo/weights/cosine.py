"""Cosines in place of dot products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normzoo.errors import NormzooError
from normzoo.layers.base import Paper
from normzoo.ops import full_precision, wide
from normzoo.weights.base import Filters, Reparametrization, checked_positive, squares
from normzoo.weights.registry import register_weight_norm


class _Zeros(nn.Module):
    """The bias as the layer sees it, where it is added later."""

    def forward(self, bias: Tensor) -> Tensor:
        return torch.zeros_like(bias)

    def right_inverse(self, bias: Tensor) -> Tensor:
        return bias


@register_weight_norm("cosine_norm", aliases=("cosine_normalization",))
class CosineNorm(Reparametrization):
    r"""Put the cosine between a filter and what it sees in the place of their dot product.

    .. math:: y = \frac{w \cdot x}{\lVert w \rVert_2 \lVert x \rVert_2} + b

    where :math:`x` is the input of a linear map, or the patch that a filter of a convolution sees (of its group, with
    its padding). The cosine is between -1 and 1. The lengths of the filters go into the weights; those of the inputs
    divide the output, in a forward hook of the layer. So it needs the layer to be called, and cannot be removed.

    Args:
        filters: the shape of the weights.
        eps: inputs shorter than this have no direction, and cosine zero.

    Shape:
        Weights of linear maps and convolutions to the same.

    Raises:
        NormzooError: when applied to weights with a filter of zeros, a transposed convolution or a recurrent cell.
        OptionError: for ``eps`` that is not positive.

    Example:
        >>> from normzoo.weights import apply_weight_norm
        >>> layer = apply_weight_norm(torch.nn.Linear(4, 8, bias=False), "cosine_norm")
        >>> bool(layer(torch.randn(16, 4) * 1000).abs().max() <= 1 + 1e-6)
        True

    Deviations:
        The paper's formula has no bias: give the layers none, or its bias is added to the cosine.

    Reference:
        Luo, Zhan, Wang, Yang 2017, Cosine Normalization: Using Cosine Similarity Instead of Dot Product in Neural
        Networks, arXiv 1702.05870.
    """

    changes_output = True
    removable = False
    paper = Paper(
        "Luo et al.", 2017,
        "Cosine Normalization: Using Cosine Similarity Instead of Dot Product in Neural Networks", "1702.05870",
    )  # fmt: skip

    def __init__(self, filters: Filters, *, eps: float = 1e-8) -> None:
        super().__init__(filters)
        if filters.transposed:
            raise NormzooError(
                "cosine_norm got a transposed convolution, whose outputs see inputs of different number; leave it out "
                "with only="
            )
        self.eps = checked_positive("eps", eps)

    def formula(self, rows: Tensor) -> Tensor:
        """Unit length."""
        return rows * torch.rsqrt(squares(rows))

    def attach(self, layer: nn.Module) -> None:
        """Keep the bias out of what is divided."""
        if isinstance(layer.bias, nn.Parameter):
            parametrize.register_parametrization(layer, "bias", _Zeros(), unsafe=True)

    def output(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Divided by the length of the input, and the bias added."""
        with full_precision(x):
            z, total = wide(y), self._squares(layer, wide(x))
            groups = self.filters.groups
            if isinstance(layer, nn.modules.conv._ConvNd):
                channel = y.ndim - len(layer.kernel_size) - 1
                z, total = z.unflatten(channel, (groups, -1)), total.unsqueeze(channel + 1)
            seen = total > self.eps**2
            z = torch.where(seen, z * torch.rsqrt(torch.where(seen, total, 1)), 0).view(y.shape)
            if parametrize.is_parametrized(layer, "bias"):
                held: Any = layer.get_submodule("parametrizations.bias")
                bias = wide(held.original)
                z = z + (bias if isinstance(layer, nn.Linear) else bias.view(-1, *[1] * len(layer.kernel_size)))  # pyright: ignore[reportArgumentType]
        return z.to(y.dtype)

    def _squares(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The sum of squares of what each filter sees: the same layer with weights of one, once for each group."""
        if isinstance(layer, nn.Linear):
            return x.square().sum(-1, keepdim=True)
        ones = x.new_ones(self.filters.groups, *self.filters.shape[1:])
        return layer._conv_forward(x.square(), ones, None)  # pyright: ignore[reportCallIssue]

    def extra_repr(self) -> str:
        """Outputs and weights of each."""
        return f"{self.filters.outputs} x {self.filters.fan_in}"
