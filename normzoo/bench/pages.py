"""What keeping pages gains: the same calls in two processes, one that keeps them and one that does not, in turn."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from normzoo.ops import memory

SHAPE = (32, 512, 512)
"""Of the tokens: 33.5 MB in float32, just beyond what glibc keeps by itself."""

CALLS = 3
"""Calls of a workload at a time."""

WORKLOADS = ("a copy", "torch.nn.LayerNorm", "torch.nn.RMSNorm", "normzoo layer_norm", "normzoo rms_norm")
"""The copy goes into new memory; norms are run forward and backward."""


@dataclass
class Gain:
    """One workload.

    Attributes:
        workload: its name.
        default: CPU seconds of a call in a process as it starts.
        kept: the same in a process that keeps its pages.
        gain: the first over the second, median over the rounds.
    """

    workload: str
    default: float
    kept: float
    gain: float


def measure_pages(rounds: int = 7, shape: tuple[int, ...] = SHAPE) -> list[Gain]:
    """Run each workload in both processes, in turn, on one thread, in CPU seconds."""
    workers = {keep: _start(keep, shape) for keep in (False, True)}
    gains = []
    try:
        for workload in WORKLOADS:
            pairs = []
            for number in range(rounds + 2):
                order = (False, True) if number % 2 else (True, False)
                seconds = {keep: _ask(workers[keep], workload) for keep in order}
                if number >= 2:  # the first ones fill what is kept
                    pairs.append((seconds[False], seconds[True]))
            default, kept = (statistics.median(side) for side in zip(*pairs, strict=True))
            gains.append(Gain(workload, default, kept, statistics.median(a / b for a, b in pairs)))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    return gains


def _start(keep: bool, shape: tuple[int, ...]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"from normzoo.bench.pages import work; work({shape})"],
        env=os.environ | {memory.OPT_OUT: str(int(keep)), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _ask(worker: subprocess.Popen[str], workload: str) -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(workload, file=worker.stdin, flush=True)
    return float(worker.stdout.readline())


def workloads(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """What a worker can run, by name."""
    import torch
    from torch import nn

    import normzoo as nz

    x = torch.randn(shape).requires_grad_()
    dy = torch.randn(shape)
    layers: dict[str, nn.Module] = {
        "torch.nn.LayerNorm": nn.LayerNorm(shape[-1]),
        "torch.nn.RMSNorm": nn.RMSNorm(shape[-1]),
        "normzoo layer_norm": nz.create("layer_norm", shape[-1], channel_dim=-1),
        "normzoo rms_norm": nz.create("rms_norm", shape[-1], channel_dim=-1),
    }

    def step(layer: nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    return {"a copy": x.detach().clone} | {name: step(layer) for name, layer in layers.items()}


def work(shape: tuple[int, ...]) -> None:
    """Answer each line of standard input, the name of a workload, by the CPU seconds of a call."""
    import torch

    torch.set_num_threads(1)
    memory.start()
    known = workloads(shape)
    for line in sys.stdin:
        run = known[line.strip()]
        began = time.process_time()
        for _ in range(CALLS):
            run()
        print((time.process_time() - began) / CALLS, flush=True)
