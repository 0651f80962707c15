"""What it ran on."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path

import torch

import normzoo
from normzoo import ops
from normzoo.ops import kernels


def machine(device: str, threads: int) -> dict[str, str]:
    """The machine, the versions and the date, as text by name."""
    found = {"processor": f"{processor()}, {os.cpu_count()} cores"}
    if device == "cuda":
        found["device"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    found |= {
        "threads": str(threads),
        "time": "CUDA events" if device == "cuda" else "CPU seconds" if threads == 1 else "wall clock",
        "system": " ".join([platform.system(), *platform.libc_ver()]).strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "normzoo": normzoo.__version__,
        "kernels": kernel_status(),
        "date": time.strftime("%Y-%m-%d"),
    }
    return found


def processor() -> str:
    """The processor's name and its widest vectors, as far as the system tells them."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def memory_bytes(device: str) -> int:
    """How many bytes there are in all; where the system does not tell, what a size can count."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**63 - 1


def kernel_status() -> str:
    """How the compiled CPU kernels stand."""
    status = kernels.status()
    return f"{status.state} ({status.reason})"


def choices() -> list[tuple[str, str]]:
    """Which way of computing serves what, in order of preference."""
    return [(choice.name, choice.serves) for choice in ops.CHOICES]
