from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from normzoo.study import store


class Folder:
    """A study's folder with results that were never trained: every number in it is known."""

    def __init__(self, root: Path, name: str = "synthetic", baseline: str | None = "batch_norm") -> None:
        self.path = root / name
        self.path.mkdir(parents=True, exist_ok=True)
        self.study: dict[str, Any] = {
            "name": name,
            "norms": [],
            "labels": {},
            "tasks": [],
            "settings": [],
            "seeds": [],
            "baseline": baseline,
            "threads": 1,
            "varied": [],
            "cells": [],
            "keys": {},
            "created": 1.0,
            "updated": 1.0,
            "versions": {"normzoo": "0.1.0"},
        }

    def cell(
        self,
        norm: str,
        seed: int = 0,
        value: float | None = 0.9,
        *,
        task: str = "digits/cnn",
        setting: dict[str, Any] | None = None,
        validation: float | None = None,
        status: str | None = "done",
        metric: str = "accuracy",
        mode: str = "max",
        label: str | None = None,
        curve: list[float | None] | None = None,
        error: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None,
        **row: Any,
    ) -> str:
        """Add one cell; ``status=None`` is a cell that has not finished."""
        setting = setting or {}
        config = {
            "study": self.study["name"],
            "norm": norm,
            "label": label or norm,
            "task": task,
            "seed": seed,
            "threads": 1,
            "accelerator": "cpu",
            "source_hash": None,
            "normzoo": "0.1.0",
            "torch": "2.13.0",
            "epochs": 10,
            "batch_size": 64,
            "optimizer": "adamw",
            "lr": 0.003,
            "model.depth": 2,
        } | setting
        cell_id = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
        for key, item in (("norms", norm), ("tasks", task), ("settings", setting), ("seeds", seed), ("cells", cell_id)):
            if item not in self.study[key]:
                self.study[key].append(item)
        self.study["labels"][norm] = label or norm
        self.study["keys"][cell_id] = cell_id
        header = {
            "id": cell_id,
            "study": self.study["name"],
            "norm": norm,
            "label": label or norm,
            "task": task,
            "seed": seed,
            "group": f"{task} {norm} {json.dumps(setting, sort_keys=True)}",
            "metric": metric,
            "mode": mode,
            "config": config,
            "attempt": 1,
            "started": 100.0,
        }
        folder = store.prepare_cell(self.path, header)
        for epoch, point in enumerate(curve or []):
            store.append_line(
                folder / store.METRICS,
                {"step": 10 * epoch, "epoch": epoch, "seconds": 0.1 * epoch, f"val/{metric}": point},
            )
        if status is not None:
            found = {f"test/{metric}": value, f"val/{metric}": value if validation is None else validation}
            result = header | {
                "status": status,
                "metrics": store.finite(metrics if metrics is not None else found),
                "steps": 100,
                "seconds": {"total": 4.0, "train": 3.0, "setup": 1.0},
                "step_ms": 10.0,
                "parameters": 12345,
                "norm_parameters": 128,
                "peak_memory_mb": 512.0,
                "versions": {"normzoo": "0.1.0", "torch": "2.13.0"},
                "host": {"platform": "Linux", "cpu": "a processor", "threads": 1, "accelerator": "cpu"},
                "warnings": [],
                "error": error,
                "finished": 104.0,
            }
            store.write_json_atomic(folder / store.RESULT, result | row)
        return cell_id

    def write(self) -> Path:
        store.open_study(self.path, self.study)
        return self.path
