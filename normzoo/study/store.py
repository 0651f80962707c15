"""The result store: one folder a study, one folder a cell, plain JSON files, the result written last.

.. code-block:: text

    runs/<study>/study.json                the study as data: see `open_study`
    runs/<study>/.lock                     held by the one runner
    runs/<study>/.mirror-stop              the runner has ended: the W&B mirror writes what is left, then exits
    runs/<study>/mirror.log                what the W&B mirror said
    runs/<study>/cells/<id>/config.json    the cell's header, written before it starts: see `HEADER`
    runs/<study>/cells/<id>/metrics.jsonl  one JSON object a line: {"step": 10, "epoch": 0, "seconds": 1.2, ...}
    runs/<study>/cells/<id>/log.txt        everything the cell's process printed
    runs/<study>/cells/<id>/result.json    the row of the cell: its header and what came of it; whole, or not there

Every file is strict JSON. A number that is not finite is ``null``, and its key is listed under ``"nonfinite"`` in the
same object. A cell that is started again gets a *new* ``metrics.jsonl`` (the old one is removed first, so it changes
its inode and gets shorter) and a ``config.json`` with a higher ``attempt`` or a later ``started``. Readers skip what is
torn or foreign with a warning that names the file. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from normzoo.errors import NormzooError

STUDY = "study.json"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
LOG = "log.txt"
RESULT = "result.json"
LOCK = ".lock"

MIRROR_STOP = ".mirror-stop"
"""Appears in the study's folder when the runner has ended. The runner also holds the write end of the mirror's standard
input: end of file there means the runner is gone, however it went, and the mirror should finish in the same way."""
MIRROR_LOG = "mirror.log"

STATUSES = ("done", "diverged", "failed")

HEADER = ("id", "study", "norm", "label", "task", "seed", "group", "metric", "mode", "config", "attempt", "started")
"""The keys of ``config.json``, all repeated in ``result.json``: ``config`` is the flat configuration, ``metric`` and
``mode`` are the task's own (``"accuracy"``, ``"max"``), ``group`` is the same for all seeds of one thing, ``started``
is seconds since 1970."""

_NOTHING_FOUND: dict[str, Any] = {
    "metrics": {},
    "steps": None,
    "seconds": None,
    "step_ms": None,
    "parameters": None,
    "norm_parameters": None,
    "peak_memory_mb": None,
    "versions": {},
    "host": {},
    "notes": [],
    "warnings": [],
    "error": None,
}

_RESULT_KEYS = {*HEADER, "status", "metrics"}


class StoreWarning(UserWarning):
    """A file of the store is torn or not ours, and was skipped."""


def cell_dir(directory: str | os.PathLike[str], cell_id: str) -> Path:
    """The folder of one cell."""
    return Path(directory) / "cells" / cell_id


# ---------------------------------------------------------------------------------------------------------- writing


def write_json_atomic(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write ``value`` so that a reader, a crash or a full disk sees the old file or the new one, and nothing between.

    Raises:
        OSError: when the disk is full or the folder cannot be written; the file is as it was.
    """
    path = Path(path)
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; Windows cannot open folders and does not need it."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append_line(path: str | os.PathLike[str], row: Mapping[str, Any]) -> None:
    """Append one row to a ``.jsonl`` file in a single write; a torn last line of an earlier writer is closed first."""
    line = json.dumps(finite(row), separators=(",", ":"), allow_nan=False).encode() + b"\n"
    with open(path, "ab+", buffering=0) as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line)


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with every number that JSON cannot say replaced by None, and their keys under ``"nonfinite"``.

    >>> finite({"step": 3, "train/loss": float("nan")})
    {'step': 3, 'train/loss': None, 'nonfinite': ['train/loss']}
    """
    bad = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if not bad:
        return dict(row)
    return {key: None if key in bad else value for key, value in row.items()} | {"nonfinite": bad}


def prepare_cell(directory: str | os.PathLike[str], header: Mapping[str, Any]) -> Path:
    """Make the cell's folder, empty it of an earlier attempt, and write its ``config.json``; the folder is returned."""
    folder = cell_dir(directory, header["id"])
    folder.mkdir(parents=True, exist_ok=True)
    for old in (RESULT, METRICS):
        (folder / old).unlink(missing_ok=True)
    for old in folder.glob(".*.tmp"):
        old.unlink(missing_ok=True)
    write_json_atomic(folder / CONFIG, header)
    return folder


def make_result(header: Mapping[str, Any], status: str, **found: Any) -> dict[str, Any]:
    """A complete row: the header, the status and what was found; what is not given is None, or empty."""
    unknown = set(found) - set(_NOTHING_FOUND)
    if unknown or status not in STATUSES:
        raise ValueError(f"a result has no {unknown or status}")
    metrics = finite(found.pop("metrics", {}))
    nonfinite = metrics.pop("nonfinite", [])
    return {
        **header,
        "status": status,
        **_NOTHING_FOUND,
        **found,
        "metrics": metrics,
        "nonfinite": nonfinite,
        "finished": time.time(),
    }


