"""A recurrence over a whole sequence as one operation, with norms inside its cell.

The operator ``normzoo::recurrence`` is compiled, for float32 on a CPU; :mod:`normzoo.ops.triton.recurrence` is the
same on a GPU. :func:`reference` says in plain operations what they compute; it also takes the place of their gradient
when that is differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from normzoo import ops
from normzoo.ops import kernels
from normzoo.ops.cpu import transformed

CELLS = ("lstm", "gru", "tanh")
POINTS = ("input", "hidden", "cell")
KINDS = ("none", "layer", "rms", "batch", "running")
Kind = Literal["none", "layer", "rms", "batch", "running"]

GATES = {"lstm": 4, "gru": 3, "tanh": 1}


class CellNorm(NamedTuple):
    """A norm at one point of a cell.

    Attributes:
        kind: over the channels (``"layer"``, ``"rms"``), over the sequences at each step (``"batch"``), or by running
            statistics (``"running"``).
        eps: added to the variance.
        gain: ``(C,)``, or ``None`` for ones.
        shift: ``(C,)``, or ``None`` for zeros.
        running: running mean and variance of the first ``S`` steps, ``(S, 2, C)``; later steps use those of the last.
            With ``"batch"`` they take the batch's in, and serve a step that less than two sequences reach.
        momentum: weight of the batch in the running statistics.
    """

    kind: Kind = "none"
    eps: float = 0.0
    gain: Tensor | None = None
    shift: Tensor | None = None
    running: Tensor | None = None
    momentum: float = 0.0


def usable(cell: str, kinds: Sequence[Kind], batch: int, width: int, tensors: Sequence[Tensor]) -> bool:
    """Whether an operator can do this here: the plain loop does all else.

    Args:
        cell: as :func:`recurrence` takes it.
        kinds: of the norms.
        batch: number of sequences.
        width: number of units.
        tensors: all that it would be given.
    """
    device = tensors[0].device
    if device.type not in ("cpu", "cuda") or any(t.dtype != torch.float32 or t.device != device for t in tensors):
        return False
    if transformed() or torch.is_autocast_enabled(device.type):
        return False
    if _on_a_gpu(tensors[0]):
        from normzoo.ops.triton import recurrence as fused  # on first use: it loads Triton

        return fused.serves(cell, kinds, batch, width, device)
    return ops.allowed("cpu") and device.type == "cpu" and kernels.load()


def _on_a_gpu(x: Tensor) -> bool:
    """Whether this is for Triton's kernels; tensors of a CPU are where they were asked for, in its interpreter."""
    return ops.allowed("triton") and (x.is_cuda or not ops.allowed("cpu"))


