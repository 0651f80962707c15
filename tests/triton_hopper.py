"""Compile the kernels for an H200 without having one, as the plans for it launch them: ``python triton_hopper.py``.

Prints a line of JSON for each kernel: the case, the kernel, its grid and the bytes of its widest load.
"""

from __future__ import annotations

import json
import re
from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

import normzoo.ops.triton as backend
from normzoo.ops.triton import kernels

CASES: dict[str, tuple[str, dict[str, int], tuple[int, int, int], bool]] = {
    "batch, channels first": ("b c s -> c", {}, (64, 64, 1024), False),
    "batch, channels last": ("b c s -> c", {}, (64, 64, 1024), True),
    "group, channels first": ("b (g c) s -> b g", {"g": 8}, (64, 64, 1024), False),
    "group, channels last": ("b (g c) s -> b g", {"g": 8}, (64, 64, 1024), True),
    "layer, tokens": ("b c s -> b s", {}, (32, 512, 512), True),
    "layer, positions": ("b c s -> b s", {}, (64, 64, 1024), False),
    "user's own": ("b (g c) s -> g", {"g": 8}, (64, 64, 1024), False),
}


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

    def __getitem__(self, grid: tuple[int]) -> Any:
        def compile_only(*arguments: Any, **options: Any) -> None:
            built = self.kernel.warmup(*arguments, grid=grid, **options)
            code = built.asm["ptx"]
            loads = [4 * int(words or 1) for words in re.findall(r"ld\.global(?:\.v(\d))?\.b32", code)]
            copies = [int(n, 16) for n in re.findall(r"cp\.async\.c.\.shared\.global .*\], 0x(\w+)", code)]
            self.done.append(
                {
                    "kernel": self.kernel.fn.__name__,
                    "programs": grid[0],
                    "widest load": max(loads + copies, default=0),
                }
            )

        return compile_only


def main() -> None:
    triton.runtime.driver.set_active(Hopper())
    backend._processors = lambda index: 132
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


if __name__ == "__main__":
    main()
