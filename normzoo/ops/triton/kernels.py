"""The kernels: tiles of three dimensions in an index space of five, whose roles :mod:`normzoo.ops.triton.plan` gives.

The dimensions are, from the outermost, ``n1``, ``n2`` and those of the tile, ``nx``, ``ny`` and ``nz``; a set of them
is a number with the bits 16, 8, 4, 2 and 1 in this order. A program stays where it is along some dimensions and walks
along the others, each program its own share. So the gain is read once and sums for parameters stay in registers, and
nothing is added atomically: no result depends on the order in which programs run.
"""

# what only some variants of a kernel have, they alone use; a type expression here is a mark for Triton's compiler
# pyright: reportInvalidTypeForm=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import importlib
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

AVAILABLE = find_spec("triton") is not None
# not plain imports: without Triton this module loads, and its kernels are functions that nobody calls
triton: Any = importlib.import_module("triton") if AVAILABLE else None
tl: Any = importlib.import_module("triton.language") if AVAILABLE else None
# decided when Triton is imported: its interpreter runs these kernels on a CPU, slowly, for tests
INTERPRETED: bool = AVAILABLE and triton.knobs.runtime.interpret
# numbers that change from batch to batch, and for which no compiled kernel is worth a variant of its own
_NUMBERS = ("n1", "n2", "loops", "step", "statistics", "channels", "parts")
jit: Callable[[Any], Any] = triton.jit(do_not_specialize=_NUMBERS) if AVAILABLE else lambda kernel: kernel


@jit
def _corner(fixed, loop, n1, n2, nx, ny, nz, bx: tl.constexpr, by: tl.constexpr, bz: tl.constexpr, STAY: tl.constexpr):
    """Where a tile starts: ``fixed`` counts along the dimensions that a program stays in, ``loop`` along the others."""
    kx = tl.cdiv(nx, bx)
    ky = tl.cdiv(ny, by)
    kz = tl.cdiv(nz, bz)
    if STAY & 1:
        z = fixed % kz
        fixed = fixed // kz
    else:
        z = loop % kz
        loop = loop // kz
    if STAY & 2:
        y = fixed % ky
        fixed = fixed // ky
    else:
        y = loop % ky
        loop = loop // ky
    if STAY & 4:
        x = fixed % kx
        fixed = fixed // kx
    else:
        x = loop % kx
        loop = loop // kx
    if STAY & 8:
        o2 = fixed % n2
        fixed = fixed // n2
    else:
        o2 = loop % n2
        loop = loop // n2
    if STAY & 16:
        o1 = fixed
    else:
        o1 = loop
    return o1, o2, x * bx, y * by, z * bz


@jit
def _base(o1, o2, x, y, z, n2, nx, ny, nz, SET: tl.constexpr):
    """The row-major index of a tile's corner over a set of dimensions; it may need 64 bits."""
    i = (o1 * 0).to(tl.int64)
    if SET & 16:
        i += o1
    if SET & 8:
        i = i * n2 + o2
    if SET & 4:
        i = i * nx + x
    if SET & 2:
        i = i * ny + y
    if SET & 1:
        i = i * nz + z
    return i


@jit
def _inner(x, y, z, nx, ny, nz, SET: tl.constexpr):
    """The row-major index within a tile over a set of dimensions; the tile has size one along the others."""
    i = tl.zeros([1, 1, 1], tl.int32)
    if SET & 4:
        i = i * nx + x
    if SET & 2:
        i = i * ny + y
    if SET & 1:
        i = i * nz + z
    return i


@jit
def _inside(x0, y0, z0, x, y, z, nx, ny, nz, SET: tl.constexpr):
    """Which elements of a tile exist."""
    inside = tl.full([1, 1, 1], 1, tl.int1)
    if SET & 4:
        inside = inside & (x0 + x < nx)
    if SET & 2:
        inside = inside & (y0 + y < ny)
    if SET & 1:
        inside = inside & (z0 + z < nz)
    return inside


