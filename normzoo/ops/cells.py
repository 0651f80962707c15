"""Norms whose output is linear in the input, cell by cell: one operation for all of them.

A cell is what one channel of one sample holds. Mixtures of batch, layer and instance norm, and norms with a gate that
looks at the means of a sample, differ only in what they do with the moments of the cells, which are few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normzoo import ops
from normzoo.errors import NormzooError
from normzoo.ops import Moments, Pattern, cpu, wide

Coefficients = Callable[..., tuple[Tensor, Tensor, Tensor | float]]
"""Centre, scale and shift of each cell from :class:`~normzoo.ops.Moments` of shape ``(b, c, 1)`` and other tensors."""

_AXES = Pattern.parse("b c s -> b c").code({})


def cellwise(
    x: Tensor,
    mask: Tensor | None,
    channels_last: bool,
    coefficients: Coefficients,
    tensors: Sequence[Tensor] = (),
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    centred: bool = True,
) -> tuple[Tensor, Moments]:
    r"""Centre, scale and shift each channel of each sample by what the moments of all of them say.

    .. math:: y_{bcs} = \gamma_c \big((x_{bcs} - m_{bc})\, a_{bc} + h_{bc}\big) + \beta_c, \qquad
              (m, a, h) = f(\mu, \sigma^2, \theta)

    with :math:`\mu_{bc}` and :math:`\sigma^2_{bc}` over positions. Forward and backward read the input twice, as batch
    norm does, whatever :math:`f` is.

    Args:
        x: ``(b, c, s)``, or ``(b, s, c)`` when ``channels_last``.
        mask: ``(b, s)``, true where an element is real; the others take no part and come out as zero.
        channels_last: whether the last axis is the channel.
        coefficients: :math:`f`, called with the moments in float32 or wider, each ``(b, c, 1)``, and the ``tensors``;
            what it returns broadcasts to ``(b, c, 1)``. It is called again in the backward pass: it must give the same
            again, and leave nothing behind.
        tensors: :math:`\theta`, every tensor in :math:`f` that may need a gradient.
        weight: :math:`\gamma` of shape ``(c,)``.
        bias: :math:`\beta` of shape ``(c,)``.
        centred: ``False`` gives :math:`f` a mean of zero and the second moment in place of the variance.

    Returns:
        The output, in the dtype and layout of ``x``, and the moments of the cells, detached.

    Raises:
        NormzooError: where :math:`f` depends on a tensor that needs a gradient and is not among ``tensors``.

    Example:
        >>> def instance_norm(own: Moments) -> tuple[Tensor, Tensor, float]:
        ...     return own.mean, torch.rsqrt(own.var + 1e-5), 0.0
        >>> y, own = cellwise(torch.randn(4, 8, 5), None, False, instance_norm)
        >>> y.mean(2).abs().max() < 1e-5, own.mean.shape
        (tensor(True), torch.Size([4, 8, 1]))
    """
    given, number = [*tensors], len(tensors)
    given += [p for p in (weight, bias) if p is not None]

    def folded(own: Moments, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centre, scale, shift = coefficients(own, *tensors[:number])
        parameters = iter([wide(p).view(1, -1, 1) for p in tensors[number:]])
        if weight is not None:
            gain = next(parameters)
            scale, shift = scale * gain, shift * gain
        if bias is not None:
            shift = shift + next(parameters)
        shift = shift if isinstance(shift, Tensor) else torch.full_like(scale, shift)
        return centre, scale, shift

    if ops.allowed("cpu") and not torch.compiler.is_compiling() and cpu.serves(x, weight, bias, None):
        y, *own = _Cellwise.apply(x, mask, channels_last, centred, folded, *given)  # pyright: ignore[reportGeneralTypeIssues]
        return y, _moments(x, *own)
    y, own = formula(x, mask, channels_last, centred, folded, given)
    return y, Moments(own.mean.detach(), own.var.detach(), own.number)


def thresholded(
    x: Tensor,
    mask: Tensor | None,
    channels_last: bool,
    floor: Tensor | None,
    *,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor | None:
    r"""Divide each cell by its root mean square, then scale, shift and limit each channel from below.

    .. math:: y_{bcs} = \max\Big(\gamma_c \frac{x_{bcs}}{\sqrt{\nu^2_{bc} + \varepsilon}} + \beta_c,\; \tau_c\Big)

    with :math:`\nu^2_{bc}` the mean square over positions. The gradient of what is equal to the threshold passes.

    Args:
        x: ``(b, c, s)``, or ``(b, s, c)`` when ``channels_last``.
        mask: ``(b, s)``, true where an element is real; the others take no part and come out as zero.
        channels_last: whether the last axis is the channel.
        floor: :math:`\tau` of shape ``(c,)``; ``None`` is no limit.
        eps: :math:`\varepsilon`.
        weight: :math:`\gamma` of shape ``(c,)``.
        bias: :math:`\beta` of shape ``(c,)``.

    Returns:
        The output, in the dtype and layout of ``x``; ``None`` where no compiled kernel takes this input.
    """
    if not ops.allowed("cpu") or not cpu.serves(x, weight, bias, None):
        return None
    return torch.ops.normzoo.standardize.default(
        x, weight, bias, floor, mask, None, None, None, None, None, _AXES, -1 if channels_last else 1,
        False, eps, False, 0.0,
    )[0]  # fmt: skip


def pool(cells: Moments, dim: int) -> Moments:
    r"""The moments of cells taken together along a dimension, which stays as one.

    .. math:: \mu = \tfrac1n \sum_i n_i \mu_i, \qquad
              \sigma^2 = \tfrac1n \sum_i n_i \big(\sigma_i^2 + (\mu_i - \mu)^2\big), \qquad n = \sum_i n_i

    >>> mean, var, number = pool(Moments(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]), 5), 0)
    >>> mean, var, number
    (tensor([2.]), tensor([2.]), 10)
    """
    mean, var, number = cells
    if not isinstance(number, Tensor):
        many = mean.shape[dim]
        centre = mean.sum(dim, keepdim=True) / max(many, 1)
        var = (var + (mean - centre).square()).sum(dim, keepdim=True) / max(many, 1)
        return Moments(centre, var, number * many)
    number = number.expand_as(mean)
    total = number.sum(dim, keepdim=True)
    share = number / total.clamp(min=1)
    centre = (share * mean).sum(dim, keepdim=True)
    return Moments(centre, (share * (var + (mean - centre).square())).sum(dim, keepdim=True), total)


def formula(
    x: Tensor,
    mask: Tensor | None,
    channels_last: bool,
    centred: bool,
    coefficients: Callable[..., tuple[Tensor, Tensor, Tensor]],
    tensors: Sequence[Tensor],
) -> tuple[Tensor, Moments]:
    """What :func:`cellwise` computes, in plain differentiable operations."""
    z = x.mT if channels_last else x
    real = None if mask is None else mask.unsqueeze(1)
    with ops.full_precision(x):
        z = wide(z if real is None else torch.where(real, z, 0))
        number = z.shape[2] if real is None else real.to(z.dtype).sum(2, keepdim=True)
        n = max(number, 1) if isinstance(number, int) else number.clamp(min=1)
        mean = z.sum(2, keepdim=True) / n if centred else z.new_zeros(()).expand(*z.shape[:2], 1)
        off = z - mean if real is None else torch.where(real, z - mean, 0)
        own = Moments(mean, off.square().sum(2, keepdim=True) / n, number)
        centre, scale, shift = coefficients(own, *tensors)
        y = (z - centre) * scale + shift
    y = (y if real is None else torch.where(real, y, 0)).to(x.dtype)
    return y.mT if channels_last else y, own


def _moments(x: Tensor, mean: Tensor, var: Tensor, number: Tensor) -> Moments:
    return Moments(
        mean.unsqueeze(2), var.unsqueeze(2), number.unsqueeze(2) if number.numel() else x.numel() // mean.numel()
    )


class _Cellwise(torch.autograd.Function):
    """The compiled operators around the coefficients, which are differentiated by themselves."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, channels_last: bool, centred: bool,
        coefficients: Callable[..., tuple[Tensor, Tensor, Tensor]], *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        dim = -1 if channels_last else 1
        mean, var, number = torch.ops.normzoo.moments.default(x, mask, _AXES, dim, centred, 0.0)
        with torch.enable_grad(), ops.full_precision(x):
            results = coefficients(_moments(x, mean, var, number), *(t.detach() for t in tensors))
        if any(result.requires_grad for result in results):
            raise NormzooError("the coefficients need gradients of tensors that are not given: add these to 'tensors'")
        centre, scale, shift = (result.expand(*mean.shape, 1).squeeze(2) for result in results)
        y = torch.ops.normzoo.rescale.default(x, centre, scale, shift, None, None, mask, _AXES, dim)
        ctx.save_for_backward(x, mask, mean, var, number, *tensors)
        ctx.options = channels_last, centred, coefficients
        ctx.mark_non_differentiable(mean, var, number)
        return y, mean, var, number

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mask, mean, var, number, *tensors = ctx.saved_tensors
        channels_last, centred, coefficients = ctx.options
        needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]
        if torch.is_grad_enabled():  # for a second derivative; views, since a tensor may depend on x by other ways
            leaves = [t.view_as(t) for t in (x, *tensors)]
            y, _ = formula(leaves[0], mask, channels_last, centred, coefficients, leaves[1:])
            grads = _grad([y], leaves, needed, [dy], create_graph=True)
            return grads[0], None, None, None, None, *grads[1:]
        dim = -1 if channels_last else 1
        total, product, _, _ = torch.ops.normzoo.gradient_sums.default(dy, x, None, mask, mean, var, _AXES, dim, 1.0)
        own = _moments(x, mean, var, number)
        with torch.enable_grad(), ops.full_precision(x):
            leaves = [t.detach().requires_grad_() for t in (own.mean, own.var, *tensors)]
            results = coefficients(Moments(leaves[0], leaves[1], own.number), *leaves[2:])
            results = [result.expand_as(own.mean) for result in results]
        centre, scale = (result.detach().squeeze(2) for result in results[:2])
        arrived = (-scale * total, torch.addcmul(product, mean - centre, total), total)
        arrived = [grad.unsqueeze(2).to(result.dtype) for grad, result in zip(arrived, results, strict=True)]
        dmean, dvar, *grads = _grad(results, leaves, (centred and needed[0], needed[0], *needed[1:]), arrived)
        dx = None
        if needed[0]:
            n = own.number.clamp(min=1) if isinstance(own.number, Tensor) else own.number
            q = torch.zeros_like(mean) if dvar is None else (dvar * (2 / n)).squeeze(2)
            r = torch.zeros_like(mean) if dmean is None else (dmean / n).squeeze(2)
            dx = torch.ops.normzoo.gradient.default(dy, x, None, mask, mean, scale, q, r, _AXES, dim)
        return dx, None, None, None, None, *grads


def _grad(
    results: Sequence[Tensor],
    leaves: Sequence[Tensor],
    needed: Sequence[bool],
    arrived: Sequence[Tensor],
    create_graph: bool = False,
) -> list[Tensor | None]:
    """The gradients that are needed, ``None`` for the others."""
    pairs = [(result, grad) for result, grad in zip(results, arrived, strict=True) if result.requires_grad]
    if not pairs:  # the coefficients are constant
        return [None] * len(leaves)
    results, arrived = zip(*pairs, strict=True)
    wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
    found = iter(torch.autograd.grad(results, wanted, arrived, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needed]
