"""What a norm does, found out by trying: one element of the input is moved, and what moves in the output needs it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from normzoo.checks.subject import Subject, call, twin
from normzoo.layers.base import Norm
from normzoo.ops.pattern import CANONICAL, Pattern, divisors

_NOTICED = 1e-9  # a change of the output relative to its size, in float64


@dataclass(frozen=True)
class Inferred:
    """What a norm was seen to do; ``None`` where it could not be told.

    Attributes:
        batch_dependent: in training, the output of a sample depends on the other samples of the batch.
        batch_dependent_in_evaluation: the same in evaluation.
        causal: in evaluation, the output at position t does not depend on later positions.
        causal_in_training: the same in training.
        stateful: training changes what evaluation computes.
        scale_invariant: in training, multiplying the input by a positive number changes nothing.
        shift_invariant: in training, adding a number to all of the input changes nothing.
        stochastic: in training, the same input gives different outputs.
        shares: which elements share a statistic in training, as a moments pattern where it is one.
        shares_in_evaluation: the same in evaluation.
        untold: the errors that kept something from being found out.
    """

    batch_dependent: bool | None = None
    batch_dependent_in_evaluation: bool | None = None
    causal: bool | None = None
    causal_in_training: bool | None = None
    stateful: bool | None = None
    scale_invariant: bool | None = None
    shift_invariant: bool | None = None
    stochastic: bool | None = None
    shares: str | None = None
    shares_in_evaluation: str | None = None
    untold: tuple[str, ...] = ()

    def __str__(self) -> str:
        said = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool):
                said.append(f"{field.name.replace('_', ' ')} {'yes' if value else 'no'}")
        return " · ".join(said)


def examine(subject: Subject) -> Inferred:
    """Find out what a norm does; errors of the norm leave a trait untold."""
    found: dict[str, bool | str | None] = {}
    untold: list[str] = []

    def tell(probe: Callable[[Subject], dict[str, bool | str]]) -> None:
        try:
            found.update(probe(subject))
        except Exception as error:  # the norm is somebody else's code: it may raise anything; the checks report it
            untold.append(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")

    for probe in (_sharing_in_training, _sharing_in_evaluation, _state, _scale, _shift, _chance):
        tell(probe)
    return Inferred(**found, untold=tuple(dict.fromkeys(untold)))  # pyright: ignore[reportArgumentType]


def _state(subject: Subject) -> dict[str, bool | str]:
    norm = subject.make(training=False)
    x = subject.data()
    before = call(norm, x).detach()
    norm.train()
    for seed in (1, 2, 3):
        call(norm, 2 * subject.data(seed=seed) + 1)
    return {"stateful": _moved(before, call(norm.eval(), x).detach())}


def _scale(subject: Subject) -> dict[str, bool | str]:
    return {"scale_invariant": not moved_by_scale(subject)}


def _shift(subject: Subject) -> dict[str, bool | str]:
    return {"shift_invariant": not moved_by_shift(subject)}


def moved_by_scale(subject: Subject) -> float:
    """How far four times the input moves the output in training, relative to its size; 0 where it does not.

    On large numbers, beside which eps is nothing, and again on smaller ones, which do not saturate everything.
    """
    return max(_difference(subject, peak, lambda x: 4 * x, tolerance) for peak, tolerance in ((1e4, 1e-5), (1e2, 1e-3)))


def moved_by_shift(subject: Subject) -> float:
    """How far the input plus ten moves the output in training, relative to its size; 0 where it does not."""
    return _difference(subject, 5.0, lambda x: x + 10, 1e-7)


def _difference(subject: Subject, peak: float, change: Callable[[Tensor], Tensor], tolerance: float) -> float:
    x, norm = subject.data(peak=peak), subject.make()
    one, other = call(twin(norm), x).detach(), call(twin(norm), change(x)).detach()
    difference = float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))
    return 0.0 if difference <= tolerance else difference


def _chance(subject: Subject) -> dict[str, bool | str]:
    norm, x = subject.make(), subject.data()
    outputs = []
    for seed in range(4):
        copied = twin(norm)
        torch.manual_seed(seed)
        outputs.append(copied(x).detach())
    return {"stochastic": any(_moved(outputs[0], y) for y in outputs[1:])}


# ---- who moves whom --------------------------------------------------------------------------------------------------


def _sharing_in_training(subject: Subject) -> dict[str, bool | str]:
    moved = influence(subject, training=True)
    return {
        "batch_dependent": across(moved, 0),
        "causal_in_training": not backwards(moved),
        "shares": describe(moved, subject.stated),
    }


def _sharing_in_evaluation(subject: Subject) -> dict[str, bool | str]:
    moved = influence(subject, training=False)
    return {
        "batch_dependent_in_evaluation": across(moved, 0),
        "causal": not backwards(moved),
        "shares_in_evaluation": describe(moved, subject.stated),
    }


def influence(subject: Subject, *, training: bool) -> Tensor:
    """Which outputs move when one input does: boolean, ``(b, c, s, b, c, s)``, the input's place first."""
    x = subject.data((4, 4) if subject.channels <= 16 else (3, 3))
    norm = subject.make(training=training)
    moved = _influence(norm, x)
    # an activation hides what it cuts off: look at the other side as well
    return moved if describe(moved).startswith("b c s") else moved | _influence(norm, -x)


