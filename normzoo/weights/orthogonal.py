"""Weight norms that make filters orthogonal."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.layers.base import Paper
from normzoo.weights.base import Filters, Reparametrization, centred, checked_iterations, checked_positive
from normzoo.weights.registry import register_weight_norm


@register_weight_norm("orthogonal_norm", aliases=("oni", "orthogonal_weight_norm"))
class OrthogonalNorm(Reparametrization):
    r"""Make the filters orthogonal, by Newton's iteration: a controllable part of the way with few iterations.

    .. math:: V = \frac{Z}{\sqrt{\lVert ZZ^\top \rVert_F}}, \qquad S = VV^\top, \qquad B_0 = I, \qquad
              B_t = \tfrac32 B_{t-1} - \tfrac12 B_{t-1}^3 S, \qquad W = a B_T V

    where the rows of :math:`Z` are the filters, centred. Each iteration brings the singular values of :math:`W` nearer
    to :math:`a`: in the end :math:`WW^\top = a^2 I`. A matrix with more rows than columns gets orthogonal columns
    instead. Centring takes one direction away: of :math:`d` weights a filter, at most :math:`d - 1` filters can be
    orthogonal.

    Args:
        filters: the shape of the weights.
        iterations: :math:`T`. Small singular values grow by at most 1.5 in each.
        centred: subtract the mean of each filter first.
        scale: :math:`a`; the paper has :math:`\sqrt 2` in networks with ReLU and without batch norm.

    Shape:
        Weights of any layer to the same. The groups of a convolution are made orthogonal each by itself.

    Raises:
        NormzooError: when applied to weights with a filter of zeros or, centred, a constant one.
        OptionError: for iterations that are not a positive whole number, or a scale that is not positive.

    Example:
        >>> from normzoo.weights import apply_weight_norm
        >>> w = apply_weight_norm(torch.nn.Linear(32, 3), "orthogonal_norm(iterations=12)").weight
        >>> (w @ w.T).round(decimals=3).abs().detach()
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])

    Deviations:
        :math:`B_t S` is iterated beside :math:`B_t`, which is the same but for rounding: with many iterations the
        paper's form, which is the authors' code, blows up. That code adds :math:`10^{-5}` to the diagonal of
        :math:`ZZ^\top`. For more rows than columns it does not divide :math:`S` by its norm, so that iterations do not
        converge to orthogonal columns; here they do. Its ``norm_groups``, blocks of filters that are made orthogonal
        each by itself, are left out.

    Reference:
        Huang, Liu, Zhu, Wan, Yuan, Li, Shao 2020, Controllable Orthogonalization in Training DNNs, arXiv 2004.00917.
    """

    paper = Paper("Huang et al.", 2020, "Controllable Orthogonalization in Training DNNs", "2004.00917")

    def __init__(self, filters: Filters, *, iterations: int = 5, centred: bool = True, scale: float = 1.0) -> None:
        super().__init__(filters)
        self.iterations = checked_iterations(iterations)
        self.centred = centred
        self.scale = checked_positive("scale", scale)

    def formula(self, rows: Tensor) -> Tensor:
        """Bound, iterate."""
        z = centred(rows) if self.centred else rows
        tall = z.shape[-2] > z.shape[-1]
        z = z.mT if tall else z
        s = z @ z.mT
        size = s.square().sum((-2, -1), keepdim=True).clamp(min=torch.finfo(s.dtype).tiny).sqrt()
        v, s = z * torch.rsqrt(size), s / size
        one = torch.eye(s.shape[-1], device=s.device, dtype=s.dtype)
        b, bs = one.expand_as(s), s
        for _ in range(
            self.iterations
        ):  # B S goes along as a matrix of its own: B alone loses S to rounding, and blows up
            step = 1.5 * one - 0.5 * (b @ bs)
            b, bs = step @ b, bs @ step
        w = self.scale * (b @ v)
        return w.mT if tall else w

    def extra_repr(self) -> str:
        """Shape and iterations."""
        return f"{self.filters.outputs} x {self.filters.fan_in}, iterations={self.iterations}"
