"""How a norm is computed: one operation for every pattern, by the reference or by a kernel that equals it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from normzoo.errors import unknown
from normzoo.ops import cpu, native, reference
from normzoo.ops.pattern import Pattern
from normzoo.ops.reference import Moments, Running, affine, wide
from normzoo.ops.sync import stand_in

__all__ = [
    "CHOICES",
    "Choice",
    "Moments",
    "Pattern",
    "Running",
    "affine",
    "backend",
    "full_precision",
    "standardize",
    "wide",
]


class Choice(NamedTuple):
    """A way to compute a norm, and when it is taken.

    Attributes:
        name: as :func:`backend` takes it.
        serves: what it is taken for, in words.
    """

    name: str
    serves: str


CHOICES = (
    Choice("triton", "CUDA tensors in float32, bfloat16 and float16, where Triton is installed"),
    Choice("cpu", "CPU tensors in float32, bfloat16 and float16, where a C++ compiler built the kernels"),
    Choice("native", "the patterns that torch has a kernel for, unmasked, in float32 and float64"),
    Choice("reference", "everything else, and what is exported, vectorised or differentiated forward"),
)
"""What computes a norm, in order of preference: the first that serves a call is taken."""

_backend = "auto"


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Compute every norm by one of :data:`CHOICES`, or by ``"auto"``, the first of them that serves the call.

    What the chosen one does not serve goes to the reference, the plain formula.

    >>> with backend("reference"):
    ...     pass

    Raises:
        NormzooError: for an unknown name.
    """
    global _backend
    if name not in (known := ("auto", *(choice.name for choice in CHOICES))):
        raise unknown("backend", name, known)
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def allowed(name: str) -> bool:
    """Whether the backend in force lets this choice compute."""
    return _backend in ("auto", name)


def opaque(x: Tensor, weight: Tensor | None, bias: Tensor | None, given: Moments | None) -> bool:
    """Whether a function around the compiled CPU operators takes this call, which no compiler can look into."""
    return allowed("cpu") and not torch.compiler.is_compiling() and cpu.serves(x, weight, bias, given)


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """No autocast where ``x`` lives; some devices, such as ``meta``, have none."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


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
    rescale: Callable[[Moments], tuple[Tensor | None, Tensor | None]] | None = None,
    running: Running | None = None,
    sync: bool = False,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Moments | None]:
    r"""Standardise a tensor over the axes of ``pattern``, then scale and shift each channel.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta

    The arguments are those of :func:`normzoo.ops.reference.standardize`, with the ``weight`` :math:`\gamma` and
    ``bias`` :math:`\beta` of shape ``(c,)``. The output has the dtype and the strides of ``x``.

    Args:
        x: ``(b, c, *s)``, or ``(b, *s, c)`` when ``channels_last``, with a ``mask`` of shape ``(b, *s)``.
        pattern: which axes share a statistic.
        options: the size of each free axis of the pattern.
        channels_last: whether the last axis is the channel.
        eps: added to the variance.
        weight: :math:`\gamma`.
        bias: :math:`\beta`.
        centred: ``False`` leaves the mean alone.
        mask: true where an element is real.
        given: statistics to use instead of those of ``x``.
        rescale: weight and bias from the (detached) statistics of ``x``, in place of ``weight`` and ``bias``.
        running: averages to count the statistics into, which are shaped like them. A kernel may; where statistics
            come back, it is left to the caller.
        sync: take the moments over all processes of ``group``; differentiable once.
        group: the processes.

    Returns:
        The output and the statistics, detached; these are ``None`` where they were counted, and for patterns that keep
        the sample apart, where a kernel may keep them to itself.
    """
    if sync and given is None:
        if x.shape[0] == 0:
            x, mask = stand_in(x, channels_last)
            y, moments = standardize(
                x, pattern, options, channels_last=channels_last, eps=eps, weight=weight, bias=bias,
                centred=centred, mask=mask, rescale=rescale, sync=True, group=group,
            )  # fmt: skip
            return y[:0], moments
        if opaque(x, weight, bias, None):
            return cpu.synchronize(x, pattern, options, channels_last, eps, weight, bias, centred, mask, rescale, group)
    elif allowed("cpu") and cpu.serves(x, weight, bias, given):
        return cpu.standardize(
            x, pattern, options, channels_last, eps, weight, bias, centred, mask, given, rescale, running
        )
    if x.ndim != 3:
        canonical = x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2) if channels_last else x.flatten(2)
        y, moments = standardize(
            canonical, pattern, options, channels_last=channels_last or x.ndim == 2, eps=eps, weight=weight, bias=bias,
            centred=centred, mask=None if mask is None else mask.reshape(canonical.shape[0], -1),
            given=given, rescale=rescale, sync=sync, group=group,
        )  # fmt: skip
        return y.view(x.shape), moments
    if x.shape[2 if channels_last else 1] and not x.is_contiguous() and x.mT.is_contiguous():
        # the memory decides: a channels-last image is a row of channels for each position
        y, moments = standardize(
            x.mT, pattern, options, channels_last=not channels_last, eps=eps, weight=weight, bias=bias,
            centred=centred, mask=mask, given=given, rescale=rescale, sync=sync, group=group,
        )  # fmt: skip
        return y.mT, moments
    with full_precision(x):
        if (x.is_cuda and _backend == "auto") or _backend == "triton":
            from normzoo.ops import triton  # on first use: it loads Triton

            if triton.serves(
                x, pattern, channels_last=channels_last, weight=weight, bias=bias, mask=mask, given=given, sync=sync
            ):
                return triton.standardize(
                    x, pattern, options, channels_last=channels_last, eps=eps, centred=centred,
                    weight=weight, bias=bias, mask=mask, given=given, rescale=rescale, sync=sync, group=group,
                )  # fmt: skip
        if allowed("native") and mask is None and not sync and rescale is None:
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
        if rescale is not None:
            weight, bias = rescale(moments)
        y = affine(y, weight, bias, channels_last)
        if mask is not None and bias is not None:
            y = torch.where(mask.unsqueeze(-1 if channels_last else 1), y, 0)
        return y.to(x.dtype), moments
