"""One case, measured: the floor and all contenders in the same rounds."""

from __future__ import annotations

import re
import statistics
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from normzoo import registry
from normzoo.bench.case import DIRECTIONS, Case, Inputs
from normzoo.bench.contenders import (
    BACKENDS,
    FORMULA,
    OURS,
    REFUSALS,
    TORCH,
    Absent,
    Contender,
    first_line,
    line_up,
)
from normzoo.bench.result import FLOOR, Row
from normzoo.bench.timing import STANDARD, Effort, Job, measure, quartiles, ratio, threads


class Subject(NamedTuple):
    """A norm to measure, with or without a mask."""

    norm: str
    masked: bool = False


def measure_case(
    case: Case,
    subjects: Sequence[Subject],
    against: Sequence[str] = (FORMULA, TORCH),
    direction: str = "both",
    effort: Effort = STANDARD,
) -> list[Row]:
    """Time the floor, the norms and what they are compared with, all in the same rounds.

    The floor is what any norm must do with memory: copy ``x`` in the forward pass; read ``x`` and ``dy`` and write
    ``dx`` in the backward pass, as an addition does; both into buffers that are kept.

    Args:
        case: the tensor.
        subjects: the norms.
        against: see :func:`normzoo.bench.contenders.alternatives`.
        direction: ``"forward"``, ``"backward"`` or ``"both"``, which gives all three.
        effort: how long.

    Returns:
        A row for each contender and direction; one without a time, with the reason, for each that takes no part.
    """
    inputs = case.inputs()
    jobs: dict[Key, Job] = {("", FLOOR): floor_job(inputs, direction != "forward")}
    saved: dict[Key, int] = {}
    ways: dict[Key, str] = {}
    refused: list[Row] = []
    labels = Counter(registry.label(norm) for norm in {subject.norm for subject in subjects})
    compiling = many_compilations() if "compile" in against else nullcontext()
    with threads(effort.threads), compiling:
        for norm, masked in dict.fromkeys(subjects):
            label = registry.label(norm)
            for found in line_up(norm, case, against, masked, label if labels[label] == 1 else norm):
                key = found.norm, found.name
                reason = found.reason if isinstance(found, Absent) else refusal(found, inputs)
                if isinstance(found, Absent) or reason:
                    refused.append(empty_row(case, *key, direction, reason))
                    continue
                jobs[key] = found.job(inputs, direction != "forward")
                if not found.compiled:
                    saved[key] = saved_bytes(found, inputs)
                if found.name.startswith(OURS):
                    ways[key] = way(found, inputs)
        measure(list(jobs.values()), device=case.device, effort=effort)
    rows = timed_rows(case, jobs, ("", FLOOR), direction)
    for row in rows:
        key = row.norm, row.contender
        row.saved_bytes, row.way = saved.get(key), ways.get(key, "")
        row.gb_per_s = case.bytes(row.direction) / row.seconds / 1e9 if row.seconds else None
    return rows + refused


Key = tuple[str, str]
"""A norm's label and the name of a contender."""


def timed_rows(case: Case, jobs: Mapping[Key, Job], base: Key | None, direction: str) -> list[Row]:
    """What the rounds of the jobs say, in multiples of the base's time."""
    rows = []
    for one in DIRECTIONS if direction == "both" else (direction,):
        times = {key: job.seconds(one) for key, job in jobs.items()}
        for (norm, name), own in times.items():
            row = empty_row(case, norm, name, one)
            row.seconds = statistics.median(own.values())
            row.low, row.high = quartiles(list(own.values()))
            row.floors = None if base not in times else ratio(own, times[base])
            best = _best_other(times, norm, name)
            row.to_best = None if best is None else ratio(own, best)
            row.rounds, row.calls = len(own), jobs[norm, name].calls
            rows.append(row)
    return rows


def _best_other(times: Mapping[Key, dict[int, float]], norm: str, name: str) -> dict[int, float] | None:
    """The fastest that the norm is compared with; ways of ours do not count for another one of ours."""
    rivals = [
        rival_times
        for (of, rival), rival_times in times.items()
        if of == norm and rival != name and not (name.startswith(OURS) and rival.startswith(OURS))
    ]
    return min(rivals, key=lambda rival: statistics.median(rival.values())) if norm and rivals else None


def empty_row(case: Case, norm: str, name: str, direction: str, reason: str = "") -> Row:
    """A row without times yet."""
    shape = "x".join(map(str, case.shape))
    return Row(norm, name, shape, case.layout, case.dtype, case.device, direction, reason=reason)


def floor_job(inputs: Inputs, backward: bool = True) -> Job:
    """A copy, and an addition, into kept buffers."""
    x, dy = inputs.x.detach(), inputs.dy
    y, dx = torch.empty_like(x), torch.empty_like(x)
    return Job(lambda: y.copy_(x), (lambda _: torch.add(x, dy, out=dx)) if backward else None)


def refusal(contender: Contender, inputs: Inputs) -> str:
    """Why a contender cannot serve the inputs, or nothing; compiles what is to be compiled."""
    try:
        with contender.context():
            y = contender.call(inputs)
            torch.autograd.grad(y, [inputs.x, *contender.module.parameters()], inputs.dy, allow_unused=True)
    except REFUSALS as error:
        return first_line(error)
    wanted = contender.name.removeprefix(f"{OURS} ")
    if wanted in BACKENDS and way(contender, inputs) != wanted:
        return f"{wanted} does not serve this, the formula would take its place"
    return ""


class _Operators(TorchDispatchMode):
    """Notes what operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def way(contender: Contender, inputs: Inputs) -> str:
    """Which of :data:`normzoo.ops.CHOICES` computes a norm of ours, told by the operators that its forward calls."""
    with _Operators() as seen, contender.context():
        contender.call(inputs)
    if any(name.startswith("normzoo.") for name in seen.names):
        return "triton" if inputs.x.is_cuda else "cpu"
    return "native" if any(re.match(r"aten\.native_\w+_norm", name) for name in seen.names) else "reference"


class _Kept:
    """What autograd holds in place of a tensor that it saves."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(contender: Contender, inputs: Inputs) -> int:
    """What the forward pass keeps for the backward pass: distinct memory, the input included, parameters not.

    Autograd tells of every tensor that it saves, also of those that operators written in C++ do.
    """
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        kept.add(held := _Kept(tensor.detach()))  # an output that saves itself would never be freed
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor), contender.context():
        y = contender.call(inputs)
    storages = [held.tensor.untyped_storage() for held in kept]  # of those alone that the output still needs
    found = {storage.data_ptr(): storage.nbytes() for storage in storages}
    for parameter in contender.module.parameters():
        found.pop(parameter.untyped_storage().data_ptr(), None)
    del y
    return sum(found.values())


@contextmanager
def many_compilations() -> Iterator[None]:
    """Let every contender have compiled code of its own; by default torch gives up after a few of one function."""
    import torch._dynamo as dynamo

    dynamo.reset()
    with dynamo.config.patch(recompile_limit=256):
        yield
