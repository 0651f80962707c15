"""Imported once by the forkserver: every cell is forked from a process that has all this in memory already.

Importing Lightning takes seconds, forking a hundredth of one. Nothing here may start a thread that a fork would lose,
nor touch a device; the threads of the linear algebra libraries are held back for that reason, and set for each cell by
itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import traceback

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(_name, "1")

# Ctrl-C reaches every process of the terminal; it is the runner's to answer.
_before = signal.signal(signal.SIGINT, signal.SIG_IGN)

failure: str | None = None
"""The traceback of an import that does not work here; the runner reads it and says so before any cell starts."""

try:
    for _name in ("pytorch_lightning", "torchmetrics", "sklearn.datasets", "normzoo.tasks.building"):
        importlib.import_module(_name)
    for _name in ("torch._dynamo", "torch.profiler._cupti_monitor", "einops._torch_specific"):
        with contextlib.suppress(ImportError):  # what a first step imports; private, and not in every version
            importlib.import_module(_name)
    from normzoo import data, registry
    from normzoo.ops import kernels, memory
    from normzoo.study import cell

    memory.start()  # for itself and every cell
    kernels.load()  # built once, not by each of the first cells
    registry.list_norms()
    for _name in data.list_data():
        data.data_info(_name)
    cell.versions()
    cell.processor()
except Exception:  # a broken installation raises anything at all; it is reported, not hidden
    failure = traceback.format_exc()

# What is here stays: the collector of a cell need not walk it, and so need not copy its pages.
gc.collect()
gc.freeze()
signal.signal(signal.SIGINT, _before)

if __name__ == "__main__":
    print(failure or "everything that a training needs can be imported")
