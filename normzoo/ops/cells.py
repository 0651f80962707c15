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
            what it returns broadcasts to ``(b, c, 1)``. A second derivative calls it again: it must give the same
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
    if ops.opaque(x, weight, bias, None):
        tracked = torch.is_grad_enabled()
        y, *own = _Cellwise.apply(x, mask, channels_last, centred, tracked, coefficients, weight, bias, *tensors)  # pyright: ignore[reportGeneralTypeIssues]
        return y, _moments(x, *own)
    y, own = formula(x, mask, channels_last, centred, coefficients, weight, bias, tensors)
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
        n = max(mean.shape[dim], 1)
        centre = mean.sum(dim, keepdim=True) / n
        var = (var + (mean - centre).square()).sum(dim, keepdim=True) / n
        return Moments(centre, var, number * mean.shape[dim])
    number = number.expand_as(mean)
    total = number.sum(dim, keepdim=True)
    share = number / total.clamp(min=1)
    centre = (share * mean).sum(dim, keepdim=True)
    return Moments(centre, (share * (var + (mean - centre).square())).sum(dim, keepdim=True), total)


def mixture(
    x: Tensor,
    mask: Tensor | None,
    channels_last: bool,
    means: Tensor,
    variances: Tensor,
    batch: Moments | None,
    *,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Moments] | None:
    r"""Standardise each cell by shares of the moments of it, of all cells of its sample, and of the batch.

    .. math:: y_{bcs} = \gamma_c \frac{x_{bcs} - \sum_k p_k \mu_k}{\sqrt{\sum_k q_k \sigma_k^2 + \varepsilon}} + \beta_c

    Args:
        x: ``(b, c, s)``, or ``(b, s, c)`` when ``channels_last``.
        mask: ``(b, s)``, true where an element is real.
        channels_last: whether the last axis is the channel.
        means: :math:`p`, three shares: of the cell, the sample and the batch.
        variances: :math:`q`, likewise.
        batch: moments to use for those of the batch, ``(1, c, 1)``; they are constants.
        eps: :math:`\varepsilon`.
        weight: :math:`\gamma` of shape ``(c,)``.
        bias: :math:`\beta` of shape ``(c,)``.

    Returns:
        The output, in the dtype and layout of ``x``, and the moments of the batch, of shape ``(c,)``; ``None`` where no
        compiled operator takes this input, and :func:`cellwise` with :func:`mixed` does the same.
    """
    if mask is not None or means.dtype != torch.float32 or not ops.opaque(x, weight, bias, batch):
        return None
    y, mean, var = _Mixture.apply(x, channels_last, batch, eps, means, variances, weight, bias)  # pyright: ignore[reportGeneralTypeIssues]
    return y, batch or Moments(mean, var, x.numel() // mean.numel())


def mixed(own: Moments, batch: Moments, means: Tensor, variances: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Centre and scale of :func:`mixture` from the moments of the cells, ``(b, c, 1)``, and of the batch.

    >>> own = Moments(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[0.0], [2.0]]]), 5)
    >>> centre, scale = mixed(own, pool(own, 0), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]), 0.0)
    >>> centre.flatten(), scale.flatten()
    (tensor([2., 2.]), tensor([0.7071, 0.7071]))
    """
    p, q, sample = means.unbind(), variances.unbind(), pool(own, 1)
    centre = p[0] * own.mean + p[1] * sample.mean + p[2] * batch.mean
    return centre, torch.rsqrt(q[0] * own.var + q[1] * sample.var + q[2] * batch.var + eps)


class _Mixture(torch.autograd.Function):
    """The compiled operators for it; the second derivative is that of the formula."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, channels_last: bool, batch: Moments | None, eps: float, *others: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        p, q, weight, bias = others
        given = (None, None) if batch is None else (batch.mean.flatten(), batch.var.flatten())
        y, mean, var, centre, scale, *measured = torch.ops.normzoo.mixture.default(
            x, *given, p, q, weight, bias, _AXES, -1 if channels_last else 1, eps
        )
        ctx.save_for_backward(x, mean, var, centre, scale, *(measured if batch is None else given), *others)
        ctx.options = channels_last, batch, eps
        ctx.mark_non_differentiable(*measured)
        return y, *measured

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *kept, p, q, weight, bias = ctx.saved_tensors
        channels_last, batch, eps = ctx.options
        if not torch.is_grad_enabled():
            dx, to_p, to_q, *affine = torch.ops.normzoo.mixture_backward.default(
                dy, x, *kept, p, q, weight, _AXES, -1 if channels_last else 1, batch is not None
            )
            affine = [None if t is None else grad.to(t.dtype) for t, grad in zip((weight, bias), affine, strict=True)]
            return dx, None, None, None, to_p, to_q, *affine

        def coefficients(own: Moments, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, float]:
            return *mixed(own, batch or pool(own, 0), p, q, eps), 0.0

        views: list[Any] = [None if t is None else t.view_as(t) for t in (x, p, q, weight, bias)]
        y, _ = formula(views[0], None, channels_last, True, coefficients, views[3], views[4], views[1:3])
        dx, *grads = _grad([y], views, (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]), [dy], create_graph=True)
        return dx, None, None, None, *grads


