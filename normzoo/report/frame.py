"""The result files of a study as tidy rows: one a cell, nothing dropped."""

from __future__ import annotations

import json
import math
import os
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normzoo.errors import NormzooError
from normzoo.report.text import one_line
from normzoo.study import store

if TYPE_CHECKING:
    import pandas as pd

# What tells a cell from the others in its pair or in its group; everything else in a configuration is its setting.
IDENTITY = {"norm", "label", "task", "seed", "study", "id", "group", "imports", "source", "source_hash"}

_MEASURES = ("steps", "step_ms", "parameters", "norm_parameters", "peak_memory_mb")
_GROUPS = ("seconds.", "", "config.", "versions.", "host.", "error.")
_LAST = ("notes", "warnings", "attempt", "started", "finished")

Row = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """Everything a report is made from.

    Attributes:
        directory: the study's folder.
        study: the contents of ``study.json``.
        rows: one for each finished cell, in the order of the study; see :func:`load`.
        unfinished: how many cells of the study have no result.
        skipped: what was wrong with the files that had to be skipped, one message each.
    """

    directory: Path
    study: Mapping[str, Any]
    rows: tuple[Row, ...]
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
        return unique(row["task"] for row in self.rows)

    @property
    def labels(self) -> list[str]:
        """Labels of the norms that have a result, in the order of the study."""
        return unique(row["label"] for row in self.rows)

    def column(self, name: str) -> list[Any]:
        """What the cells have under one name, leaving out those that have nothing."""
        return column(self.rows, name)

    def names(self, prefix: str) -> list[str]:
        """The names of a group of columns, ``"config."``, in the order of their first appearance."""
        return unique(name for row in self.rows for name in row if name.startswith(prefix))

    def frame(self) -> pd.DataFrame:
        """The rows as a table whose columns have one type each."""
        import pandas as pd

        names = unique(name for row in self.rows for name in row)
        base = names[: names.index("seconds.total")]
        groups: dict[str, list[str]] = {prefix: [] for prefix in _GROUPS}
        for name in names:
            if name not in base and name not in _LAST:
                groups[next((p for p in _GROUPS if p and name.startswith(p)), "")].append(name)
        ordered = [*base, *(name for group in groups.values() for name in group), *_LAST]
        return pd.DataFrame({name: _one_type([row.get(name) for row in self.rows]) for name in ordered})

    def curve(self, cell_id: str, metric: str) -> tuple[list[float], list[float]]:
        """Epochs and values of one metric of one cell, NaN where it was not finite; empty when it was never logged."""
        with warnings.catch_warnings():
            # A torn last line is what an interrupted cell leaves behind; its other lines are good.
            warnings.simplefilter("ignore", store.StoreWarning)
            lines = store.load_metrics(self.directory, cell_id)
        points: dict[float, float] = {}
        for line in lines:
            epoch = _number(line.get("epoch"))
            if metric in line and epoch is not None:
                value = _number(line[metric])
                points[epoch] = math.nan if value is None else value
        return sorted(points), [points[epoch] for epoch in sorted(points)]


