"""How a pattern lies in memory, and how the work on it is cut into tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from normzoo.ops.pattern import Pattern

DIMENSIONS = 5  # of the index space that the kernels walk: two outer ones, then a tile of three
ALL = 2**DIMENSIONS - 1
_INNER = 3
_SECTOR = 32  # bytes that memory moves at once: a tile reads no shorter runs
_SMALL = 2**20  # so few elements that one launch beats a better spread over the processors
_ONE_PASS = 2**14  # elements of a tile that registers hold
_OFFSETS = 2**30  # within a tile they are 32 bit
_TARGET = 2**12  # elements of a tile where there is a choice
_WARPS = 16  # that a processor certainly runs at a time: so many leave each thread the 128 registers it may use
_WIDEST_KEPT = 256  # columns of a tile that is summed along its rows


class Nest(NamedTuple):
    """An input as nested loops in memory order, the innermost last; axes that play the same role are one.

    The roles are sets of dimensions, as bits: 1 is the innermost dimension, 16 the outermost. An index of a statistic,
    a channel or a mask is then the row-major index over the dimensions of its set.

    Attributes:
        sizes: five sizes, filled with ones from the left.
        kept: the dimensions that the statistics keep; the others are reduced.
        channel: the dimensions that make up the channel; empty when there is no gain or shift.
        mask: the dimensions that make up the mask; empty when there is none.
    """

    sizes: tuple[int, ...]
    kept: int
    channel: int
    mask: int

    def product(self, bits: int) -> int:
        """The number of elements over a set of dimensions."""
        return math.prod(n for i, n in enumerate(reversed(self.sizes)) if bits >> i & 1)

    @property
    def reduced(self) -> int:
        """The set of dimensions that are reduced."""
        return ALL & ~self.kept


class Tile(NamedTuple):
    """How one kernel is launched.

    Attributes:
        blocks: the tile, in the three inner dimensions.
        warps: of 32 threads each.
        fixed: programs that differ in the dimensions that a program stays in.
        loops: tiles that lie along the others.
        step: programs that share these tiles.
        ahead: tiles that are fetched while one is worked on, where a program has several.
    """

    blocks: tuple[int, int, int]
    warps: int
    fixed: int
    loops: int
    step: int
    ahead: int

    @property
    def programs(self) -> int:
        """Size of the grid."""
        return self.fixed * self.step

    @property
    def stages(self) -> int:
        """Of the pipeline that fetches tiles: one where each program has one tile, or one that fills its registers."""
        return 1 + self.ahead if self.loops > self.step and math.prod(self.blocks) <= _ONE_PASS // 2 else 1


def depth(pattern: Pattern, channels_last: bool, affine: bool, masked: bool) -> int:
    """How many dimensions the nest of this pattern has at most, whatever the sizes."""
    return len(list(groupby(role for role, _ in _roles(pattern, channels_last, affine, masked))))


def _roles(
    pattern: Pattern, channels_last: bool, affine: bool, masked: bool
) -> list[tuple[tuple[bool, bool, bool], str]]:
    order = (0, 2, 1) if channels_last else (0, 1, 2)
    return [
        ((axis in pattern.kept, affine and i == 1, masked and i != 1), axis)
        for i in order
        for axis in pattern.factors[i]
    ]


def nested(
    pattern: Pattern,
    options: Mapping[str, int],
    shape: tuple[int, int, int],
    channels_last: bool,
    affine: bool,
    masked: bool,
) -> Nest:
    """The nest of a contiguous tensor of ``shape`` ``(b, c, s)``, which lies as ``(b, s, c)`` when ``channels_last``.

    >>> nested(Pattern.parse("b (g c) s -> b g"), {"g": 4}, (2, 8, 9), False, True, False)
    Nest(sizes=(1, 2, 4, 2, 9), kept=28, channel=6, mask=0)
    """
    sizes = pattern.sizes(shape, options)
    axes = [(role, sizes[axis]) for role, axis in _roles(pattern, channels_last, affine, masked) if sizes[axis] != 1]
    runs = [(role, math.prod(n for _, n in group)) for role, group in groupby(axes, key=lambda axis: axis[0])]
    if len(runs) > DIMENSIONS:
        raise ValueError(f"pattern {str(pattern)!r} has {len(runs)} runs of memory; expected at most {DIMENSIONS}")
    bits = [sum(1 << len(runs) - 1 - i for i, (role, _) in enumerate(runs) if role[which]) for which in range(3)]
    # a dimension of size one keeps nothing apart, and is called kept so that nothing is reduced along it
    filled = ALL & ~(2 ** len(runs) - 1)
    return Nest((1,) * (DIMENSIONS - len(runs)) + tuple(n for _, n in runs), bits[0] | filled, bits[1], bits[2])


class Plan(NamedTuple):
    """All that a call needs to know; it follows from shapes alone.

    Attributes:
        nest: the loops.
        shape: the shape of a statistic.
        statistics: their number.
        number: elements of each.
        channels: number of channels; one where there is neither gain nor shift.
        still: whether a program that stays with its channels stays with its statistics.
        forward: for a forward pass that reads memory once; ``None`` where registers cannot hold whole statistics.
        backward: the same for the backward pass.
        share: for a pass that reduces.
        forward_given: for a forward pass that is given the statistics.
        backward_given: for a backward pass that is given the sums.
    """

    nest: Nest
    shape: tuple[int, ...]
    statistics: int
    number: int
    channels: int
    still: bool
    forward: Tile | None
    backward: Tile | None
    share: Tile
    forward_given: Tile
    backward_given: Tile


@lru_cache(maxsize=4096)
def make_plan(
    pattern: str,
    options: tuple[int, ...],
    shape: tuple[int, int, int],
    channels_last: bool,
    affine: bool,
    masked: bool,
    itemsize: int,
    processors: int,
) -> Plan:
    """The plan for a contiguous tensor, with the options in the order of ``pattern.free``.

    Args:
        pattern: the pattern's text.
        options: the sizes of its free axes.
        shape: canonical, ``(b, c, s)``.
        channels_last: whether memory is ``(b, s, c)``.
        affine: whether there is a gain or a shift.
        masked: whether there is a mask.
        itemsize: bytes of an element.
        processors: how many programs the device runs side by side.
    """
    parsed = Pattern.parse(pattern)
    sizes = dict(zip(parsed.free, options, strict=True))
    nest = nested(parsed, sizes, shape, channels_last, affine, masked)
    return Plan(
        nest=nest,
        shape=statistic_shape(parsed, sizes, shape, channels_last),
        statistics=nest.product(nest.kept),
        number=nest.product(nest.reduced),
        channels=nest.product(nest.channel),
        still=nest.product(nest.kept & ~nest.channel) == 1,
        forward=one_pass(nest, itemsize, False, processors),
        backward=one_pass(nest, itemsize, True, processors),
        share=reduction(nest, processors),
        forward_given=elementwise(nest, False, processors),
        backward_given=elementwise(nest, True, processors),
    )


def statistic_shape(
    pattern: Pattern, options: Mapping[str, int], shape: tuple[int, int, int], channels_last: bool
) -> tuple[int, ...]:
    """The sizes of the kept axes, in memory order."""
    sizes = pattern.sizes(shape, options)
    return tuple(sizes[axis] for _, axis in _roles(pattern, channels_last, False, False) if axis in pattern.kept)


def one_pass(nest: Nest, itemsize: int, backward: bool, processors: int) -> Tile | None:
    """Tiles that hold whole statistics, so that memory is read once; ``None`` where registers cannot hold them."""
    if nest.product(nest.reduced & 0b11000) > 1:
        return None
    kept, sizes = nest.kept, nest.sizes[-_INNER:]
    blocks = [1 if kept >> _INNER - 1 - i & 1 else _power(n) for i, n in enumerate(sizes)]
    run = itemsize
    for i in reversed(range(_INNER)):
        if kept >> _INNER - 1 - i & 1:
            blocks[i] = min(_power(sizes[i]), _power(-(-_SECTOR // run)))
        run *= min(blocks[i], sizes[i])
        if blocks[i] < sizes[i]:
            break
    # half precision packs two values into a register; the backward pass holds two tensors and the sums for parameters
    limit = _ONE_PASS * (2 if itemsize == 2 and not backward else 1)
    strides = (sizes[1] * sizes[2], sizes[2], 1)
    if math.prod(blocks) > limit or any(n * stride >= _OFFSETS for n, stride in zip(blocks, strides, strict=True)):
        return None
    for i in reversed(range(_INNER)):
        while (
            blocks[i] < sizes[i]
            and kept >> _INNER - 1 - i & 1
            and 2 * math.prod(blocks) <= _TARGET
            and 2 * blocks[i] * strides[i] < _OFFSETS
            and _count(nest, blocks, ALL) > 2 * processors
        ):
            blocks[i] *= 2
    if _count(nest, blocks, ALL) < processors and nest.product(ALL) > _SMALL:
        return None
    return _tile(nest, blocks, nest.channel, _many(processors, blocks, 1 if backward else 8))


def elementwise(nest: Nest, backward: bool, processors: int) -> Tile:
    """Tiles for a pass that is given the statistics."""
    blocks = _greedy(nest, _TARGET, widest=2 * _WIDEST_KEPT if nest.kept & 1 else None)
    return _tile(nest, blocks, nest.channel, _many(processors, blocks, 1 if backward else 8))


def reduction(nest: Nest, processors: int) -> Tile:
    """Tiles for a pass that sums along the reduced dimensions, each program on its own share."""
    blocks = _greedy(nest, _TARGET, widest=_WIDEST_KEPT if nest.kept & 1 else None)
    # a pass that only reads needs more on its way to keep the memory busy
    return _tile(nest, blocks, nest.kept, _many(processors, blocks, 2), ahead=2)


def _tile(nest: Nest, blocks: list[int], stay: int, programs: int, ahead: int = 1) -> Tile:
    x, y, z = blocks
    fixed, loops = _count(nest, blocks, stay), _count(nest, blocks, ALL & ~stay)
    return Tile((x, y, z), _warps(blocks), fixed, loops, min(loops, max(1, programs // fixed)), ahead)


def _greedy(nest: Nest, target: int, widest: int | None = None) -> list[int]:
    blocks = [1] * _INNER
    left, stride = target, 1
    for i in reversed(range(_INNER)):
        n = nest.sizes[i - _INNER]
        blocks[i] = min(_power(n), left, widest or left)
        while blocks[i] > 1 and blocks[i] * stride >= _OFFSETS:
            blocks[i] //= 2
        left, stride, widest = left // blocks[i], stride * n, None
    return blocks


def _count(nest: Nest, blocks: list[int], bits: int) -> int:
    """The number of tiles along a set of dimensions."""
    whole = [1] * (DIMENSIONS - _INNER) + blocks
    counts = tuple(-(-n // block) for n, block in zip(nest.sizes, whole, strict=True))
    return nest._replace(sizes=counts).product(bits)


def _warps(blocks: list[int]) -> int:
    return max(1, min(32 if math.prod(blocks) > _ONE_PASS else 16, math.prod(blocks) // 512))


def _many(processors: int, blocks: list[int], waves: int) -> int:
    """Programs that fill the processors so many times over."""
    return processors * waves * max(1, min(8, _WARPS // _warps(blocks)))


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()