def formula(
    x: Tensor,
    mask: Tensor | None,
    channels_last: bool,
    centred: bool,
    coefficients: Coefficients,
    weight: Tensor | None,
    bias: Tensor | None,
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
        centre, scale, shift = _folded(coefficients(own, *tensors), weight, bias)
        y = (z - centre) * scale + shift
    y = (y if real is None else torch.where(real, y, 0)).to(x.dtype)
    return y.mT if channels_last else y, own


def _folded(
    coefficients: tuple[Tensor, Tensor, Tensor | float], weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | float]:
    """The coefficients with the gain and the shift of the channels in them."""
    centre, scale, shift = coefficients
    if weight is not None:
        gain = wide(weight).view(1, -1, 1)
        scale, shift = scale * gain, shift * gain
    return centre, scale, shift if bias is None else shift + wide(bias).view(1, -1, 1)


def _moments(x: Tensor, mean: Tensor, var: Tensor, number: Tensor) -> Moments:
    return Moments(
        mean.unsqueeze(2), var.unsqueeze(2), number.unsqueeze(2) if number.numel() else x.numel() // mean.numel()
    )


class _Cellwise(torch.autograd.Function):
    """The compiled operators around the coefficients, which keep a graph of their own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, channels_last: bool, centred: bool, tracked: bool,
        coefficients: Coefficients, weight: Tensor | None, bias: Tensor | None, *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        dim = -1 if channels_last else 1
        mean, var, number = torch.ops.normzoo.moments.default(x, mask, _AXES, dim, centred, 0.0)
        own, needs = _moments(x, mean, var, number), ctx.needs_input_grad
        folded = ()
        with torch.set_grad_enabled(tracked), ops.full_precision(x):
            needed = (centred and needs[0], needs[0], *needs[8:])
            leaves = [_leaf(t, tracked and need) for t, need in zip((own.mean, own.var, *tensors), needed, strict=True)]
            results = coefficients(Moments(leaves[0], leaves[1], own.number), *leaves[2:])
            if isinstance(results[2], Tensor) or results[2]:  # otherwise the kernels know gain and shift
                affine = zip((weight, bias), needs[6:8], strict=True)
                folded = [None if p is None else _leaf(p, tracked and need) for p, need in affine]
                centre, scale, shift = _folded(results, *folded)
                results = centre, scale, shift if isinstance(shift, Tensor) else torch.full_like(scale, shift)
                leaves += [leaf for leaf in folded if leaf is not None]
                needed += tuple(leaf.requires_grad for leaf in folded if leaf is not None)
            results = [result.expand_as(own.mean) for result in results if isinstance(result, Tensor)]
        if _depends_on_others(results, leaves):
            raise NormzooError("the coefficients need gradients of tensors that are not given: add these to 'tensors'")
        centre, scale, *shift = (result.detach().squeeze(2).contiguous() for result in results)
        ctx.affine = () if folded else (weight, bias)
        y = torch.ops.normzoo.rescale.default(
            x, centre, scale, *(shift or [None]), *(ctx.affine or (None, None)), mask, _AXES, dim
        )
        ctx.save_for_backward(x, mask, mean, number, weight, bias, centre, scale, *tensors)
        ctx.options = channels_last, centred, coefficients
        ctx.graph = leaves, results, needed
        ctx.mark_non_differentiable(mean, var, number)
        return y, mean, var, number

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mask, mean, number, weight, bias, centre, scale, *tensors = ctx.saved_tensors
        channels_last, centred, coefficients = ctx.options
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for a second derivative; views, since a tensor may depend on x by other ways
            views: list[Any] = [None if t is None else t.view_as(t) for t in (x, weight, bias, *tensors)]
            y, _ = formula(views[0], mask, channels_last, centred, coefficients, views[1], views[2], views[3:])
            dx, *grads = _grad([y], views, (needs[0], *needs[6:]), [dy], create_graph=True)
            return dx, *[None] * 5, *grads
        dim = -1 if channels_last else 1
        leaves, results, needed = ctx.graph
        gain = ctx.affine[0] if ctx.affine else None
        total, product, *parameters = torch.ops.normzoo.gradient_sums.default(
            dy, x, gain, mask, centre, scale, _AXES, dim
        )
        arrived = [grad.unsqueeze(2) for grad in (-scale * total, product, total)[: len(results)]]
        dmean, dvar, *grads = _grad(results, leaves, needed, arrived)
        to_tensors, folded = grads[: len(tensors)], iter(grads[len(tensors) :])
        to_affine = [
            None if p is None else grad.to(p.dtype) if ctx.affine else next(folded)
            for p, grad in zip((weight, bias), parameters, strict=True)
        ]
        dx = None
        if needs[0]:
            count = number.clamp(min=1) if number.numel() else x.numel() // mean.numel()
            q = torch.zeros_like(mean) if dvar is None else dvar.squeeze(2) * (2 / count)
            r = torch.zeros_like(mean) if dmean is None else dmean.squeeze(2) / count
            dx = torch.ops.normzoo.gradient.default(dy, x, gain, mask, mean, scale, q, r, _AXES, dim)
        return dx, *[None] * 5, *to_affine, *to_tensors


def _leaf(t: Tensor, needed: bool) -> Tensor:
    return t.detach().requires_grad_(needed)


def _depends_on_others(results: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether a gradient of the results would reach another tensor than the leaves."""
    known = {id(leaf) for leaf in leaves}
    todo, seen = [result.grad_fn for result in results if result.grad_fn is not None], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", leaves[0])) not in known:
            return True
        todo += [following for following, _ in node.next_functions if following is not None]
    return False


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
    gradients = torch.autograd.grad(  # the graph is kept for another backward pass
        results, wanted, arrived, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    found = iter(gradients)
    return [next(found) if need else None for need in needed]
