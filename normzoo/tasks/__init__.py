"""Tasks: a model, data, a loss and metrics, as LightningModules that run in any Trainer.

A task is a pair ``"data/model"``; a :class:`Setting` holds every choice of its training; :func:`build` makes both
modules, paired by the seed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from normzoo.tasks.catalogue import Task, find_task, list_tasks, primary_metric, resolve
from normzoo.tasks.setting import Setting

if TYPE_CHECKING:
    from normzoo.tasks.building import build
    from normzoo.tasks.compatibility import Unbuildable, check_compatible
    from normzoo.tasks.layer_sync import NormSync
    from normzoo.tasks.modules import ClassificationTask, LanguageModelTask, RegressionTask, TrainingTask

_HOME = {  # these import torch, and all but the last Lightning
    "ClassificationTask": "modules",
    "LanguageModelTask": "modules",
    "NormSync": "layer_sync",
    "RegressionTask": "modules",
    "TrainingTask": "modules",
    "Unbuildable": "compatibility",
    "build": "building",
    "check_compatible": "compatibility",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'normzoo.tasks' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"normzoo.tasks.{_HOME[name]}"), name)
    globals()[name] = value
    return value


__all__ = [
    "ClassificationTask",
    "LanguageModelTask",
    "NormSync",
    "RegressionTask",
    "Setting",
    "Task",
    "TrainingTask",
    "Unbuildable",
    "build",
    "check_compatible",
    "find_task",
    "list_tasks",
    "primary_metric",
    "resolve",
]
