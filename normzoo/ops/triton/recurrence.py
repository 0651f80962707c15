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

    def fetched(self, columns: int, shared: int) -> tuple[int, int]:
        """How many terms of a product are fetched at once, and how many such fetches are under way.

        Args:
            columns: of the product.
            shared: bytes of memory that hold what was fetched.
        """
        depth = 32 if self.rows + columns <= 320 else 16
        return depth, min(3, shared // (4 * depth * (self.rows + columns)))


def make_tile(cell: str, kinds: Sequence[str], batch: int, width: int, processors: int, shared: int) -> Tile | None:
    """The tile for so many sequences and units; ``None`` where there is none that a program holds.

    >>> make_tile("lstm", ["layer"] * 3, 64, 128, 132, 2**17)
    Tile(rows=4, units=128, wide=512)
    >>> make_tile("lstm", ["batch"] * 3, 64, 128, 132, 2**17)
    Tile(rows=64, units=8, wide=32)

    Args:
        cell: its name.
        kinds: of the norms.
        batch: number of sequences.
        width: number of units.
        processors: how many programs the device runs side by side.
        shared: bytes of shared memory of each.
    """
    gates = _power(GATES[cell])
    whole, together = any(kind in _CHANNELS for kind in kinds), "batch" in kinds

    def held(rows: int, units: int) -> Tile | None:
        tile = Tile(rows, units, units * gates)
        return tile if rows * tile.wide <= _ELEMENTS and tile.fetched(tile.wide, shared)[1] else None

    few = batch * GATES[cell] * width**2 <= _ALONE
    found = held(_power(batch) if together else _ROWS, _power(width)) if whole or few or not together else None
    more_rows, more_units = (1 if together else 2), 1
    if found is None and not whole:
        rows = _power(batch) if together else min(_power(batch), 64)
        found = held(rows, min(_power(width), 8, max(1, _ELEMENTS // (rows * gates))))
        more_rows, more_units = 1, 2
    while found is not None and -(-batch // found.rows) * -(-width // found.units) > processors:
        larger = held(found.rows * more_rows, found.units * more_units)
        if larger in (None, found):
            break
        found = larger
    return found


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


def serves(cell: str, kinds: Sequence[str], batch: int, width: int, device: torch.device) -> bool:
    """Whether the kernels can do this, in float32."""
    ready = kernels.AVAILABLE if device.type == "cuda" else kernels.INTERPRETED and device.type == "cpu"
    return ready and make_tile(cell, kinds, batch, width, *_limits(device.index)) is not None


def _limits(index: int | None) -> tuple[int, int]:
    """How many programs a device runs side by side, and the bytes of shared memory of each."""
    if index is None:
        return _processors(None), 2**17
    return _processors(index), kernels.triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]


# What torch.compiler.assume_constant_result does.
_limits._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


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
        running_input, running_hidden, running_cell, cell, kinds, eps, momentum, keep,
    )  # fmt: skip
    out, u, v, acts, c, *stats = made[:8]
    moved = [None if old is None else new.copy_(old) for old, new in zip(running, made[8:], strict=True)]
    x = x.contiguous()
    product = x
    if weight_ih is not None:
        product = u if u.numel() else x.new_empty(*x.shape[:2], len(weight_ih))
        torch.mm(x.flatten(0, 1), weight_ih.T, out=product.flatten(0, 1))
    if not keep:
        acts, c = x.new_empty((2, len(x), 4 * out.shape[2]))
    tracked = [int(r is not None) for r in running]
    points = _points((product, v, c), stats, gains, biases, kinds, eps, len(x), tracked, moved, momentum)
    transposed = weight_hh.unflatten(0, (-1, out.shape[2])).permute(2, 0, 1)
    _launch(cells.forward, cell, kinds, points, _aligned(transposed), acts, out, mask, KEEP=keep)
    return made


def _backward(
    dout: Tensor, out: Tensor, u: Tensor, v: Tensor, acts: Tensor, c: Tensor, stats_input: Tensor, stats_hidden: Tensor,
    stats_cell: Tensor, x: Tensor, weight_ih: Tensor | None, weight_hh: Tensor, gain_input: Tensor | None,
    bias_input: Tensor, gain_hidden: Tensor | None, bias_hidden: Tensor, gain_cell: Tensor | None,
    bias_cell: Tensor | None, mask: Tensor | None, cell: int, kinds: Sequence[int], eps: Sequence[float],
    tracked: Sequence[int], needs_x: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    gains, biases = (gain_input, gain_hidden, gain_cell), (bias_input, bias_hidden, bias_cell)
    batch, _, width = out.shape
    x = x.contiguous()
    du, dv = x.new_empty((2, *out.shape[:2], len(weight_hh)))
    dh, dc = x.new_empty((2, batch, width))
    shared = [kinds[0] != 0, kinds[1] != 0, CELLS[cell] == "lstm" and (kinds[2] != 0 or bias_cell is not None)]
    sums = [
        x.new_empty(batch, 2, channels) if needed else None
        for needed, channels in zip(shared, (len(weight_hh), len(weight_hh), width), strict=True)
    ]
    raw, stats = (x if weight_ih is None else u, v, c), (stats_input, stats_hidden, stats_cell)
    points = _points(raw, stats, gains, biases, kinds, eps, batch, tracked, sums=sums)
    _launch(
        cells.backward, cell, kinds, points, _aligned(weight_hh), acts, out, mask, dout.contiguous(), du, dv, dh, dc
    )
    nothing = x.new_empty(0)
    dx = dw_ih = nothing
    if needs_x:
        dx = du if weight_ih is None else du @ weight_ih
    if weight_ih is not None:
        dw_ih = du.flatten(0, 1).T @ x.flatten(0, 1)
    dw_hh = dv[:, 1:].flatten(0, 1).T @ out[:, :-1].flatten(0, 1)
    parameters = []
    for gain, bias, share, grad in zip(gains, biases, sums, (du, dv, None), strict=True):
        if share is not None:
            dgain, dbias = share.sum(0)
        else:
            dgain, dbias = nothing, nothing if grad is None else grad.sum((0, 1))
        parameters += [nothing if gain is None else dgain, nothing if bias is None else dbias]
    return dx, dw_ih, dw_hh, *parameters


def _points(
    raw: Sequence[Tensor],
    stats: Sequence[Tensor],
    gains: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    kinds: Sequence[int],
    eps: Sequence[float],
    batch: int,
    tracked: Sequence[int],
    moved: Sequence[Tensor | None] = (None,) * 3,
    momentum: Sequence[float] = (0.0,) * 3,
    sums: Sequence[Tensor | None] = (None,) * 3,
) -> list[cells.Point]:
    return [
        cells.Point(
            raw=raw[at] if raw[at].numel() else None,
            stats=stats[at] if stats[at].numel() else None,
            gain=_dense(gains[at]),
            bias=_dense(biases[at]),
            eps=eps[at],
            moving=None if kinds[at] == 0 else moving,
            spans=1 if moving is None else len(moving),
            momentum=momentum[at],
            least=min(2, batch) if tracked[at] else 0,
            sums=sums[at],
        )
        for at, moving in enumerate(moved)
    ]


def _launch(
    kernel: Any,
    cell: int,
    kinds: Sequence[int],
    points: Sequence[cells.Point],
    weight: Tensor,
    acts: Tensor,
    out: Tensor,
    mask: Tensor | None,
    *others: Tensor,
    **constants: bool,
) -> None:
    batch, steps, width = out.shape
    processors, shared = _limits(out.device.index)
    tile = make_tile(CELLS[cell], [KINDS[k] for k in kinds], batch, width, processors, shared)
    if tile is None:
        raise NormzooError(
            f"{batch} sequences and {width} units, with these norms, are more than a program holds; expected what "
            "normzoo.ops.triton.recurrence.serves"
        )
    grid = -(-batch // tile.rows), -(-width // tile.units)
    size = steps if grid[1] == 1 else 1
    depth, ahead = tile.fetched(tile.units if kernel is cells.backward else tile.wide, shared)
    with _on(out):
        for first in range(0, steps, size):
            kernel[grid](
                *points, weight, acts, out, _dense(mask), *others, first, first + size, batch, steps, width,
                weight.shape[-1], CELL=cell, GATES=GATES[CELLS[cell]], INPUT=kinds[0], HIDDEN=kinds[1], INSIDE=kinds[2],
                ROWS=tile.rows, UNITS=tile.units, WIDE=tile.wide, DEPTH=depth, ALIGN=min(16, width & -width),
                num_warps=tile.warps, num_stages=1 + ahead, **constants,
            )  # fmt: skip


def _aligned(weight: Tensor) -> Tensor:
    """Contiguous, with zeros at the end of rows, so that four elements at a time can be loaded whatever the width."""
    missing = -weight.shape[-1] % 16
    return torch.nn.functional.pad(weight, (0, missing)) if missing else weight.contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _check(
    x: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    gains: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    mask: Tensor | None,
    running: Sequence[Tensor | None],
    cell: int,
    kinds: Sequence[int],
) -> None:
    batch, steps, features = x.shape
    width = weight_hh.shape[1]
    rows = GATES[CELLS[cell]] * width
    wanted: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
        ("x", x, (batch, steps, features if weight_ih is not None else rows)),
        ("weight_ih", weight_ih, (rows, features)),
        ("weight_hh", weight_hh, (rows, width)),
        ("mask", mask, (batch, steps)),
    ]
    for kind, channels, gain, bias, moving in zip(kinds, (rows, rows, width), gains, biases, running, strict=True):
        given = moving is not None
        wanted += [("a gain", gain, (channels,)), ("a bias", bias, (channels,))]
        wanted += [("running statistics", moving, (max(1, len(moving)) if given else 0, 2, channels))]
        if KINDS[kind] == "running" and not given:
            raise NormzooError("normzoo::triton_recurrence: a norm by running statistics was not given any")
    for name, tensor, shape in wanted:
        dtype = torch.bool if name == "mask" else torch.float32
        if tensor is not None and (tensor.shape != shape or tensor.dtype != dtype or tensor.device != x.device):
            raise NormzooError(
                f"normzoo::triton_recurrence: {name} is {tensor.dtype} of shape {tuple(tensor.shape)} on "
                f"{tensor.device}; expected {dtype} of shape {shape} on {x.device}"
            )


# ---- the operators ---------------------------------------------------------------------------------------------------


def _shapes(
    x: Tensor, weight_ih: Tensor | None, weight_hh: Tensor, gain_input: Tensor | None, bias_input: Tensor,
    gain_hidden: Tensor | None, bias_hidden: Tensor, gain_cell: Tensor | None, bias_cell: Tensor | None,
    mask: Tensor | None, running_input: Tensor | None, running_hidden: Tensor | None, running_cell: Tensor | None,
    cell: int, kinds: Sequence[int], eps: Sequence[float], momentum: Sequence[float], keep: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, steps, _ = x.shape
    rows, width = weight_hh.shape
    names = [KINDS[kind] for kind in kinds]

    def made(needed: bool, *shape: int) -> Tensor:
        return x.new_empty(shape if needed else (0,))

    stats = [
        made(keep and name != "none", steps, 2, batch if name in _CHANNELS else channels)
        for name, channels in zip(names, (rows, rows, width), strict=True)
    ]
    moved = [
        made(r is not None, *(() if r is None else r.shape)) for r in (running_input, running_hidden, running_cell)
    ]
    return (
        x.new_empty(batch, steps, width),
        made(keep and names[0] != "none" and weight_ih is not None, batch, steps, rows),
        made(keep and names[1] != "none", batch, steps, rows),
        made(keep and CELLS[cell] != "tanh", batch, steps, 4 * width),
        made(keep and CELLS[cell] == "lstm", batch, steps, width),
        *stats,
        *moved,
    )


_LEARNED = (
    "Tensor x, Tensor? weight_ih, Tensor weight_hh, Tensor? gain_input, Tensor bias_input, Tensor? gain_hidden, "
    "Tensor bias_hidden, Tensor? gain_cell, Tensor? bias_cell, Tensor? mask"
)
_library = torch.library.Library("normzoo", "FRAGMENT")
_library.define(
    f"triton_recurrence({_LEARNED}, Tensor? running_input, Tensor? running_hidden, Tensor? running_cell, int cell, "
    f"int[] kinds, float[] eps, float[] momentum, bool keep) -> ({', '.join(['Tensor'] * 11)})"
)
_library.define(
    "triton_recurrence_backward(Tensor dout, Tensor out, Tensor u, Tensor v, Tensor acts, Tensor c, "
    f"Tensor stats_input, Tensor stats_hidden, Tensor stats_cell, {_LEARNED}, int cell, int[] kinds, float[] eps, "
    f"int[] tracked, bool needs_x) -> ({', '.join(['Tensor'] * 9)})"
)
_library.impl("triton_recurrence", _forward, "CompositeExplicitAutograd")
_library.impl("triton_recurrence_backward", _backward, "CompositeExplicitAutograd")
describe("triton_recurrence", _shapes, _library)
compute = torch.ops.normzoo.triton_recurrence