@jit
def _total(tile, KEEP: tl.constexpr):
    """The sum along the dimensions that are not kept, which stay with size one."""
    if not KEEP & 1:
        tile = tl.sum(tile, axis=2, keep_dims=True)
    if not KEEP & 2:
        tile = tl.sum(tile, axis=1, keep_dims=True)
    if not KEEP & 4:
        tile = tl.sum(tile, axis=0, keep_dims=True)
    return tile


@jit
def _extent(x0, y0, z0, nx, ny, nz, bx: tl.constexpr, by: tl.constexpr, bz: tl.constexpr, KEPT: tl.constexpr):
    """How many elements a tile has for each statistic."""
    n = (x0 * 0 + 1).to(tl.float32)
    if not KEPT & 4:
        n *= tl.minimum(nx - x0, bx)
    if not KEPT & 2:
        n *= tl.minimum(ny - y0, by)
    if not KEPT & 1:
        n *= tl.minimum(nz - z0, bz)
    return n


@jit
def _parameter(pointer, place, known):
    """A gain or shift in float32, or nothing."""
    value = 0.0
    if pointer is not None:
        value = tl.load(pointer + place, mask=known, other=0).to(tl.float32)
    return value


@jit
def _statistic(pointer, place, exists):
    """A statistic, or nothing."""
    value = 0.0
    if pointer is not None:
        value = tl.load(pointer + place, mask=exists, other=0)
    return value


@jit
def _mean(pointer, count_ptr, number, place, exists):
    """The mean from a sum, or nothing."""
    value = 0.0
    if pointer is not None:
        value = tl.load(pointer + place, mask=exists, other=0)
        if count_ptr is not None:
            value /= tl.maximum(tl.load(count_ptr + place, mask=exists, other=1), 1)
        else:
            value /= number
    return value


