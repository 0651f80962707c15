"""Studies: what is compared (`Study`), how it is run (`run_study`), and where the results lie (`store`).

The names are loaded when they are first used: reading results, for a report, imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from normzoo.study.runner import Summary as Summary
    from normzoo.study.runner import run_study as run_study
    from normzoo.study.spec import Cell as Cell
    from normzoo.study.spec import Study as Study
    from normzoo.study.spec import grid as grid
    from normzoo.study.spec import load_study_file as load_study_file
    from normzoo.study.store import load_results as load_results

_HOME = {
    "Cell": "spec",
    "Study": "spec",
    "Summary": "runner",
    "grid": "spec",
    "load_results": "store",
    "load_study_file": "spec",
    "run_study": "runner",
}

__all__ = ["Cell", "Study", "Summary", "grid", "load_results", "load_study_file", "run_study"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'normzoo.study' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"normzoo.study.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
