"""The result files of a study as one tidy table: one row a cell, nothing dropped."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from normzoo.errors import NormzooError
from normzoo.study import store

# What tells a cell from the others in its pair or in its group; everything else in a configuration is its setting.
_IDENTITY = {"norm", "label", "task", "seed", "study", "id", "group", "imports", "source", "source_hash"}

_SECONDS = ("total", "train", "setup")


@dataclass(frozen=True)
class Results:
    """Everything a report is made from.

    Attributes:
        directory: the study's folder.
        study: the contents of ``study.json``.
        frame: one row a finished cell; see :func:`load`.
        unfinished: how many cells of the study have no result.
        skipped: what was wrong with the files that had to be skipped, one message each.
    """

    directory: Path
    study: Mapping[str, Any]
    frame: pd.DataFrame
    unfinished: int
    skipped: tuple[str, ...]

    @property
    def baseline(self) -> str | None:
        """The canonical name of the norm that all others are compared with; None when the study names none.

        A label whose norm was changed between two runs of the study means the later one.
        """
        wanted = self.study.get("baseline")
        named = [norm for norm, label in self.study.get("labels", {}).items() if wanted in (label, norm)]
        return named[-1] if named else wanted

    @property
    def tasks(self) -> list[str]:
        """Tasks that have a result, in the order of the study."""
        return list(dict.fromkeys(self.frame["task"]))

    def curve(self, cell_id: str, metric: str) -> tuple[list[float], list[float]]:
        """Epochs and values of one metric of one cell, NaN where it was not finite; empty when it was never logged."""
        points: dict[float, float] = {}
        for row in self._quietly(cell_id):
            if metric in row and _number(row.get("epoch")) is not None:
                value = _number(row[metric])
                points[float(row["epoch"])] = math.nan if value is None else value
        epochs = sorted(points)
        return epochs, [points[e] for e in epochs]

    def _quietly(self, cell_id: str) -> list[dict[str, Any]]:
        # A torn last line is what an interrupted cell leaves behind; its other lines are good.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", store.StoreWarning)
            return store.load_metrics(self.directory, cell_id)


def load(directory: str | os.PathLike[str]) -> Results:
    """Read a study's folder.

    The frame has the columns ``id task norm label setting seed group status outcome measured value validation metric
    mode steps step_ms parameters norm_parameters peak_memory_mb``, then ``seconds.*``, one column per logged metric
    (``test/accuracy``), the flat configuration (``config.*``), ``versions.*``, ``host.*``, ``error.*``, ``warnings``,
    ``attempt``, ``started`` and ``finished``. ``setting`` is a short text of what varies within the task; ``value`` is the
    metric named in ``measured``, NaN unless ``outcome`` is ``ok``; ``validation`` is what settings are chosen by.

    Raises:
        NormzooError: when the folder is no study, or no cell has a result.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise NormzooError(f"there is no folder {directory}; give the folder of a study, such as runs/quickstart")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        study = store.load_study(directory)
        rows = store.load_results(directory)
    for warning in caught:
        if not issubclass(warning.category, store.StoreWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    skipped = [str(w.message).replace(f"{directory}{os.sep}", "") for w in caught if issubclass(w.category, store.StoreWarning)]
    if not rows:
        raise NormzooError(
            f"{directory} has no results yet: 0 of {len(study['cells'])} cells have finished"
            f"{'; ' + skipped[0] if skipped else ''}. Run the study first; the same command continues it"
        )
    frame = _tidy(rows)
    return Results(directory, study, frame, len(set(study["cells"])) - len(frame), tuple(skipped))


def _tidy(rows: list[dict[str, Any]]) -> pd.DataFrame:
    rows = list({row["id"]: row for row in rows}.values())
    labels = _labels(rows)
    settings = _settings(rows)
    measured = _measured(rows)
    table = []
    for row, setting in zip(rows, settings, strict=True):
        key, by = measured[row["task"]], f"val/{row['metric']}"
        outcome = _outcome(row, key)
        metrics = row["metrics"]
        table.append(
            {
                "id": row["id"],
                "task": row["task"],
                "norm": row["norm"],
                "label": labels[row["norm"]],
                "setting": setting,
                "seed": int(row["seed"]),
                "group": row["group"],
                "status": row["status"],
                "outcome": outcome,
                "measured": key,
                "value": _number(metrics.get(key)) if outcome == "ok" else None,
                # Not by outcome, which may look at the test part: settings are chosen by this column.
                "validation": _number(metrics.get(by)) if row["status"] == "done" else None,
                "metric": row["metric"],
                "mode": row["mode"],
                **{name: row.get(name) for name in ("steps", "step_ms", "parameters", "norm_parameters", "peak_memory_mb")},
                **{f"seconds.{name}": (row.get("seconds") or {}).get(name) for name in _SECONDS},
                **{name: _number(value) for name, value in metrics.items() if name != "nonfinite"},
                **{f"config.{name}": _scalar(value) for name, value in row["config"].items()},
                **{f"versions.{name}": _scalar(value) for name, value in (row.get("versions") or {}).items()},
                **{f"host.{name}": _scalar(value) for name, value in (row.get("host") or {}).items()},
                **{f"error.{name}": _error(row, key).get(name) for name in ("type", "message", "traceback")},
                "warnings": "\n".join(str(text) for text in row.get("warnings") or []) or None,
                **{name: row.get(name) for name in ("attempt", "started", "finished")},
            }
        )
    frame = pd.DataFrame(table)
    for name in frame.columns:
        frame[name] = _one_type(frame[name])
    for name in ("value", "validation", "step_ms", "parameters", "norm_parameters", "peak_memory_mb", "steps"):
        frame[name] = pd.to_numeric(frame[name])
    return frame


def _labels(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Label by canonical name; two norms of one label (the same class name in two files) are told apart by their names."""
    labels = {row["norm"]: str(row["label"]) for row in rows}
    taken = list(labels.values())
    return {norm: label if taken.count(label) == 1 else f"{label} [{norm}]" for norm, label in labels.items()}


def _settings(rows: list[dict[str, Any]]) -> list[str]:
    """For every row a short text of its setting: the values of what varies within its task, or nothing."""
    values: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        for key, value in row["config"].items():
            values.setdefault(row["task"], {}).setdefault(key, set()).add(json.dumps(value, sort_keys=True))
    texts = []
    for row in rows:
        varied = [k for k, v in values[row["task"]].items() if len(v) > 1 and k not in _IDENTITY]
        texts.append(", ".join(f"{k}={_scalar(row['config'].get(k))}" for k in varied))
    return texts


def _measured(rows: list[dict[str, Any]]) -> dict[str, str]:
    """For every task the key of the metric to report: that of the test part, of the validation part when there is none."""
    keys = {}
    for task in {row["task"] for row in rows}:
        mine = [row for row in rows if row["task"] == task]
        metric, mode = mine[0]["metric"], mine[0]["mode"]
        if mode not in ("max", "min") or any((row["metric"], row["mode"]) != (metric, mode) for row in mine):
            pairs = sorted({f"{row['metric']} ({row['mode']})" for row in mine})
            raise NormzooError(f"the results of {task!r} must share one metric with mode max or min, and have {', '.join(pairs)}")
        test = f"test/{metric}"
        has_test = any(test in row["metrics"] for row in mine) or not any(f"val/{metric}" in row["metrics"] for row in mine)
        keys[task] = test if has_test else f"val/{metric}"
    return keys


def _outcome(row: Mapping[str, Any], key: str) -> str:
    if row["status"] != "done":
        return row["status"]
    if key not in row["metrics"]:
        return "failed"
    return "ok" if _number(row["metrics"][key]) is not None else "diverged"


def _error(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if row.get("error"):
        return row["error"]
    if row["status"] == "done" and key not in row["metrics"]:
        return {"type": "MissingMetric", "message": f"the run ended without logging {key}", "traceback": None}
    return {}


def _number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _scalar(value: object) -> object:
    """A value that fits in a cell of a table."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, sort_keys=True)


def _one_type(column: pd.Series) -> pd.Series:
    """Parquet wants one type a column: text where numbers, booleans and text are mixed."""
    kinds = {"number" if isinstance(v, (int, float)) and not isinstance(v, bool) else type(v).__name__ for v in column.dropna()}
    if len(kinds) > 1:
        return column.map(lambda v: v if v is None or v is pd.NA else str(v)).astype(object)
    return column