def load(directory: str | os.PathLike[str]) -> Results:
    """Read a study's folder.

    A row has ``id task norm label setting seed group status outcome measured value validation metric mode steps step_ms
    parameters norm_parameters peak_memory_mb``, then ``seconds.*``, one entry a logged metric (``test/accuracy``), the
    flat configuration (``config.*``), ``versions.*``, ``host.*``, ``error.*``, ``notes``, ``warnings``, ``attempt``,
    ``started`` and ``finished``. The less obvious ones:

    - ``outcome``: ``ok``, ``diverged`` (without a finite value) or ``failed``;
    - ``measured`` and ``value``: the metric of the test part, and its value, None unless the outcome is ``ok``;
    - ``validation``: the metric that settings are chosen by;
    - ``setting``: a short text of what varies within the task.

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
    ours = [warning for warning in caught if issubclass(warning.category, store.StoreWarning)]
    skipped = [str(warning.message).replace(f"{directory}{os.sep}", "") for warning in ours]
    if not rows:
        raise NormzooError(
            f"{directory} has no results yet: 0 of {len(study['cells'])} cells have finished"
            f"{'; ' + skipped[0] if skipped else ''}. Run the study first; the same command continues it"
        )
    tidy = _tidy(rows)
    return Results(directory, study, tuple(tidy), len(set(study["cells"])) - len(tidy), tuple(skipped))


def unique(values: Iterable[str]) -> list[str]:
    """The values, each once, in the order of their first appearance."""
    return list(dict.fromkeys(values))


def column(rows: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    """What the rows have under one name, leaving out those that have nothing."""
    return [row[name] for row in rows if row.get(name) is not None]


def median(rows: Iterable[Mapping[str, Any]], name: str) -> float:
    """The median of a column, NaN when no row has it."""
    values = column(rows, name)
    return float(statistics.median(values)) if values else math.nan


def _tidy(rows: Sequence[Row]) -> list[Row]:
    rows = list({row["id"]: row for row in rows}.values())
    labels = _labels(rows)
    measured = _measured(rows)
    return [
        _row(row, labels[row["norm"]], setting, measured[row["task"]])
        for row, setting in zip(rows, _settings(rows), strict=True)
    ]


def _row(row: Row, label: str, setting: str, key: str) -> Row:
    outcome, metrics, seconds = _outcome(row, key), row["metrics"], row.get("seconds") or {}
    return {
        "id": row["id"],
        "task": row["task"],
        "norm": row["norm"],
        "label": label,
        "setting": setting,
        "seed": int(row["seed"]),
        "group": row["group"],
        "status": row["status"],
        "outcome": outcome,
        "measured": key,
        "value": _number(metrics.get(key)) if outcome == "ok" else None,
        # Not by outcome, which may look at the test part: settings are chosen by this column.
        "validation": _number(metrics.get(f"val/{row['metric']}")) if row["status"] == "done" else None,
        "metric": row["metric"],
        "mode": row["mode"],
        **{name: _number(row.get(name)) for name in _MEASURES},
        "seconds.total": _number(seconds.get("total")),
        **{f"seconds.{name}": _number(value) for name, value in seconds.items()},
        # A metric logged without a part (``loss``, ``seed``) must not take the place of another column.
        **{k if "/" in k else f"metrics.{k}": _number(v) for k, v in metrics.items() if k != "nonfinite"},
        **{f"config.{name}": _scalar(value) for name, value in row["config"].items()},
        **{f"versions.{name}": _scalar(value) for name, value in (row.get("versions") or {}).items()},
        **{f"host.{name}": _scalar(value) for name, value in (row.get("host") or {}).items()},
        **{f"error.{name}": _error(row, key).get(name) for name in ("type", "message", "traceback")},
        **{name: "\n".join(one_line(text) for text in row.get(name) or []) or None for name in ("notes", "warnings")},
        **{name: _scalar(row.get(name)) for name in ("attempt", "started", "finished")},
    }


def _labels(rows: Sequence[Row]) -> dict[str, str]:
    """Label by canonical name; two norms of one label (a class name in two files) are told apart by their names."""
    labels = {row["norm"]: str(row["label"]) for row in rows}
    taken = list(labels.values())
    return {norm: label if taken.count(label) == 1 else f"{label} [{norm}]" for norm, label in labels.items()}


def _settings(rows: Sequence[Row]) -> list[str]:
    """For every row a short text of its setting: the values of what varies within its task, or nothing."""
    values: dict[str, dict[str, set[str]]] = {}
    for row in rows:
        for key, value in row["config"].items():
            values.setdefault(row["task"], {}).setdefault(key, set()).add(json.dumps(value, sort_keys=True))
    texts = []
    for row in rows:
        varied = [k for k, v in values[row["task"]].items() if len(v) > 1 and k not in IDENTITY]
        texts.append(", ".join(f"{k}={_scalar(row['config'].get(k))}" for k in varied))
    return texts


def _measured(rows: Sequence[Row]) -> dict[str, str]:
    """For every task the key of the metric to report: of the test part, of the validation part when there is none."""
    keys = {}
    for task in unique(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        metric, mode = mine[0]["metric"], mine[0]["mode"]
        if mode not in ("max", "min") or any((row["metric"], row["mode"]) != (metric, mode) for row in mine):
            pairs = ", ".join(sorted({f"{row['metric']} ({row['mode']})" for row in mine}))
            raise NormzooError(f"the results of {task!r} must share one metric with mode max or min, and have {pairs}")
        test, validation = f"test/{metric}", f"val/{metric}"
        has_test = any(test in row["metrics"] for row in mine)
        keys[task] = test if has_test or not any(validation in row["metrics"] for row in mine) else validation
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
        return {"type": "MissingMetric", "message": f"the run ended without logging {key}"}
    return {}


def _number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return value
    return None


def _scalar(value: object) -> object:
    """A value that fits in a cell of a table."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, sort_keys=True)


def _one_type(values: list[Any]) -> list[Any]:
    """Parquet wants one type a column: text where numbers, booleans and text are mixed."""
    kinds = {float if type(v) in (int, float) else type(v) for v in values if v is not None}
    return values if len(kinds) < 2 else [v if v is None else str(v) for v in values]
