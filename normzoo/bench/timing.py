"""How time is taken: every contender a short burst, then the next, round after round, in one process."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

BURST = 0.005
"""Seconds that a burst should take at least; small calls are repeated within it."""

MIN_ROUNDS, MAX_ROUNDS = 5, 60
SELDOM = 4
"""A contender that is much slower than the middle one takes part in one round of so many."""

_FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU


@dataclass(eq=False)
class Job:
    """Something to time.

    Attributes:
        forward: computes the output.
        backward: computes the gradients from the output; ``None`` to time the forward alone.
        context: what is entered around a burst.
    """

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], object] | None = None
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    calls: int = 1
    seldom: bool = False
    times: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Seconds of one forward and one backward, by round."""

    def seconds(self, direction: str) -> dict[int, float]:
        """The times of a direction, by round."""
        pick = {"forward": lambda f, b: f, "backward": lambda f, b: b, "both": lambda f, b: f + b}[direction]
        return {number: pick(*pair) for number, pair in self.times.items()}


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        threads: of torch.
        rounds: how many; as many as fit into ``seconds`` when left out.
        seconds: for each case, once everything is warm.
    """

    threads: int = 1
    rounds: int | None = None
    seconds: float = 3.0


STANDARD = Effort()


def measure(jobs: Sequence[Job], *, device: str, effort: Effort) -> int:
    """Time all jobs, interleaved, into their ``times``.

    Each round gives every job a burst, starting with another one each time; the first call of a burst does not count.
    On a CPU with one thread it is the CPU time of the process that counts, which other processes disturb least; with
    more threads the clock on the wall; on a GPU events around each call, with the L2 cache flushed before it. The
    backward pass is timed right after its forward pass, as in training, and includes freeing what was saved.

    Args:
        jobs: what to time.
        device: ``"cpu"`` or ``"cuda"``.
        effort: how long.

    Returns:
        The number of rounds.
    """
    clock = time.process_time if effort.threads == 1 else time.perf_counter
    burst, rounds = _cuda_burst if device == "cuda" else _cpu_burst(clock), effort.rounds
    for job in jobs:
        job.times.clear()
    with threads(effort.threads), _no_collector():
        for job in jobs:
            _calibrate(job, burst)
        middle = statistics.median(sum(job.times[0]) for job in jobs)
        for job in jobs:
            job.seldom = rounds is None and sum(job.times[0]) > 5 * middle
        if rounds is None:
            round_takes = sum(sum(j.times[0]) * (j.calls + 1) / (SELDOM if j.seldom else 1) for j in jobs)
            rounds = min(max(int(effort.seconds / round_takes), MIN_ROUNDS), MAX_ROUNDS)
        for job in jobs:
            job.times.clear()
        for number in range(rounds):
            first = number % len(jobs)
            for job in (*jobs[first:], *jobs[:first]):
                if not job.seldom or number % SELDOM == 0:
                    job.times[number] = burst(job)
    return rounds


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many threads of torch; code is compiled for as many, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_collector() -> Iterator[None]:
    """No garbage collection, which would fall to whoever's turn it is."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


Burst = Callable[[Job], tuple[float, float]]


def _calibrate(job: Job, burst: Burst) -> None:
    """Warm a job up, and find how many calls make a burst."""
    job.calls = 1
    job.times[0] = burst(job)
    if sum(job.times[0]) < BURST:
        job.calls = 10
        job.times[0] = burst(job)
    job.calls = max(1, math.ceil(BURST / max(sum(job.times[0]), 1e-7)))
    if job.calls > 1:
        job.times[0] = burst(job)


def _cpu_burst(clock: Callable[[], float]) -> Burst:
    reading = _cost_of(clock)

    def burst(job: Job) -> tuple[float, float]:
        ahead = back = 0.0
        with job.context():
            for number in range(job.calls + 1):
                if number == 1:  # the first call finds the caches as the one before has left them
                    ahead = back = 0.0
                began = clock()
                y = job.forward()
                middle = clock()
                if job.backward is not None:
                    gradients = job.backward(y)
                    del y, gradients  # a norm that saves much also has much to free
                    back += clock() - middle - reading
                else:
                    del y
                ahead += middle - began - reading
        return max(ahead, 0.0) / job.calls, max(back, 0.0) / job.calls

    return burst


def _cost_of(clock: Callable[[], float]) -> float:
    """What reading a clock costs; at small calls it would show."""
    pairs = []
    for _ in range(300):
        began = clock()
        pairs.append(clock() - began)
    return statistics.median(pairs)


@cache
def _flusher() -> Tensor:
    """Memory larger than the L2 cache: writing it leaves nothing else there."""
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")


def _cuda_burst(job: Job) -> tuple[float, float]:
    flush = _flusher()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(4)] for _ in range(job.calls + 1)]
    with job.context():
        for start, middle, again, end in pairs:
            flush.zero_()
            start.record()
            y = job.forward()
            middle.record()
            if job.backward is not None:
                flush.zero_()
                again.record()
                gradients = job.backward(y)
                end.record()
                del gradients
            del y
    torch.cuda.synchronize()
    del pairs[0]
    ahead = sum(start.elapsed_time(middle) for start, middle, _, _ in pairs) / 1e3
    back = 0.0 if job.backward is None else sum(again.elapsed_time(end) for _, _, again, end in pairs) / 1e3
    return ahead / job.calls, back / job.calls


def ratio(job: dict[int, float], base: dict[int, float]) -> float:
    """How many times longer: the median over the rounds in which both took part."""
    return statistics.median(job[number] / base[number] for number in job if number in base)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """A quarter of the values is below the first, a quarter above the second.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
    (2.0, 4.0)
    """
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
