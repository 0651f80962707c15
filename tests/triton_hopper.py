"""Compile the kernels for an H200 without having one, as the plans for it launch them: ``python triton_hopper.py``.

Prints a line of JSON for each kernel: the case, the kernel, its grid, the bytes of its widest load and of the shared
memory of a program, and the registers of a thread with the bytes that do not fit into them. With ``recurrence``, for
the kernels of the recurrence.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

import normzoo.ops.triton as backend
import normzoo.ops.triton.recurrence as fused
from normzoo.ops.recurrence import CELLS, GATES, KINDS
from normzoo.ops.triton import cells, kernels

CASES: dict[str, tuple[str, dict[str, int], tuple[int, int, int], bool]] = {
    "batch, channels first": ("b c s -> c", {}, (64, 64, 1024), False),
    "batch, channels last": ("b c s -> c", {}, (64, 64, 1024), True),
    "group, channels first": ("b (g c) s -> b g", {"g": 8}, (64, 64, 1024), False),
    "group, channels last": ("b (g c) s -> b g", {"g": 8}, (64, 64, 1024), True),
    "layer, tokens": ("b c s -> b s", {}, (32, 512, 512), True),
    "layer, positions": ("b c s -> b s", {}, (64, 64, 1024), False),
    "user's own": ("b (g c) s -> g", {"g": 8}, (64, 64, 1024), False),
}
# cell, norm everywhere, sequences, units
RECURRENCES = [
    *((cell, kind, 64, 128) for cell in CELLS for kind in ("layer", "batch")),
    ("lstm", "layer", 64, 256), ("gru", "layer", 64, 256), ("lstm", "batch", 64, 256), ("lstm", "layer", 64, 125),
    ("tanh", "layer", 64, 1024), ("lstm", "layer", 512, 64), ("lstm", "layer", 512, 100), ("lstm", "none", 64, 512),
    ("gru", "layer", 64, 201), ("lstm", "running", 64, 128), ("gru", "rms", 1, 256), ("lstm", "batch", 64, 32),
    ("lstm", "batch", 512, 128),
]  # fmt: skip


class Hopper:
    """Stands in for the driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.done: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_only(*arguments: Any, **options: Any) -> None:
            built = self.kernel.warmup(*arguments, grid=grid, **options)
            code = built.asm["ptx"]
            loads = [4 * int(words or 1) for words in re.findall(r"ld\.global(?:\.v(\d))?\.b32", code)]
            copies = [int(n, 16) for n in re.findall(r"cp\.async\.c.\.shared\.global .*\], 0x(\w+)", code)]
            self.done.append(
                {
                    "kernel": self.kernel.fn.__name__,
                    "programs": math.prod(grid),
                    "widest load": max(loads + copies, default=0),
                    "shared": built.metadata.shared,
                    **registers(built.asm["cubin"]),
                }
            )

        return compile_only


def registers(code: bytes) -> dict[str, int]:
    """Of a thread, and the bytes of its stack, which holds what does not fit into them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = re.search(r"REG:(\d+) STACK:(\d+)", found)
    assert used is not None, found
    return {"registers": int(used[1]), "spilled": int(used[2])}


def norms() -> None:
    """Those of the norms."""
    stand_ins = {name: Compiled(getattr(kernels, name)) for name in ("forward", "moments", "merge", "sums", "backward")}
    for name, stand_in in stand_ins.items():
        setattr(kernels, name, stand_in)
    for case, (pattern, options, (b, c, s), channels_last) in CASES.items():
        x = torch.empty((b, s, c) if channels_last else (b, c, s), dtype=torch.bfloat16)
        weight = torch.empty(c)
        where = pattern, list(options.values()), channels_last
        _, mean, var, _ = backend._forward(x, weight, weight, None, None, None, None, *where, 1e-5, True, False)
        backend._backward(x, x, weight, None, mean, var, None, *where, 1e-5, True, False, True, True)
        for stand_in in stand_ins.values():
            for line in stand_in.done:
                print(json.dumps({"case": case} | line))
            stand_in.done.clear()


def recurrences() -> None:
    """Those of the recurrence."""
    stand_ins = [Compiled(cells.forward), Compiled(cells.backward)]
    cells.forward, cells.backward = stand_ins
    for cell, kind, batch, width in RECURRENCES:
        rows = GATES[cell] * width
        kinds = [KINDS.index(kind if cell == "lstm" or at < 2 else "none") for at in range(3)]
        channels = rows, rows, width
        gains = [torch.empty(c) if kind else None for kind, c in zip(kinds, channels, strict=True)]
        running = [
            torch.empty(1, 2, c) if KINDS[k] in ("batch", "running") else None
            for k, c in zip(kinds, channels, strict=True)
        ]
        learned: list[Any] = [
            torch.empty(batch, 1, width), torch.empty(rows, width), torch.empty(rows, width),
            gains[0], torch.empty(rows), gains[1], torch.empty(rows), gains[2], None, None,
        ]  # fmt: skip
        settings = [CELLS.index(cell), kinds, [1e-5] * 3]
        kept = fused._forward(*[*learned, *running, *settings, [0.1] * 3, True])
        fused._backward(*[kept[0], *kept[:8], *learned, *settings, [int(r is not None) for r in running], True])
        for stand_in in stand_ins:
            for line in stand_in.done:
                print(json.dumps({"case": f"{cell}, {kind}, {batch} sequences", "units": width} | line))
            stand_in.done.clear()


def main() -> None:
    triton.runtime.driver.set_active(Hopper())
    backend._processors = lambda index: 132
    fused._limits = lambda index: (132, 227 * 1024)
    recurrences() if sys.argv[1:] == ["recurrence"] else norms()


if __name__ == "__main__":
    main()
