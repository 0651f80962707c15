"""The kernels of the recurrence: every step of it, product, norms, gates and all, and the way back.

A program has some sequences and some units, each with all of its gates. Where it has all units it goes through all
steps alone; otherwise a step needs the others' last one, and a launch is a step. A step finds all that it needs in
memory and leaves all of it there, so it does not matter which of the two it is.

Two layouts of a step's values take turns, with a barrier between: *wide*, all gates of the units side by side, for
products and statistics, and *narrow*, gate by gate, for the cell.
"""

# what only some variants of a kernel have, they alone use; a type expression here is a mark for Triton's compiler
# pyright: reportInvalidTypeForm=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from normzoo.ops.triton.kernels import AVAILABLE, tl, triton

_NUMBERS = ("first", "last", "batch", "steps")
jit: Callable[[Any], Any] = triton.jit(do_not_specialize=_NUMBERS) if AVAILABLE else lambda kernel: kernel

# the numbers of cells and norms in normzoo.ops.recurrence: 1 and 2 are over the channels, 3 and 4 over the sequences
LSTM: Any = tl.constexpr(0) if AVAILABLE else 0
GRU: Any = tl.constexpr(1) if AVAILABLE else 1
LAYER: Any = tl.constexpr(1) if AVAILABLE else 1
BATCH: Any = tl.constexpr(3) if AVAILABLE else 3


class Point(NamedTuple):
    """A point of the cell, to the kernels. ``C`` is its number of channels; what is not there is ``None``.

    Attributes:
        raw: the values before the norm, ``(N, T, C)``.
        stats: room for mean and inverse standard deviation, ``(T, 2, N or C)``.
        gain: ``(C,)``.
        bias: ``(C,)``.
        eps: added to the variance.
        moving: running statistics, ``(S, 2, C)``.
        spans: their ``S``.
        momentum: weight of the batch in them.
        least: so many sequences have statistics of their own.
        sums: room for each sequence's share of the gradients of gain and bias, ``(N, 2, C)``.
    """

    raw: Any
    stats: Any
    gain: Any
    bias: Any
    eps: float
    moving: Any
    spans: int
    momentum: float
    least: int
    sums: Any


@jit
def _tanh(x):
    """Near zero by a polynomial, where the formula would lose digits."""
    a = tl.abs(x)
    z = a * a
    p = ((z * 2.14296160e-3 - 8.17739777e-3) * z + 2.17007026e-2) * z - 5.39467633e-2
    p = (p * z + 1.33332059e-1) * z - 3.33333313e-1
    y = tl.where(a < 0.625, a + a * z * p, 1 - 2 / (tl.exp(2 * a) + 1))
    return tl.where(x < 0, -y, y)


@jit
def _affine(x, point, channel, known):
    if point.gain is not None:
        x *= tl.load(point.gain + channel, mask=known, other=0)
    if point.bias is not None:
        x += tl.load(point.bias + channel, mask=known, other=0)
    return x


@jit
def _norm(x, point, real, number, t, row, batch, channel, known, channels, KIND: tl.constexpr):
    """A step's values after the norm, whose statistics are stored where there is room for them."""
    if KIND >= BATCH:
        if point.moving is not None:
            moving = point.moving + tl.minimum(t, point.spans - 1) * 2 * channels + channel
            mean = tl.load(moving, mask=known, other=0)
            var = tl.load(moving + channels, mask=known, other=1)
        if KIND == BATCH:
            n = tl.maximum(number, 1).to(tl.float32)
            own_mean = tl.sum(tl.where(real, x, 0), 0, keep_dims=True) / n
            apart = tl.where(real, x - own_mean, 0)
            own_var = tl.sum(apart * apart, 0, keep_dims=True) / n
            if point.moving is not None:
                own = number >= point.least
                new_mean = mean + point.momentum * (own_mean - mean)
                new_var = var + point.momentum * (own_var * (n / tl.maximum(n - 1, 1)) - var)
                tl.debug_barrier()  # now all threads that share a channel have read it
                tl.store(moving, new_mean, mask=known & own)
                tl.store(moving + channels, new_var, mask=known & own)
                mean = tl.where(own, own_mean, mean)
                var = tl.where(own, own_var, var)
            else:
                mean = own_mean
                var = own_var
        spread = tl.rsqrt(var + point.eps)
        x = (x - mean) * spread
        if point.stats is not None:
            stats = point.stats + t * 2 * channels + channel
            tl.store(stats, mean, mask=known)
            tl.store(stats + channels, spread, mask=known)
    elif KIND != 0:
        mean = 0.0
        if KIND == LAYER:
            mean = tl.sum(tl.where(known, x, 0), 1, keep_dims=True) / channels
        x = tl.where(known, x - mean, 0)
        spread = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / channels + point.eps)
        x *= spread
        if point.stats is not None:
            stats = point.stats + t * 2 * batch + row
            if KIND == LAYER:
                tl.store(stats, mean, mask=row < batch)
            tl.store(stats + batch, spread, mask=row < batch)
    return _affine(x, point, channel, known)