def open_study(directory: str | os.PathLike[str], study: Mapping[str, Any]) -> None:
    """Write ``study.json``, keeping the cells of earlier runs of the same study.

    Its keys: ``name``, ``norms`` (canonical names), ``labels`` (canonical name to label), ``tasks``, ``settings`` (the
    overrides, as given), ``seeds``, ``baseline`` (a label), ``threads``, ``varied`` (keys of the flat configuration
    that take several values within one task), ``cells`` (ids), ``keys`` (id to a hash of the cell without versions and
    sources), ``created``, ``updated`` and ``versions``. An earlier cell leaves ``cells`` when the study now holds the
    same one computed with another version or source: it is superseded, and would otherwise be counted twice.

    Raises:
        NormzooError: when the folder holds a study of another name.
    """
    path = Path(directory) / STUDY
    old = read_json(path) if path.exists() else None
    merged: dict[str, Any] = dict(study)
    if old is not None and isinstance(old.get("cells"), list):
        if old.get("name") != study["name"]:
            raise NormzooError(f"{directory} holds the study {old.get('name')!r}; run {study['name']!r} in another one")
        new_keys = set(study["keys"].values())
        keys = {cell: key for cell, key in old.get("keys", {}).items() if cell in study["keys"] or key not in new_keys}
        merged["keys"] = keys | study["keys"]
        merged["cells"] = list(merged["keys"])
        merged["labels"] = old.get("labels", {}) | study["labels"]
        for name in ("norms", "tasks", "settings", "seeds", "varied"):
            merged[name] = [*old.get(name, []), *(value for value in study[name] if value not in old.get(name, []))]
        merged["created"] = old.get("created", study["created"])
    write_json_atomic(path, merged)


@contextlib.contextmanager
def lock(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a study's folder for one runner; the system lets go when the holder dies, however it dies.

    Raises:
        NormzooError: when another runner holds it.
    """
    path = Path(directory) / LOCK
    with path.open("a+", encoding="utf-8") as file:
        try:
            _lock_file(file.fileno())
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another runner"
            raise NormzooError(
                f"{directory} is being run already, by {holder}: wait for it or stop it, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield


def _lock_file(handle: int) -> None:
    """Lock a file without waiting."""
    if sys.platform == "win32":
        import msvcrt

        # Far behind the text, which another runner must be able to read.
        os.lseek(handle, 1 << 20, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


# ---------------------------------------------------------------------------------------------------------- reading


def read_json(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The object in a JSON file; None with a `StoreWarning` when it is missing, torn or something else."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} cannot be read ({error}); skipped", StoreWarning, stacklevel=2)
        return None
    if not isinstance(value, dict):
        warnings.warn(f"{path} holds {type(value).__name__}, not an object; skipped", StoreWarning, stacklevel=2)
        return None
    return value


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a ``.jsonl`` file; torn or foreign lines are skipped with a `StoreWarning` that names the line."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            warnings.warn(f"{path}, line {number} is torn or foreign; skipped", StoreWarning, stacklevel=2)
    return rows


def load_study(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of ``study.json``; its keys are those of `open_study`.

    Raises:
        NormzooError: when there is none, or it cannot be read.
    """
    path = Path(directory) / STUDY
    if not path.is_file():
        raise NormzooError(
            f"{directory} is no study folder: it has no {STUDY}; give the folder that `normzoo run` named"
        )
    study = read_json(path)
    if study is None or not isinstance(study.get("cells"), list):
        raise NormzooError(f"{path} is torn; run the study again with the same command: finished cells are kept")
    return study


def load_config(directory: str | os.PathLike[str], cell_id: str) -> dict[str, Any] | None:
    """The header of a cell that was started, with the keys of `HEADER`; None when there is none."""
    path = cell_dir(directory, cell_id) / CONFIG
    return read_json(path) if path.exists() else None


def load_metrics(directory: str | os.PathLike[str], cell_id: str) -> list[dict[str, Any]]:
    """The curve of a cell, one row a logged step, in the order of writing."""
    return read_lines(cell_dir(directory, cell_id) / METRICS)


def load_result(directory: str | os.PathLike[str], cell_id: str) -> dict[str, Any] | None:
    """The row of a finished cell (done, diverged or failed); None when it has not finished."""
    path = cell_dir(directory, cell_id) / RESULT
    if not path.exists():
        return None
    row = read_json(path)
    if row is None:
        return None
    if not row.keys() >= _RESULT_KEYS or row["id"] != cell_id or row["status"] not in STATUSES:
        warnings.warn(f"{path} is not the result of this cell; skipped", StoreWarning, stacklevel=2)
        return None
    return row


def is_done(directory: str | os.PathLike[str], cell_id: str) -> bool:
    """Whether the cell has a row: done, diverged and failed cells all have one."""
    return load_result(directory, cell_id) is not None


def load_results(directory: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of all finished cells of the study, in its order, with the labels it uses now.

    A row has the keys of `HEADER` and ``status`` (``done``, ``diverged`` or ``failed``), ``metrics`` (the last value of
    each; None for one that is not finite, and its name in ``nonfinite``), ``steps``, ``seconds`` (``total``, ``train``,
    ``setup``, ``start``: from the runner's call to the cell's first line), ``step_ms`` (median of a
    training step: CPU time where one thread of the CPU does it, else wall time), ``parameters``,
    ``norm_parameters``, ``peak_memory_mb``, ``versions``, ``host`` (``platform``, ``cpu``, ``threads``,
    ``accelerator``), ``notes`` (what a reader of the result should know of the training), ``warnings``, ``error``
    (None, or ``type``, ``message``, ``traceback``) and ``finished``. What could not be measured, because the cell
    failed first, is None.
    """
    study = load_study(directory)
    rows = []
    for cell_id in study["cells"]:
        row = load_result(directory, cell_id)
        if row is not None:
            rows.append(row | {"label": study.get("labels", {}).get(row["norm"], row["label"])})
    return rows


def overview(directory: str | os.PathLike[str]) -> dict[str, int]:
    """How many cells of a study are done, diverged, failed, and not finished.

    Returns:
        A count for each of ``done``, ``diverged``, ``failed`` and ``unfinished``; they add up to the study's cells.
    """
    study = load_study(directory)
    counts: dict[str, int] = {status: 0 for status in (*STATUSES, "unfinished")}
    for cell_id in study["cells"]:
        row = load_result(directory, cell_id)
        counts[row["status"] if row else "unfinished"] += 1
    return counts
