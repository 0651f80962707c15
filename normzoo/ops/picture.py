"""A moments pattern as a picture: elements with the same letter share a statistic."""

from __future__ import annotations

import string

import numpy as np

from normzoo.ops.pattern import Pattern

_CHANNELS = 4
_POSITIONS = 3
_LETTERS = string.ascii_uppercase + string.ascii_lowercase


def shared(pattern: Pattern, batch: int = 2) -> np.ndarray:
    """Which statistic each element of a small ``(b, c, s)`` tensor belongs to, numbered in order of appearance.

    >>> shared(Pattern.parse("b c s -> c"))[0].tolist()
    [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]]
    """
    shape = (batch, _CHANNELS, _POSITIONS)
    sizes = pattern.sizes(shape, {axis: 1 if axis in pattern.factors[2] else 2 for axis in pattern.free})
    index = np.indices([sizes[axis] for axis in pattern.axes])
    number = np.zeros(index.shape[1:], dtype=int)
    for axis, coordinate in zip(pattern.axes, index, strict=True):
        if axis in pattern.kept:
            number = number * sizes[axis] + coordinate
    _, first, inverse = np.unique(number.reshape(-1), return_index=True, return_inverse=True)
    order = np.argsort(np.argsort(first))
    return order[inverse].reshape(shape)


def draw(pattern: Pattern) -> str:
    """The picture as text: a row for each channel, a block for each sample, a column for each position.

    >>> print(draw(Pattern.parse("b (g c) s -> b g")))
               sample 0   sample 1
    channel 0   A A A      C C C
    channel 1   A A A      C C C
    channel 2   B B B      D D D
    channel 3   B B B      D D D
    """
    elements = shared(pattern, batch=4 if len(pattern.factors[0]) > 1 else 2)
    lines = [" " * 11 + "   ".join(f"sample {b}" for b in range(len(elements)))]
    for c in range(_CHANNELS):
        cells = "      ".join(" ".join(_LETTERS[i] for i in row) for row in elements[:, c])
        lines.append(f"channel {c}   {cells}")
    return "\n".join(lines)


_COLOURS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#bbbbbb",
    "#994455",
    "#997700",
    "#004488",
)
_CELL, _GAP, _MARGIN = 22, 26, 84


def svg(pattern: Pattern) -> str:
    """The picture as SVG: elements of the same colour and number share a statistic."""
    elements = shared(pattern, batch=4 if len(pattern.factors[0]) > 1 else 2)
    block = _POSITIONS * _CELL + _GAP
    width, height = _MARGIN + len(elements) * block, 30 + _CHANNELS * _CELL + 6
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="sans-serif" font-size="12"><title>{pattern}</title>'
    ]
    for c in range(_CHANNELS):
        y = 30 + c * _CELL + _CELL * 0.68
        parts.append(f'<text x="{_MARGIN - 10}" y="{y:.0f}" text-anchor="end" fill="#808080">channel {c}</text>')
    for b, sample in enumerate(elements):
        left = _MARGIN + b * block
        middle = left + _POSITIONS * _CELL / 2
        parts.append(f'<text x="{middle:.0f}" y="20" text-anchor="middle" fill="#808080">sample {b}</text>')
        for (c, s), number in np.ndenumerate(sample):
            x, y = left + s * _CELL, 30 + c * _CELL
            colour = _COLOURS[number % len(_COLOURS)]
            parts.append(f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill="{colour}" stroke="white"/>')
            parts.append(
                f'<text x="{x + _CELL / 2:.0f}" y="{y + 15}" text-anchor="middle" fill="white">{number + 1}</text>'
            )
    return "".join([*parts, "</svg>"])