@jit
def _recall(x, point, t, row, batch, channel, known, channels, KIND: tl.constexpr):
    """The values standardised by the stored statistics, and the inverse deviation."""
    spread = 1.0
    if KIND >= BATCH:
        stats = point.stats + t * 2 * channels + channel
        x -= tl.load(stats, mask=known, other=0)
        spread = tl.load(stats + channels, mask=known, other=0)
        x *= spread
    elif KIND != 0:
        stats = point.stats + t * 2 * batch + row
        if KIND == LAYER:
            x -= tl.load(stats, mask=row < batch, other=0)
        spread = tl.load(stats + batch, mask=row < batch, other=0)
        x *= spread
    return x, spread


@jit
def _gates(acts, width, inside, CELL: tl.constexpr):
    """The gates ``i, f, g, o``; or ``r, z, n`` and what the hidden product adds to ``n``."""
    first = tl.sigmoid(tl.load(acts, mask=inside, other=0))
    second = tl.sigmoid(tl.load(acts + width, mask=inside, other=0))
    third = tl.load(acts + 2 * width, mask=inside, other=0)
    fourth = tl.load(acts + 3 * width, mask=inside, other=0)
    if CELL == LSTM:
        third = _tanh(third)
        fourth = tl.sigmoid(fourth)
    else:
        third = _tanh(third + first * fourth)
    return first, second, third, fourth


@jit
def _real(mask, line, there):
    if mask is not None:
        there = there & (tl.load(mask + line, mask=there, other=0) != 0)
    return there


@jit
def forward(
    input, hidden, cell, weight, acts, out, mask, first, last, batch, steps, width, padded,
    CELL: tl.constexpr, GATES: tl.constexpr, INPUT: tl.constexpr, HIDDEN: tl.constexpr, INSIDE: tl.constexpr,
    KEEP: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Steps ``first`` to ``last``.

    ``weight`` is transposed, ``(H, gates, padded)``. ``acts``, ``(N, T, 4 H)``, gets what :func:`_gates`
    makes the gates from. Without ``KEEP`` it and the cell state have room for one step.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how wide it may load
    channels = GATES * width
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    there = row < batch
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)[None, :]
    inside = there & (unit < width)
    gate = tl.arange(0, WIDE)[None, :] // UNITS
    wide = tl.program_id(1) * UNITS + tl.arange(0, WIDE)[None, :] % UNITS
    known = (wide < width) & (gate < GATES)
    channel = gate * width + wide
    column = gate * padded + wide
    filled = (wide < padded) & (gate < GATES)
    slots = steps if KEEP else 1

    for t in tl.range(first, last, num_stages=1):
        line = row.to(tl.int64) * steps + t
        slot = row.to(tl.int64) * slots + (t if KEEP else 0)
        before = slot - 1 if KEEP else slot
        real = _real(mask, line, there)
        number = tl.sum(real.to(tl.int32))

        u = tl.load(input.raw + line * channels + channel, mask=there & known, other=0)  # arrives during the product
        v = tl.zeros([ROWS, WIDE], tl.float32)
        for k in tl.range(0, tl.where(t > 0, width, 0), DEPTH):
            across = k + tl.arange(0, DEPTH)[None, :]
            down = k + tl.arange(0, DEPTH)[:, None]
            left = tl.load(out + (line - 1) * width + across, mask=there & (across < width), other=0)
            right = tl.load(weight + down * GATES * padded + column, mask=filled & (down < width), other=0)
            v = tl.dot(left, right, v, input_precision="ieee")
        if hidden.raw is not None:
            tl.store(hidden.raw + line * channels + channel, v, mask=there & known)
        u = _norm(u, input, real, number, t, row, batch, channel, known, channels, INPUT)
        v = _norm(v, hidden, real, number, t, row, batch, channel, known, channels, HIDDEN)

        if CELL == LSTM:
            tl.store(acts + slot * 4 * width + channel, u + v, mask=there & known)
            tl.debug_barrier()
            i, f, g, o = _gates(acts + slot * 4 * width + unit, width, inside, CELL)
            old = tl.load(cell.raw + before * width + unit, mask=inside & (t > 0), other=0)
            c = tl.where(real, f * old + i * g, old)
            tl.store(cell.raw + slot * width + unit, c, mask=inside)
            h = o * _tanh(_norm(c, cell, real, number, t, row, batch, unit, unit < width, width, INSIDE))
        elif CELL == GRU:
            tl.store(acts + slot * 4 * width + channel, tl.where(gate < 2, u + v, u), mask=there & known)
            tl.store(acts + slot * 4 * width + channel + width, v, mask=there & known & (gate == 2))
            tl.debug_barrier()
            _, z, n, _ = _gates(acts + slot * 4 * width + unit, width, inside, CELL)
            h = (1 - z) * n
        else:
            h = _tanh(u + v)
        state = tl.load(out + (line - 1) * width + unit, mask=inside & (t > 0), other=0)
        if CELL == GRU:
            h += z * state
        tl.store(out + line * width + unit, tl.where(real, h, state), mask=inside)
        tl.debug_barrier()