@jit
def forward(
    x_ptr, y_ptr, weight_ptr, bias_ptr, mask_ptr, mean_ptr, var_ptr, count_ptr,
    n1, n2, nx, ny, nz, loops, step, number, eps,
    KEPT: tl.constexpr, CHANNEL: tl.constexpr, MASK: tl.constexpr, GIVEN: tl.constexpr, STILL: tl.constexpr,
    ALIGN: tl.constexpr, STAGES: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr,
):  # fmt: skip
    """Standardise, scale and shift, by statistics that are ``GIVEN`` or by the tile's own, which it holds whole.

    ``STILL`` is true where statistics are given and are the same for all tiles of a program.
    """
    nz = nz // ALIGN * ALIGN  # tells the compiler how wide it may load
    x = tl.arange(0, BX)[:, None, None]
    y = tl.arange(0, BY)[None, :, None]
    z = tl.arange(0, BZ)[None, None, :]
    first = tl.program_id(0) % step
    fixed = tl.program_id(0) // step

    o1, o2, x0, y0, z0 = _corner(fixed, first, n1, n2, nx, ny, nz, BX, BY, BZ, CHANNEL)
    channel = _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, CHANNEL) + _inner(x, y, z, nx, ny, nz, CHANNEL)
    known = _inside(x0, y0, z0, x, y, z, nx, ny, nz, CHANNEL)
    if STAGES > 1:  # otherwise they come late, and leave the registers to the tile
        weight = _parameter(weight_ptr, channel, known)
        bias = _parameter(bias_ptr, channel, known)
    if STILL:
        statistic = _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, KEPT) + _inner(x, y, z, nx, ny, nz, KEPT)
        exists = _inside(x0, y0, z0, x, y, z, nx, ny, nz, KEPT)
        var = tl.load(var_ptr + statistic, mask=exists, other=1)
        mean = _statistic(mean_ptr, statistic, exists)

    for i in tl.range(first, loops, step, num_stages=STAGES):
        # backwards after a pass that reduced: what that one read last is still in the cache
        o1, o2, x0, y0, z0 = _corner(fixed, loops - 1 - i if GIVEN else i, n1, n2, nx, ny, nz, BX, BY, BZ, CHANNEL)
        start = _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, 31)
        place = _inner(x, y, z, nx, ny, nz, 7)
        inside = _inside(x0, y0, z0, x, y, z, nx, ny, nz, 7)
        real = inside
        if mask_ptr is not None:
            mask = mask_ptr + _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, MASK) + _inner(x, y, z, nx, ny, nz, MASK)
            real = inside & (tl.load(mask, mask=_inside(x0, y0, z0, x, y, z, nx, ny, nz, MASK), other=0) != 0)
        value = tl.load(x_ptr + start + place, mask=inside, other=0).to(tl.float32)
        if mask_ptr is not None:
            value = tl.where(real, value, 0)

        if not STILL:
            statistic = _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, KEPT) + _inner(x, y, z, nx, ny, nz, KEPT)
            exists = _inside(x0, y0, z0, x, y, z, nx, ny, nz, KEPT)
        if GIVEN:
            if not STILL:
                var = tl.load(var_ptr + statistic, mask=exists, other=1)
                mean = _statistic(mean_ptr, statistic, exists)
            if mean_ptr is not None:
                value -= mean
        else:
            n = number
            if mask_ptr is not None:
                count = _total(real.to(tl.float32), KEPT)
                tl.store(count_ptr + statistic, count, mask=exists)
                n = tl.maximum(count, 1)
            if mean_ptr is not None:
                mean = _total(value, KEPT) / n
                tl.store(mean_ptr + statistic, mean, mask=exists)
                value = tl.where(real, value - mean, 0)
            var = _total(value * value, KEPT) / n
            tl.store(var_ptr + statistic, var, mask=exists)

        value *= tl.rsqrt(var + eps)
        if STAGES == 1:
            weight = _parameter(weight_ptr, channel, known)
            bias = _parameter(bias_ptr, channel, known)
        if weight_ptr is not None:
            value *= weight
        if bias_ptr is not None:
            value += bias
        if mask_ptr is not None:
            value = tl.where(real, value, 0)
        tl.store(y_ptr + start + place, value.to(y_ptr.dtype.element_ty), mask=inside)


@jit
def moments(
    x_ptr, mask_ptr, count_ptr, mean_ptr, square_ptr,
    n1, n2, nx, ny, nz, loops, step, statistics,
    KEPT: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr, STAGES: tl.constexpr,
    BX: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr,
):  # fmt: skip
    """Each program's share of the statistics: how many, their mean, the sum of their squared deviations from it."""
    nz = nz // ALIGN * ALIGN
    x = tl.arange(0, BX)[:, None, None]
    y = tl.arange(0, BY)[None, :, None]
    z = tl.arange(0, BZ)[None, None, :]
    first = tl.program_id(0) % step
    fixed = tl.program_id(0) // step
    SX: tl.constexpr = BX if KEPT & 4 else 1
    SY: tl.constexpr = BY if KEPT & 2 else 1
    SZ: tl.constexpr = BZ if KEPT & 1 else 1
    count = tl.zeros([SX, SY, SZ], tl.float32)
    mean = tl.zeros([SX, SY, SZ], tl.float32)
    square = tl.zeros([SX, SY, SZ], tl.float32)
    for i in tl.range(first, loops, step, num_stages=STAGES):
        o1, o2, x0, y0, z0 = _corner(fixed, i, n1, n2, nx, ny, nz, BX, BY, BZ, KEPT)
        start = _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, 31)
        real = _inside(x0, y0, z0, x, y, z, nx, ny, nz, 7)
        value = tl.load(x_ptr + start + _inner(x, y, z, nx, ny, nz, 7), mask=real, other=0).to(tl.float32)
        if mask_ptr is not None:
            mask = mask_ptr + _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, MASK) + _inner(x, y, z, nx, ny, nz, MASK)
            real &= tl.load(mask, mask=_inside(x0, y0, z0, x, y, z, nx, ny, nz, MASK), other=0) != 0
            value = tl.where(real, value, 0)
            n = _total(real.to(tl.float32), KEPT)
        else:
            n = _extent(x0, y0, z0, nx, ny, nz, BX, BY, BZ, KEPT)
        both = count + n
        if mean_ptr is not None:
            centre = _total(value, KEPT) / tl.maximum(n, 1)
            value = tl.where(real, value - centre, 0)
            shift = centre - mean
            share = n / tl.maximum(both, 1)
            mean += shift * share
            square += shift * shift * count * share
        square += _total(value * value, KEPT)
        count = both
    o1, o2, x0, y0, z0 = _corner(fixed, first, n1, n2, nx, ny, nz, BX, BY, BZ, KEPT)
    statistic = _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, KEPT) + _inner(x, y, z, nx, ny, nz, KEPT)
    exists = _inside(x0, y0, z0, x, y, z, nx, ny, nz, KEPT)
    own = first.to(tl.int64) * statistics
    tl.store(count_ptr + own + statistic, count, mask=exists)
    tl.store(square_ptr + own + statistic, square, mask=exists)
    if mean_ptr is not None:
        tl.store(mean_ptr + own + statistic, mean, mask=exists)


