"""The recurrence on a GPU: ``normzoo::triton_recurrence``, the operator of :mod:`normzoo.ops.recurrence`.

The products with the input, all steps at once, and the gradients of both weights are torch's. The kernels
(:mod:`normzoo.ops.triton.cells`) do everything else, in one launch where a program can go through all steps alone:
where it has all units, which norms over the channels demand. A norm over the sequences demands all of these instead. So
with such norms, unless they are few, a program has some units, and a launch is a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normzoo.errors import NormzooError
from normzoo.ops.recurrence import CELLS, GATES, KINDS, describe
from normzoo.ops.triton import _on, _processors, cells, kernels

_ELEMENTS = 2**12  # of a tile, all gates together: with more, registers spill
_ALONE = 2**19  # multiplications of a step that one program does sooner than many are launched
_ROWS = 4  # sequences that make the read of a weight worth it
_CHANNELS = ("layer", "rms")


class Tile(NamedTuple):
    """What a program has.

    Attributes:
        rows: sequences.
        units: of the state, with all their gates.
        wide: columns of a tile that holds all gates.
    """

    rows: int
    units: int
    wide: int

    @property
    def warps(self) -> int:
        """Of 32 threads each."""
        return 8 if self.rows * self.wide == _ELEMENTS else 4

    def depth(self, columns: int) -> int:
        """Rows of the weights that are fetched at once: three times as many have to fit into shared memory."""
        return 32 if columns <= 512 else 16


def make_tile(cell: str, kinds: Sequence[str], batch: int, width: int, processors: int) -> Tile | None:
    """The tile for so many sequences and units; ``None`` where there is none that registers hold.

    >>> make_tile("lstm", ["layer"] * 3, 64, 128, 132)
    Tile(rows=4, units=128, wide=512)
    >>> make_tile("lstm", ["batch"] * 3, 64, 128, 132)
    Tile(rows=64, units=8, wide=32)
    """
    gates = _power(GATES[cell])
    whole, together = any(kind in _CHANNELS for kind in kinds), "batch" in kinds
    rows, units = _power(batch) if together else _ROWS, _power(width)
    few = not together or batch * GATES[cell] * width**2 <= _ALONE
    if rows * units * gates <= _ELEMENTS and (whole or few):
        while not together and -(-batch // rows) > processors and 2 * rows * units * gates <= _ELEMENTS:
            rows *= 2
    elif whole:
        return None
    else:
        rows = rows if together else min(_power(batch), 64)
        units = min(8, units, _ELEMENTS // (rows * gates))
        if units == 0:
            return None
        while -(-batch // rows) * -(-width // units) > processors and 2 * rows * units * gates <= _ELEMENTS:
            units *= 2
    return Tile(rows, units, units * gates)


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def serves(cell: str, kinds: Sequence[str], batch: int, width: int, device: torch.device) -> bool:
    """Whether the kernels can do this, in float32."""
    ready = kernels.AVAILABLE if device.type == "cuda" else kernels.INTERPRETED and device.type == "cpu"
    return ready and make_tile(cell, kinds, batch, width, 1) is not None


# ---- what the operators do -------------------------------------------------------------------------------------------


def _forward(
    x: Tensor, weight_ih: Tensor | None, weight_hh: Tensor, gain_input: Tensor | None, bias_input: Tensor,
    gain_hidden: Tensor | None, bias_hidden: Tensor, gain_cell: Tensor | None, bias_cell: Tensor | None,
    mask: Tensor | None, running_input: Tensor | None, running_hidden: Tensor | None, running_cell: Tensor | None,
    cell: int, kinds: Sequence[int], eps: Sequence[float], momentum: Sequence[float], keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    gains, biases = (gain_input, gain_hidden, gain_cell), (bias_input, bias_hidden, bias_cell)
    running = running_input, running_hidden, running_cell
    _check(x, weight_ih, weight_hh, gains, biases, mask, running, cell, kinds)
    made = _shapes(
        x, weight_ih, weight_hh, gain_input, bias_input, gain_hidden, bias_hidden, gain_cell, bias_cell, mask,
        *running, cell, kinds, eps, momentum, keep,
    )  # fmt: skip
    out, u, v, acts, c, *stats = made[:8]
    moved = [None if old is None else new.copy_(old) for old, new in zip(running, made[8:], strict=True)]
    batch, _, width = out.shape
    x = x.contiguous()
    product = x if weight_ih is None else torch.matmul(x, weight_ih.T, out=u if u.numel() else None)
    if not keep:
        acts, c = x.new_empty((2, batch, 4, width)).unbind()
    points = [
        _point(at, raw, stats[at], gains, biases, kinds, eps, batch, moved=moved[at], momentum=momentum[at])
        for at, raw in enumerate((product, v, c))
    ]
    _launch(
        cells.forward, x, weight_hh.T, cell, kinds, out, points, weight_hh.T.contiguous(), acts, out, _dense(mask),
        KEEP=keep,
    )  # fmt: skip
    return made


def _backward(
    dout: Tensor, out: Tensor, u: Tensor, v: Tensor, acts: Tensor, c: Tensor, stats_input: Tensor, stats_hidden: Tensor,
    stats_cell: Tensor, x: Tensor, weight_ih: Tensor | None, weight_hh: Tensor, gain_input: Tensor | None,
    bias_input: Tensor, gain_hidden: Tensor | None, bias_hidden: Tensor, gain_cell: Tensor | None,
    bias_cell: Tensor | None, mask: Tensor | None, cell: int, kinds: Sequence[int], eps: Sequence[float],
    tracked: Sequence[int], needs_x: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    raise NotImplementedError
