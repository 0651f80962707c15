"""torch's own kernels, for the patterns that have one.

A kernel is used only where it gives the reference's answer to rounding. Half precision goes to the reference: torch's
CPU kernels accumulate parameter gradients in the half precision of their input.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from normzoo.ops.pattern import Pattern
from normzoo.ops.reference import Moments

_BATCH, _POSITION, _JOINT, _CHANNEL, _GROUP = (
    Pattern.parse(f"b {c} s -> {right}")
    for c, right in [("c", "c"), ("c", "b s"), ("c", "b"), ("c", "b c"), ("(g c)", "b g")]
)


def standardize(
    x: Tensor,
    pattern: Pattern,
    options: Mapping[str, int],
    *,
    channels_last: bool,
    eps: float,
    centred: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    given: Moments | None,
) -> tuple[Tensor, Moments | None] | None:
    """Standardise contiguous ``x`` and scale it by one of torch's kernels; ``None`` where none fits.

    Only the batch statistics of a training step come back: nobody needs the others.
    """
    if not centred or not x.is_contiguous() or x.numel() == 0 or x.dtype not in (torch.float32, torch.float64):
        return None
    if any(p is not None and p.dtype != x.dtype for p in (weight, bias)):
        return None
    if pattern == _BATCH:
        rows = x.flatten(0, 1) if channels_last else x
        if given is not None:
            mean, var = given.mean.to(x.dtype), given.var.to(x.dtype)
            return F.batch_norm(rows, mean, var, weight, bias, False, 0.0, eps).view(x.shape), None
        y, mean, inverse_std = torch.native_batch_norm(rows, weight, bias, None, None, True, 0.0, eps)
        moments = Moments(mean.detach(), inverse_std.detach().pow(-2) - eps, x.numel() / mean.numel())
        return y.view(x.shape), moments
    if given is not None:
        return None
    if pattern == _POSITION:
        if channels_last:
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps), None
        # two transposed copies cost less than the dozen passes of the formula
        return F.layer_norm(x.mT.contiguous(), x.shape[1:2], weight, bias, eps).mT.contiguous(), None
    if channels_last:
        return None
    if pattern == _JOINT:
        return F.group_norm(x, 1, weight, bias, eps), None
    if pattern == _CHANNEL:
        return F.group_norm(x, x.shape[1], weight, bias, eps), None
    if pattern == _GROUP:
        return F.group_norm(x, options["g"], weight, bias, eps), None
    return None
