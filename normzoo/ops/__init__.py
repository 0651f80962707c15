"""How a norm is computed: one operation for every pattern, by the reference or by a kernel that equals it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from normzoo.errors import unknown
from normzoo.ops import native, reference
from normzoo.ops.pattern import Pattern
from normzoo.ops.reference import Moments, wide

__all__ = ["Moments", "Pattern", "affine", "backend", "full_precision", "standardize", "wide"]

_BACKENDS = ("auto", "reference")
_backend = "auto"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Compute every norm by ``"reference"`` (the plain formula) or by ``"auto"`` (a kernel where there is one).

    >>> with backend("reference"):
    ...     pass

    Raises:
        NormzooError: for an unknown name.
    """
    global _backend
    if name not in _BACKENDS:
        raise unknown("backend", name, _BACKENDS)
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast where ``x`` lives; some devices, such as ``meta``, have none."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, channels_last: bool) -> Tensor:
    """Scale and shift each channel of a canonical tensor, in its dtype or that of the parameters if wider."""
    shape = (-1,) if channels_last else (-1, 1)
    if weight is not None and bias is not None:
        dtype = torch.promote_types(x.dtype, weight.dtype)
        return torch.addcmul(bias.to(dtype).view(shape), x.to(dtype), weight.to(dtype).view(shape))
    if weight is not None:
        x = x * weight.view(shape)
    return x if bias is None else x + bias.view(shape)


def standardize(
    x: Tensor,
    pattern: Pattern,
    options: Mapping[str, int],
    *,
    channels_last: bool = False,
    eps: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    centred: bool = True,
    mask: Tensor | None = None,
    given: Moments | None = None,
    sync: bool = False,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Moments | None]:
    r"""Standardise a canonical tensor over the axes of ``pattern``, then scale and shift each channel.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta

    The arguments are those of :func:`normzoo.ops.reference.standardize`, with the ``weight`` :math:`\gamma` and
    ``bias`` :math:`\beta` of shape ``(c,)``. The output has the dtype and the strides of ``x``.

    Returns:
        The output and the statistics, detached; these are ``None`` where a kernel kept them to itself, which it does
        only for patterns that keep the sample apart.
    """
    if x.shape[2 if channels_last else 1] and not x.is_contiguous() and x.mT.is_contiguous():
        # the memory decides: a channels-last image is a row of channels for each position
        y, moments = standardize(
            x.mT, pattern, options, channels_last=not channels_last, eps=eps, weight=weight, bias=bias,
            centred=centred, mask=mask, given=given, sync=sync, group=group,
        )  # fmt: skip
        return y.mT, moments
    with full_precision(x):
        if _backend == "auto" and mask is None and not sync:
            done = native.standardize(
                x, pattern, options, channels_last=channels_last, eps=eps, centred=centred,
                weight=weight, bias=bias, given=given,
            )  # fmt: skip
            if done is not None:
                return done
        y, moments = reference.standardize(
            x, pattern, options, channels_last=channels_last, eps=eps, centred=centred,
            mask=mask, given=given, sync=sync, group=group,
        )  # fmt: skip
        y = affine(y, weight, bias, channels_last)
        if mask is not None and bias is not None:
            y = torch.where(mask.unsqueeze(-1 if channels_last else 1), y, 0)
        return y.to(x.dtype), moments
