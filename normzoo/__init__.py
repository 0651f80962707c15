"""normzoo: interchangeable normalization layers, and fair comparisons between them.

The public names are loaded when they are first used, so that ``import normzoo`` and ``normzoo --help`` cost nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from normzoo.checks import check_norm as check_norm
    from normzoo.errors import NormzooError as NormzooError
    from normzoo.layers.base import MomentNorm as MomentNorm
    from normzoo.layers.base import Norm as Norm
    from normzoo.layers.base import Paper as Paper
    from normzoo.layers.base import Traits as Traits
    from normzoo.layers.base import hold_statistics as hold_statistics
    from normzoo.layers.base import parameter_roles as parameter_roles
    from normzoo.layers.conditional import condition as condition
    from normzoo.ops.memory import keep_pages as keep_pages
    from normzoo.registry import create as create
    from normzoo.registry import info as info
    from normzoo.registry import list_norms as list_norms
    from normzoo.registry import register as register
    from normzoo.report import make_report as make_report
    from normzoo.study import Study as Study
    from normzoo.study import grid as grid
    from normzoo.study import run_study as run_study
    from normzoo.weights import apply_weight_norm as apply_weight_norm
    from normzoo.weights import list_weight_norms as list_weight_norms
    from normzoo.weights import register_weight_norm as register_weight_norm
    from normzoo.weights import remove_weight_norm as remove_weight_norm
    from normzoo.weights import weight_norm_info as weight_norm_info

_HOME = {
    "check_norm": "checks",
    "NormzooError": "errors",
    "MomentNorm": "layers.base",
    "Norm": "layers.base",
    "Paper": "layers.base",
    "Traits": "layers.base",
    "hold_statistics": "layers.base",
    "parameter_roles": "layers.base",
    "condition": "layers.conditional",
    "keep_pages": "ops.memory",
    "create": "registry",
    "info": "registry",
    "list_norms": "registry",
    "register": "registry",
    "make_report": "report",
    "Study": "study",
    "grid": "study",
    "run_study": "study",
    "apply_weight_norm": "weights",
    "list_weight_norms": "weights",
    "register_weight_norm": "weights",
    "remove_weight_norm": "weights",
    "weight_norm_info": "weights",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'normzoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"normzoo.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