@jit
def merge(
    counts_ptr, means_ptr, squares_ptr, count_ptr, mean_ptr, var_ptr, statistics, parts,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The statistics of all from those of each program's share (Chan et al. 1979)."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = column < statistics
    count = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    square = tl.zeros([BLOCK], tl.float32)
    for i in range(0, parts, PARTS):
        row = i + tl.arange(0, PARTS)
        place = row[:, None].to(tl.int64) * statistics + column[None, :]
        inside = (row[:, None] < parts) & exists[None, :]
        counts = tl.load(counts_ptr + place, mask=inside, other=0)
        squares = tl.load(squares_ptr + place, mask=inside, other=0)
        n = tl.sum(counts, axis=0)
        both = count + n
        if mean_ptr is not None:
            means = tl.load(means_ptr + place, mask=inside, other=0)
            centre = tl.sum(counts * means, axis=0) / tl.maximum(n, 1)
            away = means - centre[None, :]
            squares += counts * away * away
            shift = centre - mean
            share = n / tl.maximum(both, 1)
            mean += shift * share
            square += shift * shift * count * share
        square += tl.sum(squares, axis=0)
        count = both
    tl.store(var_ptr + column, square / tl.maximum(count, 1), mask=exists)
    if mean_ptr is not None:
        tl.store(mean_ptr + column, mean, mask=exists)
    if count_ptr is not None:
        tl.store(count_ptr + column, count, mask=exists)


@jit
def sums(
    x_ptr, dy_ptr, weight_ptr, mask_ptr, mean_ptr, var_ptr, along_ptr, plain_ptr,
    n1, n2, nx, ny, nz, loops, step, statistics, eps,
    KEPT: tl.constexpr, CHANNEL: tl.constexpr, MASK: tl.constexpr, ALIGN: tl.constexpr,
    STAGES: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr,
):  # fmt: skip
    """Each program's share of the sums that the input's gradient needs: of the gradient, plain and along the output."""
    nz = nz // ALIGN * ALIGN
    x = tl.arange(0, BX)[:, None, None]
    y = tl.arange(0, BY)[None, :, None]
    z = tl.arange(0, BZ)[None, None, :]
    first = tl.program_id(0) % step
    fixed = tl.program_id(0) // step
    o1, o2, x0, y0, z0 = _corner(fixed, first, n1, n2, nx, ny, nz, BX, BY, BZ, KEPT)
    statistic = _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, KEPT) + _inner(x, y, z, nx, ny, nz, KEPT)
    exists = _inside(x0, y0, z0, x, y, z, nx, ny, nz, KEPT)
    inverse = tl.rsqrt(tl.load(var_ptr + statistic, mask=exists, other=1) + eps)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + statistic, mask=exists, other=0)
    along = tl.zeros([BX, BY, BZ], tl.float32)
    plain = tl.zeros([BX, BY, BZ], tl.float32)
    for i in tl.range(first, loops, step, num_stages=STAGES):
        o1, o2, x0, y0, z0 = _corner(fixed, i, n1, n2, nx, ny, nz, BX, BY, BZ, KEPT)
        start = _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, 31)
        place = _inner(x, y, z, nx, ny, nz, 7)
        real = _inside(x0, y0, z0, x, y, z, nx, ny, nz, 7)
        value = tl.load(x_ptr + start + place, mask=real, other=0).to(tl.float32)
        slope = tl.load(dy_ptr + start + place, mask=real, other=0).to(tl.float32)
        if mask_ptr is not None:
            mask = mask_ptr + _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, MASK) + _inner(x, y, z, nx, ny, nz, MASK)
            real &= tl.load(mask, mask=_inside(x0, y0, z0, x, y, z, nx, ny, nz, MASK), other=0) != 0
            value = tl.where(real, value, 0)
            slope = tl.where(real, slope, 0)
        if weight_ptr is not None:
            channel = _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, CHANNEL) + _inner(x, y, z, nx, ny, nz, CHANNEL)
            known = _inside(x0, y0, z0, x, y, z, nx, ny, nz, CHANNEL)
            slope *= tl.load(weight_ptr + channel, mask=known, other=0).to(tl.float32)
        if mean_ptr is not None:
            value -= mean  # what is not real has no slope
            plain += slope
        along += slope * value
    own = first.to(tl.int64) * statistics + statistic
    tl.store(along_ptr + own, _total(along, KEPT) * inverse, mask=exists)
    if plain_ptr is not None:
        tl.store(plain_ptr + own, _total(plain, KEPT), mask=exists)