def recurrence(
    cell: str,
    x: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    norms: Mapping[str, CellNorm],
    mask: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Run a cell over a sequence, from a state of zero.

    With :math:`u = \mathrm{norm_{input}}(W_{ih} x_t) + b_{ih}` and
    :math:`v = \mathrm{norm_{hidden}}(W_{hh} h_{t-1}) + b_{hh}`,

    .. math::
        \text{lstm:} \quad & (i, f, g, o) = u + v, \quad c_t = \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g), \quad
            h_t = \sigma(o) \odot \tanh(\mathrm{norm_{cell}}(c_t)) \\
        \text{gru:} \quad & r = \sigma(u_r + v_r), \quad z = \sigma(u_z + v_z), \quad
            n = \tanh(u_n + r \odot v_n), \quad h_t = (1 - z) \odot n + z \odot h_{t-1} \\
        \text{tanh:} \quad & h_t = \tanh(u + v)

    Args:
        cell: ``"lstm"``, ``"gru"`` or ``"tanh"``.
        x: ``(N, T, F)``, for which :func:`usable` has to hold; ``(N, T, G H)``, already multiplied, where ``weight_ih``
            is ``None``.
        weight_ih: ``(G H, F)``, the ``G`` gates one after another, in torch's order.
        weight_hh: ``(G H, H)``.
        bias_ih: ``(G H,)``.
        bias_hh: ``(G H,)``.
        norms: at the points ``"input"``, ``"hidden"`` and ``"cell"``; none where one is not named.
        mask: ``(N, T)``, true where a sequence goes on; elsewhere its state is held and no statistic sees it.

    Returns:
        The outputs ``(N, T, H)``, and what running statistics become, by point.

    Source:
        Hochreiter and Schmidhuber 1997, Long Short-Term Memory; Cho et al. 2014, arXiv 1406.1078; with norms, Cooijmans
        et al. 2016, Recurrent Batch Normalization, arXiv 1603.09025, and Ba et al. 2016, arXiv 1607.06450.
    """
    at = [norms.get(point, CellNorm()) for point in POINTS]
    shift_ih, shift_hh = (
        bias if n.shift is None else bias + n.shift for bias, n in zip((bias_ih, bias_hh), at[:2], strict=True)
    )
    tensors = (
        x, weight_ih, weight_hh, at[0].gain, shift_ih, at[1].gain, shift_hh, at[2].gain, at[2].shift, mask,
        *(n.running for n in at),
    )  # fmt: skip
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if _on_a_gpu(x):
        from normzoo.ops.triton.recurrence import compute
    else:
        compute = torch.ops.normzoo.recurrence
    out = compute(
        *tensors,
        CELLS.index(cell),
        [KINDS.index(n.kind) for n in at],
        [n.eps for n in at],
        [n.momentum for n in at],
        keep,
    )
    moved = {point: new for point, n, new in zip(POINTS, at, out[8:], strict=True) if n.running is not None}
    return out[0], moved


@torch.no_grad()
def count(statistics: list[Tensor], counters: list[Tensor], moved: Tensor, times: list[int]) -> None:
    """Give the running mean and variance of each step their new values, and count its batches, in place.

    Args:
        statistics: means and variances by turns, ``(C,)`` each.
        counters: one for each step.
        moved: the new values, ``(S, 2, C)``.
        times: what is added to the counters.
    """
    if moved.is_cpu and ops.allowed("cpu") and kernels.load():
        torch.ops.normzoo.recurrence_count(statistics, counters, moved, times)
    else:
        torch._foreach_copy_(statistics, list(moved.flatten(0, 1).unbind()))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(counters, times)  # pyright: ignore[reportPrivateImportUsage]


def reference(
    x: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    gain_input: Tensor | None,
    bias_input: Tensor,
    gain_hidden: Tensor | None,
    bias_hidden: Tensor,
    gain_cell: Tensor | None,
    bias_cell: Tensor | None,
    mask: Tensor | None,
    running_input: Tensor | None,
    running_hidden: Tensor | None,
    running_cell: Tensor | None,
    cell: int,
    kinds: Sequence[int],
    eps: Sequence[float],
    momentum: Sequence[float],
) -> tuple[Tensor, list[Tensor | None]]:
    """What the operator computes, one step after another, in any dtype: the outputs and the running statistics."""
    gains, biases = (gain_input, gain_hidden, gain_cell), (bias_input, bias_hidden, bias_cell)
    moving = [None if r is None else r.clone() for r in (running_input, running_hidden, running_cell)]
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask

    def norm(at: int, value: Tensor, t: int) -> Tensor:
        kind, here, running = KINDS[kinds[at]], real[:, t, None], moving[at]
        n = int(here.sum())
        if kind in ("layer", "rms"):
            if kind == "layer":
                value = value - value.mean(1, keepdim=True)
            value = value * torch.rsqrt(value.square().mean(1, keepdim=True) + eps[at])
        elif kind == "running" or (kind == "batch" and running is not None and n < min(2, len(x))):
            assert running is not None
            mean, var = running[min(t, len(running) - 1)].clone()
            value = (value - mean) * torch.rsqrt(var + eps[at])
        elif kind == "batch":
            mean = torch.where(here, value, 0).sum(0) / max(n, 1)
            value = torch.where(here, value - mean, 0)
            var = value.square().sum(0) / max(n, 1)
            value = value * torch.rsqrt(var + eps[at])
            if running is not None and n:
                new = torch.stack([mean, var * (n / max(n - 1, 1))]).detach()
                running[min(t, len(running) - 1)].lerp_(new, momentum[at])
        gain, bias = gains[at], biases[at]
        value = value if gain is None else value * gain
        return value if bias is None else value + bias

    h = c = x.new_zeros(len(x), weight_hh.shape[1])
    outputs = []
    for t, x_t in enumerate(x.unbind(1)):
        u = norm(0, x_t if weight_ih is None else x_t @ weight_ih.T, t)
        v = norm(1, h @ weight_hh.T, t)
        new_c = c
        if CELLS[cell] == "lstm":
            i, f, g, o = (u + v).chunk(4, 1)
            new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            new_h = o.sigmoid() * norm(2, new_c, t).tanh()
        elif CELLS[cell] == "gru":
            (ur, uz, un), (vr, vz, vn) = u.chunk(3, 1), v.chunk(3, 1)
            z = (uz + vz).sigmoid()
            new_h = (1 - z) * (un + (ur + vr).sigmoid() * vn).tanh() + z * h
        else:
            new_h = (u + v).tanh()
        h, c = (torch.where(real[:, t, None], new, old) for new, old in ((new_h, h), (new_c, c)))
        outputs.append(h)
    return torch.stack(outputs, 1), moving


# ---- what torch needs to know of the operators -----------------------------------------------------------------------

_LEARNED = 9  # the first so many arguments have gradients


def describe(
    name: str, shapes: Callable[..., tuple[Tensor, ...]], library: torch.library.Library | None = None
) -> None:
    """Tell torch the shapes of an operator's results, and that ``{name}_backward`` computes its gradient.

    Args:
        name: of an operator that takes and returns what ``normzoo::recurrence`` does; what it keeps for the gradient is
            its own affair.
        shapes: of its results.
        library: where it is defined, if in Python.
    """
    torch.library.register_fake(f"normzoo::{name}", shapes, lib=library)
    torch.library.register_fake(f"normzoo::{name}_backward", _shapes_backward, lib=library)
    compute = getattr(torch.ops.normzoo, f"{name}_backward")
    torch.library.register_autograd(f"normzoo::{name}", partial(_backward, compute), setup_context=_setup, lib=library)


def _declare() -> None:
    describe("recurrence", _shapes)
    torch.library.register_fake("normzoo::recurrence_count", lambda statistics, counters, moved, times: None)


def _shapes(
    x: Tensor, weight_ih: Tensor | None, weight_hh: Tensor, gain_input: Tensor | None, bias_input: Tensor,
    gain_hidden: Tensor | None, bias_hidden: Tensor, gain_cell: Tensor | None, bias_cell: Tensor | None,
    mask: Tensor | None, running_input: Tensor | None, running_hidden: Tensor | None, running_cell: Tensor | None,
    cell: int, kinds: Sequence[int], eps: Sequence[float], momentum: Sequence[float], keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, steps, _ = x.shape
    rows, width = weight_hh.shape
    names = [KINDS[kind] for kind in kinds]
    raw = [keep and name != "none" for name in names]

    def made(needed: bool, *shape: int) -> Tensor:
        return x.new_empty(shape if needed else (0,))

    stats = [
        made(needed, steps, 2, batch if name in ("layer", "rms") else channels)
        for needed, name, channels in zip(raw, names, (rows, rows, width), strict=True)
    ]
    moved = [x.new_empty(0 if r is None else r.shape) for r in (running_input, running_hidden, running_cell)]
    return (
        x.new_empty(batch, steps, width),
        made(raw[0], steps, batch, rows),
        made(raw[1], steps, batch, rows),
        made(keep and CELLS[cell] != "tanh" and not (raw[0] and raw[1]), steps, batch, 4 * width),
        made(keep and CELLS[cell] == "lstm", steps, batch, width),
        *stats,
        *moved,
    )


def _shapes_backward(
    dout: Tensor, out: Tensor, u: Tensor, v: Tensor, acts: Tensor, c: Tensor, stats_input: Tensor, stats_hidden: Tensor,
    stats_cell: Tensor, x: Tensor, weight_ih: Tensor | None, weight_hh: Tensor, gain_input: Tensor | None,
    bias_input: Tensor, gain_hidden: Tensor | None, bias_hidden: Tensor, gain_cell: Tensor | None,
    bias_cell: Tensor | None, mask: Tensor | None, cell: int, kinds: Sequence[int], eps: Sequence[float],
    tracked: Sequence[int], needs_x: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    learned = (
        x if needs_x else None, weight_ih, weight_hh, gain_input, bias_input, gain_hidden, bias_hidden, gain_cell,
        bias_cell,
    )  # fmt: skip
    return tuple(x.new_empty(0 if t is None else t.shape) for t in learned)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:13], *output[:8])
    ctx.settings = inputs[13:17]


def _backward(
    compute: Callable[..., tuple[Tensor, ...]], ctx: Any, dout: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 18
    if dout is None:
        return nothing
    saved = ctx.saved_tensors  # which can be asked for once only
    inputs, kept = saved[:13], saved[13:]
    needed = ctx.needs_input_grad[:_LEARNED]
    if torch.is_grad_enabled() or transformed():
        return _backward_again(inputs, ctx.settings, needed, dout) + nothing[_LEARNED:]
    cell, kinds, eps, _ = ctx.settings
    tracked = [int(running is not None) for running in inputs[10:]]
    grads = compute(dout, *kept, *inputs[:10], cell, kinds, eps, tracked, needed[0])
    return tuple(g if need else None for g, need in zip(grads, needed, strict=True)) + nothing[_LEARNED:]


def _backward_again(
    inputs: Sequence[Tensor | None], settings: Sequence[Any], needed: Sequence[bool], dout: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradient by the reference: it has a gradient itself, and many can be taken at once."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # views: the gradient of each input alone, even where one was computed from another
        views = [None if t is None else t.view_as(t) for t in inputs]
        out, _ = reference(*views, *settings)  # pyright: ignore[reportArgumentType]
        learned = [t for t, need in zip(views, needed, strict=False) if t is not None and need]
        grads = iter(torch.autograd.grad(out, learned, dout, create_graph=again))
    return tuple(next(grads) if need else None for need in needed)


kernels.declare(_declare)
