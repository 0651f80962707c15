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
from normzoo.ops import Moments, Pattern, cpu, kernels, wide

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
    given, number = [*tensors], len(tensors)
    given += [p for p in (weight, bias) if p is not None]

    def folded(own: Moments, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        centre, scale, shift = coefficients(own, *tensors[:number])
        parameters = iter([wide(p).view(1, -1, 1) for p in tensors[number:]])
        if weight is not None:
            gain = next(parameters)
            scale, shift = scale * gain, shift * gain if isinstance(shift, Tensor) else shift
        if bias is not None:
            shift = next(parameters) + shift if isinstance(shift, Tensor) or shift else next(parameters)
        shift = shift if isinstance(shift, Tensor) else torch.full_like(scale, shift)
        return centre, scale, shift

    if ops.allowed("cpu") and not torch.compiler.is_compiling() and cpu.serves(x, weight, bias, None):
        tracked = torch.is_grad_enabled()
        y, *own = _Cellwise.apply(x, mask, channels_last, centred, tracked, folded, *given)  # pyright: ignore[reportGeneralTypeIssues]
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
        pooled = _Pool.apply(mean, var, dim) if _compiled(mean, var) else _pool(mean, var, dim)
        return Moments(*pooled, number * mean.shape[dim])  # pyright: ignore[reportGeneralTypeIssues]
    number = number.expand_as(mean)
    total = number.sum(dim, keepdim=True)
    share = number / total.clamp(min=1)
    centre = (share * mean).sum(dim, keepdim=True)
    return Moments(centre, (share * (var + (mean - centre).square())).sum(dim, keepdim=True), total)


def mixture(own: Moments, batch: Moments, means: Tensor, variances: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r"""Centre and scale from shares of the moments of a cell, of all cells of its sample, and of the batch.

    .. math:: m = \sum_k p_k \mu_k, \qquad a = \Big(\sum_k q_k \sigma_k^2 + \varepsilon\Big)^{-\frac12}

    Args:
        own: the moments of the cells, ``(b, c, 1)``.
        batch: those of the batch, ``(1, c, 1)``.
        means: :math:`p`, three shares: of the cell, the sample and the batch.
        variances: :math:`q`, likewise.
        eps: :math:`\varepsilon`.

    >>> own = Moments(torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[0.0], [2.0]]]), 5)
    >>> centre, scale = mixture(own, pool(own, 0), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]), 0.0)
    >>> centre.flatten(), scale.flatten()
    (tensor([2., 2.]), tensor([0.7071, 0.7071]))
    """
    inputs = (own.mean, own.var, batch.mean, batch.var, means, variances)
    return (_Mixture.apply if _compiled(*inputs) else _mixture)(*inputs, eps)  # pyright: ignore[reportReturnType]


def _compiled(*tensors: Tensor) -> bool:
    """Whether compiled operators take these moments of cells."""
    if torch.compiler.is_compiling() or not all(t.is_cpu and t.dtype == torch.float32 for t in tensors):
        return False
    return tensors[0].ndim == 3 and ops.allowed("cpu") and not cpu.transformed() and kernels.load()


def _pool(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    n = max(mean.shape[dim], 1)
    centre = mean.sum(dim, keepdim=True) / n
    return centre, (var + (mean - centre).square()).sum(dim, keepdim=True) / n


class _Pool(torch.autograd.Function):
    """The compiled operators for it; the second derivative is that of the formula."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        mean, var = mean.contiguous(), var.contiguous()
        pooled = torch.ops.normzoo.pool.default(mean, var, dim == 0)
        ctx.save_for_backward(mean, var, pooled[0])
        ctx.dim = dim
        return pooled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, centre = ctx.saved_tensors
        if not torch.is_grad_enabled():
            to_mean, to_var = (grad.contiguous() for grad in grads)
            return *torch.ops.normzoo.pool_backward.default(to_mean, to_var, mean, centre, ctx.dim == 0), None
        leaves = [mean.view_as(mean), var.view_as(var)]
        return *_grad(_pool(*leaves, ctx.dim), leaves, ctx.needs_input_grad[:2], grads, create_graph=True), None


def _mixture(
    mean: Tensor, var: Tensor, batch_mean: Tensor, batch_var: Tensor, means: Tensor, variances: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    layer = pool(Moments(mean, var, 1), 1)  # a mask leaves as many positions in all channels
    p, q = means.unbind(), variances.unbind()
    centre = p[0] * mean + p[1] * layer.mean + p[2] * batch_mean
    return centre, torch.rsqrt(q[0] * var + q[1] * layer.var + q[2] * batch_var + eps)


class _Mixture(torch.autograd.Function):
    """The compiled mixture; its second derivative is that of the formula."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *tensors, ctx.eps = inputs
        centre, scale = torch.ops.normzoo.mixture.default(*(t.contiguous() for t in tensors), ctx.eps)
        ctx.save_for_backward(*tensors, scale)
        return centre, scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, scale = ctx.saved_tensors
        if not torch.is_grad_enabled():
            tensors = (t.contiguous() for t in (*grads, *tensors, scale))
            return *torch.ops.normzoo.mixture_backward.default(*tensors), None
        leaves = [t.view_as(t) for t in tensors]
        return *_grad(_mixture(*leaves, ctx.eps), leaves, ctx.needs_input_grad[:6], grads, create_graph=True), None


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
    """The compiled operators around the coefficients, which keep a graph of their own."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, channels_last: bool, centred: bool, tracked: bool,
        coefficients: Callable[..., tuple[Tensor, Tensor, Tensor]], *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        dim = -1 if channels_last else 1
        mean, var, number = torch.ops.normzoo.moments.default(x, mask, _AXES, dim, centred, 0.0)
        own = _moments(x, mean, var, number)
        needs = ctx.needs_input_grad
        needed = (centred and needs[0], needs[0], *needs[6:])
        with torch.set_grad_enabled(tracked), ops.full_precision(x):
            leaves = [t.detach() for t in (own.mean, own.var, *tensors)]
            for leaf, need in zip(leaves, needed, strict=True):
                leaf.requires_grad_(tracked and need)
            results = coefficients(Moments(leaves[0], leaves[1], own.number), *leaves[2:])
            results = [result.expand_as(own.mean) for result in results]
        if _depends_on_others(results, leaves):
            raise NormzooError("the coefficients need gradients of tensors that are not given: add these to 'tensors'")
        centre, scale, shift = (result.detach().squeeze(2) for result in results)
        y = torch.ops.normzoo.rescale.default(x, centre, scale, shift, None, None, mask, _AXES, dim)
        ctx.save_for_backward(x, mask, mean, var, number, *tensors)
        ctx.options = channels_last, centred, coefficients
        ctx.graph = leaves, results, needed
        ctx.mark_non_differentiable(mean, var, number)
        return y, mean, var, number

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, mask, mean, var, number, *tensors = ctx.saved_tensors
        channels_last, centred, coefficients = ctx.options
        if torch.is_grad_enabled():  # for a second derivative; views, since a tensor may depend on x by other ways
            leaves = [t.view_as(t) for t in (x, *tensors)]
            y, _ = formula(leaves[0], mask, channels_last, centred, coefficients, leaves[1:])
            needed = ctx.needs_input_grad[0], *ctx.needs_input_grad[6:]
            dx, *grads = _grad([y], leaves, needed, [dy], create_graph=True)
            return dx, *[None] * 5, *grads
        dim = -1 if channels_last else 1
        total, product, _, _ = torch.ops.normzoo.gradient_sums.default(dy, x, None, mask, mean, var, _AXES, dim, 1.0)
        leaves, results, needed = ctx.graph
        centre, scale = (result.detach().squeeze(2) for result in results[:2])
        arrived = (-scale * total, torch.addcmul(product, mean - centre, total), total)
        arrived = [grad.unsqueeze(2).to(result.dtype) for grad, result in zip(arrived, results, strict=True)]
        dmean, dvar, *grads = _grad(results, leaves, needed, arrived)
        dx = None
        if ctx.needs_input_grad[0]:
            count = number.clamp(min=1) if number.numel() else x.numel() // mean.numel()
            q = torch.zeros_like(mean) if dvar is None else dvar.squeeze(2) * (2 / count)
            r = torch.zeros_like(mean) if dmean is None else dmean.squeeze(2) / count
            dx = torch.ops.normzoo.gradient.default(dy, x, None, mask, mean, scale, q, r, _AXES, dim)
        return dx, *[None] * 5, *grads


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