@jit
def _through(dy, x, point, real, number, later, t, row, batch, channel, known, channels, KIND: tl.constexpr):
    """From the gradient of a norm's output to that of its input; the gradients of gain and bias grow."""
    x, spread = _recall(x, point, t, row, batch, channel, known, channels, KIND)
    if point.sums is not None:
        sums = point.sums + row.to(tl.int64) * 2 * channels + channel
        mine = known & (row < batch)
        tl.store(sums, tl.load(sums, mask=mine & later, other=0) + dy * x, mask=mine)
        tl.store(sums + channels, tl.load(sums + channels, mask=mine & later, other=0) + dy, mask=mine)
    if point.gain is not None:
        dy *= tl.load(point.gain + channel, mask=known, other=0)
    if KIND >= BATCH:
        if KIND == BATCH:
            share = tl.where(number >= point.least, 1 / tl.maximum(number, 1).to(tl.float32), 0)
            slope = tl.sum(dy * x, 0, keep_dims=True) * share
            dy -= tl.sum(dy, 0, keep_dims=True) * share + slope * x
        dy = tl.where(real, dy * spread, 0)
    elif KIND != 0:
        slope = tl.sum(dy * x, 1, keep_dims=True) / channels
        if KIND == LAYER:
            dy -= tl.sum(dy, 1, keep_dims=True) / channels
        dy = (dy - slope * x) * spread
    return dy


@jit
def _both(du, dv, line, gate: tl.constexpr, unit, channels, width, value, inside):
    place = line * channels + gate * width + unit
    tl.store(du + place, value, mask=inside)
    tl.store(dv + place, value, mask=inside)


