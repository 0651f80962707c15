"""GPU kernels for the one operation, in Triton.

The pattern becomes a nest of loops over memory (:mod:`normzoo.ops.triton.plan`), and a few kernels serve every nest
(:mod:`normzoo.ops.triton.kernels`): in one pass where a tile of registers holds whole statistics; otherwise each
program reduces its share, the shares are merged, and a second pass applies them. Results do not depend on the order in
which programs run. For CUDA tensors, and for CPU tensors where Triton's interpreter is on (``TRITON_INTERPRET=1``).

The operators are opaque to ``torch.compile``. Showing it the kernels (``torch.library.triton_op``) would win nothing,
as it fuses nothing into them, and would tie compiled code to the sizes from which the launch parameters follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from normzoo.ops import affine, reference
from normzoo.ops.cpu import transformed
from normzoo.ops.pattern import Pattern
from normzoo.ops.reference import Moments
from normzoo.ops.sync import merge, total_gradients
from normzoo.ops.triton import kernels
from normzoo.ops.triton.plan import DIMENSIONS, Nest, Plan, Tile, depth, make_plan, statistic_shape

_HALF = (torch.float16, torch.bfloat16)


def serves(
    x: Tensor,
    pattern: Pattern,
    *,
    channels_last: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    given: Moments | None = None,
    sync: bool = False,
) -> bool:
    """Whether the kernels can do this; what they cannot, the formula does."""
    if not (kernels.AVAILABLE if x.is_cuda else kernels.INTERPRETED and x.device.type == "cpu"):
        return False
    if (sync and not _eager(x)) or x.numel() == 0 or not (x.dtype == torch.float32 or x.dtype in _HALF):
        return False
    parameters = [p for p in (weight, bias) if p is not None]
    if any(p.dtype not in (torch.float32, x.dtype) or p.device != x.device for p in parameters):
        return False
    if given is not None and (given.mean.requires_grad or given.var.requires_grad):
        return False
    if transformed():
        return False
    find = depth if torch.compiler.is_compiling() else _cached_depth
    return find(pattern, channels_last, bool(parameters), mask is not None) <= DIMENSIONS


_cached_depth = lru_cache(depth)
_cached_text = lru_cache(str)


def _eager(x: Tensor) -> bool:
    """Whether nobody traces: then the way around the dispatcher halves the time that a small call takes."""
    return not torch.compiler.is_compiling() and type(x) is Tensor and not torch._C._len_torch_dispatch_stack()


def standardize(
    x: Tensor,
    pattern: Pattern,
    options: Mapping[str, int],
    *,
    channels_last: bool,
    eps: float,
    centred: bool,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    given: Moments | None = None,
    rescale: Callable[[Moments], tuple[Tensor | None, Tensor | None]] | None = None,
    sync: bool = False,
    group: ProcessGroup | None = None,
) -> tuple[Tensor, Moments | None]:
    """:func:`normzoo.ops.standardize` for what :func:`serves` accepts; no statistics come back when they are given."""
    x, mask = x.contiguous(), None if mask is None else mask.contiguous()
    sizes = [options[axis] for axis in pattern.free]
    text = str(pattern) if torch.compiler.is_compiling() else _cached_text(pattern)
    where = text, sizes, channels_last
    mean = var = count = moments = None
    if given is not None:
        mean, var = (m.to(torch.float32).reshape(-1).contiguous() for m in (given.mean, given.var))
    elif rescale is not None or sync:
        mean, var, count = torch.ops.normzoo.triton_moments(x.detach(), mask, *where, centred)
        moments = Moments(mean, var, _number(x, var) if mask is None else count)
        if sync:
            moments = Moments(*merge(*moments, group))
        mean, var, number = moments
        count = number if isinstance(number, Tensor) else None
        if rescale is not None:
            parameters = rescale(moments)
            weight, bias = (p if p is None or p.dtype == x.dtype else p.to(torch.float32) for p in parameters)
    inputs = x, weight, bias, mask, mean, var, count, *where, eps, centred, moments is not None
    if sync and given is None:
        y, *_ = _Synchronized.apply(*inputs, group)  # pyright: ignore[reportGeneralTypeIssues]
        return y, moments
    compute = _Standardize.apply if _eager(x) else torch.ops.normzoo.triton_standardize
    y, *found = compute(*inputs)
    if given is None and rescale is None:
        mean, var, count = found
        moments = Moments(mean, var, _number(x, var) if mask is None else count)
    return y, moments


def _number(x: Tensor, var: Tensor) -> int:
    """How many elements each statistic has without a mask."""
    return x.numel() // max(var.numel(), 1)


# ---- what the operators do -------------------------------------------------------------------------------------------


def _plan(x: Tensor, pattern: str, options: Sequence[int], channels_last: bool, affine: bool, masked: bool) -> Plan:
    return make_plan(
        pattern, tuple(options), _canonical(x, channels_last), channels_last, affine, masked, x.element_size(),
        _processors(x.device.index),
    )  # fmt: skip


def _canonical(x: Tensor, channels_last: bool) -> tuple[int, int, int]:
    first, second, third = x.shape
    return (first, third, second) if channels_last else (first, second, third)


@lru_cache
def _processors(index: int | None) -> int:
    """How many multiprocessors a GPU has; a few in the interpreter, where each program takes its turn."""
    return 2 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def _on(x: Tensor) -> AbstractContextManager[object]:
    """Kernels are launched on the current device, which may be another than that of ``x``."""
    return nullcontext() if not x.is_cuda or x.get_device() == torch.cuda.current_device() else torch.cuda.device_of(x)


def _launch(kernel: Any, nest: Nest, tile: Tile, *arguments: Any, **constants: Any) -> None:
    x, y, z = tile.blocks
    innermost = nest.sizes[-1]
    kernel[(tile.programs,)](
        *arguments,
        ALIGN=min(16, innermost & -innermost),
        STAGES=tile.stages,
        BX=x,
        BY=y,
        BZ=z,
        num_warps=tile.warps,
        **constants,
    )


def _room(like: Tensor, shape: Sequence[int], counted: bool, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """For mean, variance and, with a mask, number of elements."""
    var = like.new_empty(shape, dtype=torch.float32)
    mean = torch.empty_like(var) if centred else torch.zeros_like(var)
    return mean, var, torch.empty_like(var) if counted else var.new_empty(0)


def _reduce(x: Tensor, mask: Tensor | None, mean: Tensor | None, var: Tensor, count: Tensor | None, p: Plan) -> None:
    """Fill in the statistics in two steps: each program's share, then all of them."""
    tile, nest = p.share, p.nest
    counts, squares, means = x.new_empty((3, tile.step, p.statistics), dtype=torch.float32).unbind()
    means = None if mean is None else means
    _launch(
        kernels.moments, nest, tile, x, mask, counts, means, squares, *nest.sizes, tile.loops, tile.step, p.statistics,
        KEPT=nest.kept, MASK=nest.mask,
    )  # fmt: skip
    columns = 16 if p.statistics < 4096 else 128
    kernels.merge[(-(-p.statistics // columns),)](
        counts, means, squares, count, mean, var, p.statistics, tile.step,
        PARTS=min(2048 // columns, 1 << (tile.step - 1).bit_length()), BLOCK=columns, num_warps=4,
    )  # fmt: skip


def _moments(
    x: Tensor, mask: Tensor | None, pattern: str, options: Sequence[int], channels_last: bool, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    p = _plan(x, pattern, options, channels_last, False, mask is not None)
    mean, var, count = _room(x, p.shape, mask is not None, centred)
    with _on(x):
        _reduce(x, mask, mean if centred else None, var, None if mask is None else count, p)
    return mean, var, count


def _moments_shapes(
    x: Tensor, mask: Tensor | None, pattern: str, options: Sequence[int], channels_last: bool, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _room(x, _statistic_shape(x, pattern, options, channels_last), mask is not None, centred)


def _statistic_shape(x: Tensor, pattern: str, options: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    parsed = Pattern.parse(pattern)
    sizes = dict(zip(parsed.free, options, strict=True))
    return statistic_shape(parsed, sizes, _canonical(x, channels_last), channels_last)


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    count: Tensor | None,
    pattern: str,
    options: Sequence[int],
    channels_last: bool,
    eps: float,
    centred: bool,
    own: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p = _plan(x, pattern, options, channels_last, weight is not None or bias is not None, mask is not None)
    nest, tile, given = p.nest, None, var is not None
    y = torch.empty_like(x)
    room = _room(x, (0,) if given else p.shape, mask is not None and not given, centred)
    with _on(x):
        if var is None:
            mean, var, count = room[0] if centred else None, room[1], None if mask is None else room[2]
            tile = p.forward
            if tile is None:
                _reduce(x, mask, mean, var, count, p)
                given = True
        tile = tile or p.forward_given
        _launch(
            kernels.forward, nest, tile, x, y, weight, bias, mask, mean if centred else None, var, count,
            *nest.sizes, tile.loops, tile.step, float(p.number), eps,
            KEPT=nest.kept, CHANNEL=nest.channel, MASK=nest.mask, GIVEN=given, STILL=given and p.still,
        )  # fmt: skip
    return y, *room


def _forward_shapes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    count: Tensor | None,
    pattern: str,
    options: Sequence[int],
    channels_last: bool,
    eps: float,
    centred: bool,
    own: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (0,) if var is not None else _statistic_shape(x, pattern, options, channels_last)
    return torch.empty_like(x), *_room(x, shape, mask is not None and var is None, centred)


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    pattern: str,
    options: Sequence[int],
    channels_last: bool,
    eps: float,
    centred: bool,
    given: bool,
    gain: bool,
    shift: bool,
    meet: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]] | None = None,
) -> tuple[Tensor, Tensor]:
    p = _plan(x, pattern, options, channels_last, weight is not None or shift, mask is not None)
    nest, tile = p.nest, None if given or meet else p.backward
    dx = torch.empty_like(x)
    means = mean if centred else None
    along = plain = None
    with _on(x):
        if tile is None and not given:
            share = p.share
            sums = x.new_empty((1 + centred, share.step, p.statistics), dtype=torch.float32)
            _launch(
                kernels.sums, nest, share, x, dy, weight, mask, means, var, sums[0], sums[1] if centred else None,
                *nest.sizes, share.loops, share.step, p.statistics, eps,
                KEPT=nest.kept, CHANNEL=nest.channel, MASK=nest.mask,
            )  # fmt: skip
            along, *rest = sums.sum(1).unbind()
            plain = rest[0] if centred else None
            if meet is not None:
                along, plain = meet(along, plain)
        summed = tile is None
        tile = tile or p.backward_given
        shares = x.new_empty((gain + shift, tile.step, p.channels), dtype=torch.float32)
        _launch(
            kernels.backward, nest, tile, x, dy, dx, weight, mask, means, var, count, along, plain,
            shares[0] if gain else None, shares[-1] if shift else None,
            *nest.sizes, tile.loops, tile.step, p.channels, float(p.number), eps,
            KEPT=nest.kept, CHANNEL=nest.channel, MASK=nest.mask, SUMMED=summed, STILL=summed and p.still,
        )  # fmt: skip
    return dx, shares.sum(1)


def _backward_shapes(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None,
    pattern: str,
    options: Sequence[int],
    channels_last: bool,
    eps: float,
    centred: bool,
    given: bool,
    gain: bool,
    shift: bool,
) -> tuple[Tensor, Tensor]:
    channels = x.shape[2 if channels_last else 1]
    return torch.empty_like(x), x.new_empty((gain + shift, channels), dtype=torch.float32)


# ---- their derivatives -----------------------------------------------------------------------------------------------


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, mask, mean, var, count, *ctx.settings, own = inputs
    _, *moments = output
    ctx.given = var is not None and not own
    ctx.bias_dtype = None if bias is None else bias.dtype
    if var is None:
        mean, var, count = moments
        count = None if mask is None else count
    ctx.save_for_backward(x, weight, mask, mean, var, count)
    ctx.mark_non_differentiable(*moments)


def _differentiate(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, dy, torch.ops.normzoo.triton_standardize_backward)


def _gradients(ctx: Any, dy: Tensor, compute: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor | None, ...]:
    x, weight, mask, mean, var, count = ctx.saved_tensors
    gain, shift = ctx.needs_input_grad[1:3]
    dx, parameters = compute(dy.contiguous(), x, weight, mask, mean, var, count, *ctx.settings, ctx.given, gain, shift)
    return (
        dx,
        parameters[0].to(weight.dtype) if gain else None,
        parameters[-1].to(ctx.bias_dtype) if shift else None,
        *[None] * 10,
    )


class _Standardize(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        output = _forward(*inputs)
        _save_forward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # with gradients on, somebody will differentiate this in turn
        return _differentiate(ctx, dy) if torch.is_grad_enabled() else _gradients(ctx, dy, _backward)


class _Synchronized(torch.autograd.Function):
    """The same by statistics of all processes of a group, whose sums they add up in the backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *own, ctx.group = inputs
        output = _forward(*own)
        _save_forward(ctx, tuple(own), output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        var, eps = ctx.saved_tensors[4], ctx.settings[3]
        scale = torch.rsqrt(var.flatten() + eps)

        def meet(along: Tensor, plain: Tensor | None) -> tuple[Tensor, Tensor | None]:
            to_mean = torch.zeros_like(along) if plain is None else -scale * plain
            to_mean, to_var = total_gradients(to_mean, along * scale * scale / -2, ctx.group)
            return -2 * to_var / scale / scale, None if plain is None else -to_mean / scale

        # as in the formula: where the input is a constant on every rank, they do not meet
        compute = partial(_backward, meet=meet if ctx.needs_input_grad[0] else None)
        return *_gradients(ctx, dy, compute), None


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    dy, x, weight, mask, mean, var, _, *ctx.settings = inputs
    ctx.save_for_backward(dy, x, weight, mask, mean, var)


def _differentiate_twice(ctx: Any, ddx: Tensor, dparameters: Tensor) -> tuple[Tensor | None, ...]:
    """By the formula, whose first derivative is differentiated again."""
    pattern, options, channels_last, eps, centred, given, gain, shift = ctx.settings
    dy, x, weight, mask, mean, var = ctx.saved_tensors
    parsed = Pattern.parse(pattern)
    with torch.enable_grad():
        dy32, x32 = (t.detach().float().requires_grad_() for t in (dy, x))
        w32 = None if weight is None else weight.detach().float().requires_grad_()
        b32 = x32.new_zeros(x.shape[2 if channels_last else 1]).requires_grad_()
        y, _ = reference.standardize(
            x32, parsed, dict(zip(parsed.free, options, strict=True)), channels_last=channels_last, eps=eps,
            centred=centred, mask=mask, given=Moments(mean, var, 1) if given else None,
        )  # fmt: skip
        y = affine(y, w32, b32, channels_last)
        if mask is not None:
            y = torch.where(mask.unsqueeze(-1 if channels_last else 1), y, 0)
        of = [x32, *([w32] if gain and w32 is not None else []), *([b32] if shift else [])]
        first = torch.autograd.grad([y], of, [dy32], create_graph=True)
    to = [dy32, x32, *([] if w32 is None else [w32])]
    # with given statistics the first derivative does not depend on x
    second = torch.autograd.grad(first, to, [ddx.float(), *dparameters], allow_unused=True)
    # autograd brings them to the dtypes of the inputs
    return (*second, *[None] * (15 - len(second)))


# ---- the operators ---------------------------------------------------------------------------------------------------

_SETTINGS = "str pattern, int[] options, bool channels_last, float eps, bool centred"
_library = torch.library.Library("normzoo", "FRAGMENT")
_library.define(
    "triton_standardize(Tensor x, Tensor? weight, Tensor? bias, Tensor? mask, Tensor? mean, Tensor? var, "
    f"Tensor? count, {_SETTINGS}, bool own) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "triton_standardize_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? mask, Tensor mean, Tensor var, "
    f"Tensor? count, {_SETTINGS}, bool given, bool gain, bool shift) -> (Tensor, Tensor)"
)
_library.define(
    "triton_moments(Tensor x, Tensor? mask, str pattern, int[] options, bool channels_last, bool centred)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.impl("triton_moments", _moments, "CompositeExplicitAutograd")
torch.library.register_fake("normzoo::triton_moments", _moments_shapes, lib=_library)
for _name, _do, _shapes, _derive, _save in (
    ("triton_standardize", _forward, _forward_shapes, _differentiate, _save_forward),
    ("triton_standardize_backward", _backward, _backward_shapes, _differentiate_twice, _save_backward),
):
    _library.impl(_name, _do, "CompositeExplicitAutograd")
    torch.library.register_fake(f"normzoo::{_name}", _shapes, lib=_library)
    torch.library.register_autograd(f"normzoo::{_name}", _derive, setup_context=_save, lib=_library)