@jit
def backward(
    x_ptr, dy_ptr, dx_ptr, weight_ptr, mask_ptr, mean_ptr, var_ptr, count_ptr, along_ptr, plain_ptr,
    gain_ptr, shift_ptr, n1, n2, nx, ny, nz, loops, step, channels, number, eps,
    KEPT: tl.constexpr, CHANNEL: tl.constexpr, MASK: tl.constexpr, SUMMED: tl.constexpr, STILL: tl.constexpr,
    ALIGN: tl.constexpr, STAGES: tl.constexpr, BX: tl.constexpr, BY: tl.constexpr, BZ: tl.constexpr,
):  # fmt: skip
    """The gradient of the input, and each program's share of those of gain and shift.

    ``SUMMED`` is true where the sums over a statistic are given, or where there are none as the statistics are
    constants; otherwise a tile holds statistics whole and sums for itself. ``STILL`` is true where the statistics are
    the same for all tiles of a program.
    """
    nz = nz // ALIGN * ALIGN
    x = tl.arange(0, BX)[:, None, None]
    y = tl.arange(0, BY)[None, :, None]
    z = tl.arange(0, BZ)[None, None, :]
    first = tl.program_id(0) % step
    fixed = tl.program_id(0) // step
    # sums go no further within the loop than the statistics need
    CELL: tl.constexpr = 7 if SUMMED else KEPT | CHANNEL
    SX: tl.constexpr = BX if CELL & 4 else 1
    SY: tl.constexpr = BY if CELL & 2 else 1
    SZ: tl.constexpr = BZ if CELL & 1 else 1

    o1, o2, x0, y0, z0 = _corner(fixed, first, n1, n2, nx, ny, nz, BX, BY, BZ, CHANNEL)
    channel = _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, CHANNEL) + _inner(x, y, z, nx, ny, nz, CHANNEL)
    known = _inside(x0, y0, z0, x, y, z, nx, ny, nz, CHANNEL)
    if STAGES > 1:
        weight = _parameter(weight_ptr, channel, known)
    if STILL:
        statistic = _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, KEPT) + _inner(x, y, z, nx, ny, nz, KEPT)
        exists = _inside(x0, y0, z0, x, y, z, nx, ny, nz, KEPT)
        inverse = tl.rsqrt(tl.load(var_ptr + statistic, mask=exists, other=1) + eps)
        mean = _statistic(mean_ptr, statistic, exists)
        along_mean = _mean(along_ptr, count_ptr, number, statistic, exists)
        plain_mean = _mean(plain_ptr, count_ptr, number, statistic, exists)
    if gain_ptr is not None:
        gain = tl.zeros([SX, SY, SZ], tl.float32)
    if shift_ptr is not None:
        shift = tl.zeros([SX, SY, SZ], tl.float32)

    for i in tl.range(first, loops, step, num_stages=STAGES):
        o1, o2, x0, y0, z0 = _corner(fixed, loops - 1 - i if SUMMED else i, n1, n2, nx, ny, nz, BX, BY, BZ, CHANNEL)
        start = _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, 31)
        place = _inner(x, y, z, nx, ny, nz, 7)
        inside = _inside(x0, y0, z0, x, y, z, nx, ny, nz, 7)
        value = tl.load(x_ptr + start + place, mask=inside, other=0).to(tl.float32)
        slope = tl.load(dy_ptr + start + place, mask=inside, other=0).to(tl.float32)
        if mask_ptr is not None:
            mask = mask_ptr + _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, MASK) + _inner(x, y, z, nx, ny, nz, MASK)
            real = inside & (tl.load(mask, mask=_inside(x0, y0, z0, x, y, z, nx, ny, nz, MASK), other=0) != 0)
            value = tl.where(real, value, 0)
            slope = tl.where(real, slope, 0)

        if not STILL:
            statistic = _base(o1, o2, x0, y0, z0, n2, nx, ny, nz, KEPT) + _inner(x, y, z, nx, ny, nz, KEPT)
            exists = _inside(x0, y0, z0, x, y, z, nx, ny, nz, KEPT)
            inverse = tl.rsqrt(tl.load(var_ptr + statistic, mask=exists, other=1) + eps)
            mean = _statistic(mean_ptr, statistic, exists)
            along_mean = _mean(along_ptr, count_ptr, number, statistic, exists)
            plain_mean = _mean(plain_ptr, count_ptr, number, statistic, exists)
        if mean_ptr is not None:
            value -= mean
        value *= inverse

        along = slope * value
        plain = slope
        if not SUMMED:
            along = _total(along, CELL)
            if mean_ptr is not None or shift_ptr is not None:
                plain = _total(slope, CELL)
        if gain_ptr is not None:
            gain += along
        if shift_ptr is not None:
            shift += plain

        if STAGES == 1:
            weight = _parameter(weight_ptr, channel, known)
        if weight_ptr is not None:
            slope *= weight
            along *= weight
            plain *= weight
        if not SUMMED:
            n = number
            if count_ptr is not None:
                n = tl.maximum(tl.load(count_ptr + statistic, mask=exists, other=1), 1)
            slope -= value * (_total(along, KEPT) / n)
            if mean_ptr is not None:
                slope -= _total(plain, KEPT) / n
        if along_ptr is not None:
            slope -= value * along_mean
        if plain_ptr is not None:
            slope -= plain_mean
        slope *= inverse
        if mask_ptr is not None:
            slope = tl.where(real, slope, 0)
        tl.store(dx_ptr + start + place, slope.to(dx_ptr.dtype.element_ty), mask=inside)

    own = first.to(tl.int64) * channels + channel
    if gain_ptr is not None:
        tl.store(gain_ptr + own, _total(gain, CHANNEL), mask=known)
    if shift_ptr is not None:
        tl.store(shift_ptr + own, _total(shift, CHANNEL), mask=known)