@jit
def backward(
    input, hidden, cell, weight, acts, out, mask, dout, du, dv, dh, dc, first, last, batch, steps, width, padded,
    CELL: tl.constexpr, GATES: tl.constexpr, INPUT: tl.constexpr, HIDDEN: tl.constexpr, INSIDE: tl.constexpr,
    ROWS: tl.constexpr, UNITS: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Steps ``first`` to ``last`` from the end: the gradients ``du`` and ``dv`` of both products, ``(N, T, C)``.

    ``weight`` is ``(C, padded)``.
    ``dh`` and ``dc``, ``(N, H)``, carry the gradients of the state, but for what goes through the product, and of the
    cell state from one step to the one before.
    """
    width = width // ALIGN * ALIGN  # tells the compiler how wide it may load
    channels = GATES * width
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    there = row < batch
    unit = tl.program_id(1) * UNITS + tl.arange(0, UNITS)[None, :]
    inside = there & (unit < width)
    gate = tl.arange(0, WIDE)[None, :] // UNITS
    wide = tl.program_id(1) * UNITS + tl.arange(0, WIDE)[None, :] % UNITS
    known = (wide < width) & (gate < GATES)
    channel = gate * width + wide
    own = row.to(tl.int64) * width + unit

    for done in tl.range(first, last, num_stages=1):
        t = steps - 1 - done
        later = done > 0
        line = row.to(tl.int64) * steps + t
        here = line * width + unit
        real = _real(mask, line, there)
        number = tl.sum(real.to(tl.int32))

        grad = tl.zeros([ROWS, UNITS], tl.float32)
        for k in tl.range(0, tl.where(later, channels, 0), DEPTH):
            across = k + tl.arange(0, DEPTH)[None, :]
            down = k + tl.arange(0, DEPTH)[:, None]
            left = tl.load(dv + (line + 1) * channels + across, mask=there & (across < channels), other=0)
            right = tl.load(weight + down * padded + unit, mask=(unit < padded) & (down < channels), other=0)
            grad = tl.dot(left, right, grad, input_precision="ieee")
        grad += tl.load(dh + own, mask=inside & later, other=0) + tl.load(dout + here, mask=inside, other=0)

        new = tl.where(real, grad, 0)  # of the state that this step made; a held one is that of the step before
        held = tl.where(real, 0, grad)
        if CELL == LSTM:
            i, f, g, o = _gates(acts + line * 4 * width + unit, width, inside, CELL)
            c = tl.load(cell.raw + here, mask=inside, other=0)
            old = tl.load(cell.raw + here - width, mask=inside & (t > 0), other=0)
            shown, _ = _recall(c, cell, t, row, batch, unit, unit < width, width, INSIDE)
            shown = _tanh(_affine(shown, cell, unit, unit < width))
            dm = new * o * (1 - shown * shown)
            dm = _through(dm, c, cell, real, number, later, t, row, batch, unit, unit < width, width, INSIDE)
            d = tl.load(dc + own, mask=inside & later, other=0)
            made = tl.where(real, d + dm, 0)
            tl.store(dc + own, tl.where(real, made * f, d), mask=inside)
            _both(du, dv, line, 0, unit, channels, width, made * g * i * (1 - i), inside)
            _both(du, dv, line, 1, unit, channels, width, made * old * f * (1 - f), inside)
            _both(du, dv, line, 2, unit, channels, width, made * i * (1 - g * g), inside)
            _both(du, dv, line, 3, unit, channels, width, new * shown * o * (1 - o), inside)
        elif CELL == GRU:
            r, z, n, added = _gates(acts + line * 4 * width + unit, width, inside, CELL)
            state = tl.load(out + here - width, mask=inside & (t > 0), other=0)
            dn = new * (1 - z) * (1 - n * n)
            _both(du, dv, line, 0, unit, channels, width, dn * added * r * (1 - r), inside)
            _both(du, dv, line, 1, unit, channels, width, new * (state - n) * z * (1 - z), inside)
            tl.store(du + line * channels + 2 * width + unit, dn, mask=inside)
            tl.store(dv + line * channels + 2 * width + unit, dn * r, mask=inside)
            held += new * z
        else:
            h = tl.load(out + here, mask=inside, other=0)
            _both(du, dv, line, 0, unit, channels, width, new * (1 - h * h), inside)
        tl.store(dh + own, held, mask=inside)
        tl.debug_barrier()

        place = line * channels + channel
        mine = there & known
        if INPUT != 0:
            d = tl.load(du + place, mask=mine, other=0)
            x = tl.load(input.raw + place, mask=mine, other=0)
            d = _through(d, x, input, real, number, later, t, row, batch, channel, known, channels, INPUT)
            tl.store(du + place, d, mask=mine)
        if HIDDEN != 0:
            d = tl.load(dv + place, mask=mine, other=0)
            x = tl.load(hidden.raw + place, mask=mine, other=0)
            d = _through(d, x, hidden, real, number, later, t, row, batch, channel, known, channels, HIDDEN)
            tl.store(dv + place, d, mask=mine)
        tl.debug_barrier()