def _influence(norm: Norm, x: Tensor) -> Tensor:
    before = call(twin(norm), x).detach()
    far = 10 * x.abs().max()  # the largest of all by far: a norm by maxima notices as well
    rows = []
    for i in range(x.numel()):
        changed = x.clone()
        changed.view(-1)[i] = far
        after = call(twin(norm), changed).detach()
        size = torch.maximum(before.abs().max(), after.abs().max())
        row = ((after - before).abs() > _NOTICED * size).flatten()
        row[i] = True
        rows.append(row)
    return torch.stack(rows).view(*x.shape, *x.shape)


def across(moved: Tensor, axis: int) -> bool:
    """Whether something moves at another coordinate of ``axis`` (0 sample, 1 channel, 2 position)."""
    table = moved.permute(axis, axis + 3, *(i for i in range(6) if i not in (axis, axis + 3))).flatten(2).any(2)
    return bool((table & ~torch.eye(len(table), dtype=torch.bool)).any())


def backwards(moved: Tensor) -> bool:
    """Whether a later position moves an earlier one."""
    table = moved.permute(2, 5, 0, 1, 3, 4).flatten(2).any(2)
    return bool(table.tril(-1).any())


def describe(moved: Tensor, stated: tuple[Pattern, Mapping[str, int]] | None = None) -> str:
    """The moments pattern whose statistics connect the same elements, or in which directions elements move others.

    Args:
        moved: as :func:`influence` finds it.
        stated: the pattern that the norm states, with its sizes; it is the answer where it connects the same elements.

    >>> same_channel = torch.eye(8, dtype=torch.bool).view(1, 8, 1, 1, 8, 1).expand(4, 8, 6, 4, 8, 6)
    >>> describe(same_channel)
    'b c s -> c'
    """
    shape = (moved.shape[0], moved.shape[1], moved.shape[2])
    table = moved.flatten(3).flatten(0, 2)
    for pattern, sizes in itertools.chain([stated] if stated else [], _patterns(shape)):
        number = members(pattern, shape, sizes).flatten()
        if torch.equal(table, number[:, None] == number[None]):
            return "nothing" if pattern.kept == CANONICAL else str(pattern)
    directions = []
    coordinates = torch.stack(torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")).flatten(1)
    differ = coordinates[:, :, None] != coordinates[:, None]
    for axes in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
        here = torch.stack([differ[i] if i in axes else ~differ[i] for i in range(3)]).all(0)
        if table[here].any():
            names = " and ".join(("sample", "channel", "position")[i] for i in axes)
            directions.append(f"{'every' if table[here].all() else 'some'} other {names}")
    return "no single pattern; an element moves " + ", ".join(directions)


def _patterns(shape: tuple[int, int, int]) -> Iterator[tuple[Pattern, dict[str, int]]]:
    """Every pattern that could be seen on this shape, the plainest first."""
    samples, channels, _ = shape
    splits = [("b", "c", {})]
    splits += [("b", text, {"g": g}) for g in divisors(channels)[1:-1] for text in ("(g c)", "(c g)")]
    splits += [(text, "c", {"n": n}) for n in divisors(samples)[1:-1] for text in ("(n b)", "(b n)")]
    splits += [("(n b)", "(g c)", {"n": n, "g": g}) for n in divisors(samples)[1:-1] for g in divisors(channels)[1:-1]]
    for batch, channel, sizes in splits:
        axes = Pattern.parse(f"{batch} {channel} s ->").axes
        for kept in itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(len(axes) + 1)):
            if all(axis in kept for axis in sizes):
                yield Pattern.parse(f"{batch} {channel} s -> {' '.join(kept)}"), sizes


def members(pattern: Pattern, shape: tuple[int, int, int], options: Mapping[str, int]) -> Tensor:
    """The number of the statistic to which each element of a ``(b, c, s)`` tensor belongs."""
    sizes = pattern.sizes(shape, options)
    number = torch.zeros((), dtype=torch.long)
    for axis in pattern.axes:
        place = torch.arange(sizes[axis]) if axis in pattern.kept else torch.zeros(sizes[axis], dtype=torch.long)
        number = number.unsqueeze(-1) * (sizes[axis] if axis in pattern.kept else 1) + place
    return number.reshape(shape)


def _moved(one: Tensor, other: Tensor) -> bool:
    size = torch.maximum(one.abs().max(), other.abs().max()).clamp(min=1e-12)
    return bool((one - other).abs().max() > _NOTICED * size)
