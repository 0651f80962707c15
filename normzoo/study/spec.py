"""A study is data: what is compared, on which tasks, under which settings, with which seeds; it expands to cells."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from normzoo import __version__, registry, tasks
from normzoo.errors import NormzooError, did_you_mean
from normzoo.tasks import Setting

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ACCELERATORS = ("auto", "cpu", "cuda", "mps")

NOWHERE = "__main__"
"""Stands among a cell's imports for an interactive session, whose norms no other process can find."""

NormLike = str | Callable[..., Any]


def grid(**choices: Any) -> list[dict[str, Any]]:
    """Every combination of the given choices, the last one varying fastest; a single value is a choice of one.

    Raises:
        NormzooError: when a list of choices is empty.

    Example:
        >>> grid(batch_size=[8, 64], lr=[0.01], optimizer="sgd")
        [{'batch_size': 8, 'lr': 0.01, 'optimizer': 'sgd'}, {'batch_size': 64, 'lr': 0.01, 'optimizer': 'sgd'}]
    """
    lists = {name: _choices(name, value) for name, value in choices.items()}
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _choices(name: str, value: Any) -> list[Any]:
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        return [value]
    values = list(value)
    if not values:
        raise NormzooError(f"grid({name}=[]) has no choice; give at least one value, or leave {name} out")
    return values


@dataclass(frozen=True)
class Study:
    """What is compared. It expands to one cell for each task, setting, norm and seed.

    Args:
        name: letters, digits, ``.``, ``_`` and ``-``; also the name of the result folder.
        norms: anything `normzoo.create` takes, or a mapping from labels of your own to such things.
        tasks: names of tasks, ``"digits/cnn"``.
        settings: overrides of the tasks' default settings, usually from `grid`.
        seeds: whole numbers, ``range(5)``.
        baseline: the label that all others are compared with; left out, batch norm where it is, or the first norm.
        threads: how many threads one training uses; results agree only at equal counts.
        accelerator: ``"cpu"``, ``"cuda"``, ``"mps"``, or ``"auto"``: CUDA when there is one, the CPU when not.
        imports: Python files that a training must run first, because they register norms.

    Attributes:
        labels: the canonical name of each norm, by its label.

    Raises:
        NormzooError: for an unknown norm, task or setting, for anything empty, given twice or out of range.

    Example:
        >>> study = Study("tiny", norms=["batch_norm", "rms_norm"], tasks=["digits/cnn"], seeds=range(2))
        >>> [cell.label for cell in study.cells()][:2]
        ['digits/cnn batch_norm seed 0', 'digits/cnn rms_norm seed 0']
    """

    name: str
    norms: Sequence[NormLike] | Mapping[str, NormLike]
    tasks: Sequence[str]
    settings: Sequence[Mapping[str, Any]] = field(default_factory=lambda: ({},))
    seeds: Iterable[int] = range(3)
    baseline: str | None = None
    threads: int = 1
    accelerator: str = "auto"
    imports: Sequence[str | Path] = ()
    labels: Mapping[str, str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise NormzooError(
                f"a study's name is a folder's name: letters, digits, '.', '_' and '-', at most 100, not {self.name!r}"
            )
        self._set(tasks=_tasks(self.tasks), imports=tuple(str(Path(path).resolve()) for path in self.imports))
        self._set(seeds=_seeds(self.seeds), settings=_settings(self.settings), labels=_labels(self.norms))
        self._set(baseline=self._find_baseline())
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 1:
            raise NormzooError(f"threads must be a whole number from 1 on, not {self.threads!r}")
        if self.accelerator not in _ACCELERATORS:
            hint = did_you_mean(str(self.accelerator), _ACCELERATORS)
            raise NormzooError(f"accelerator must be one of {', '.join(_ACCELERATORS)}, not {self.accelerator!r}{hint}")
        self._resolved  # noqa: B018  an unknown task or setting is answered here, not when the study runs

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _find_baseline(self) -> str:
        if self.baseline is None:
            known = [label for label, norm in self.labels.items() if norm == "batch_norm"]
            return known[0] if known else next(iter(self.labels))
        if self.baseline in self.labels:
            return self.baseline
        wanted = _canonical(self.baseline)
        for label, norm in self.labels.items():
            if norm == wanted:
                return label
        raise NormzooError(
            f"the baseline {self.baseline!r} is not among the norms ({', '.join(self.labels)}); add it, or choose one "
            f"of them{did_you_mean(self.baseline, self.labels)}"
        )

    @cached_property
    def _resolved(self) -> list[tuple[str, Setting]]:
        """Every task with every setting."""
        pairs: list[tuple[str, Setting]] = []
        for task in self.tasks:
            for overrides in self.settings:
                pair = (task, tasks.resolve(task, overrides))
                if pair in pairs:
                    raise NormzooError(f"two settings are the same for {task}: {overrides!r}; remove one of them")
                pairs.append(pair)
        return pairs

    def cells(self) -> list[Cell]:
        """Everything to be trained, the norms varying fastest.

        Raises:
            NormzooError: when two of them are the same training.
        """
        accelerator = _find_accelerator() if self.accelerator == "auto" else self.accelerator
        hashes = {norm: registry.source_hash(norm) for norm in self.labels.values()}
        homes = {norm: _home(norm) for norm in self.labels.values()}
        cells = [
            Cell(
                study=self.name,
                label_of_norm=label,
                norm=norm,
                task=task,
                setting=setting,
                seed=seed,
                threads=self.threads,
                accelerator=accelerator,
                imports=tuple(dict.fromkeys((*map(str, self.imports), *homes[norm]))),
                source_hash=hashes[norm],
            )
            for task, setting in self._resolved
            for seed in self.seeds  # so that what is compared is trained under the same conditions of the machine
            for label, norm in self.labels.items()
        ]
        seen: dict[str, Cell] = {}
        for cell in cells:
            if cell.id in seen:
                raise NormzooError(f"{seen[cell.id].label} and {cell.label} are the same training; remove one of them")
            seen[cell.id] = cell
        return cells

    def record(self, cells: Sequence[Cell]) -> dict[str, Any]:
        """The study as data, for ``study.json``: see `normzoo.study.store.open_study`."""
        now = time.time()
        return {
            "name": self.name,
            "norms": list(self.labels.values()),
            "labels": {norm: label for label, norm in self.labels.items()},
            "tasks": list(self.tasks),
            "settings": [dict(overrides) for overrides in self.settings],
            "seeds": list(self.seeds),
            "baseline": self.baseline,
            "threads": self.threads,
            "varied": _varied(cells),
            "cells": [cell.id for cell in cells],
            "keys": {cell.id: cell.key for cell in cells},
            "created": now,
            "updated": now,
            "versions": {"normzoo": __version__, "torch": importlib.metadata.version("torch")},
        }


@dataclass(frozen=True)
class Outlook:
    """What can be known of cells before any is trained; each reason once.

    Attributes:
        refused: why tasks refuse norms, whose results would mean nothing.
        unbuildable: which models cannot be built, and why.
        failing: how many cells will fail for that.
    """

    refused: tuple[str, ...]
    unbuildable: tuple[str, ...]
    failing: int

    def check(self) -> None:
        """Refuse to go on where a task refuses a norm.

        Raises:
            NormzooError: with all reasons.
        """
        if self.refused:
            raise NormzooError("\n".join(["this study cannot be run:", *(f"- {reason}" for reason in self.refused)]))

    def __str__(self) -> str:
        if not self.failing:
            return ""
        count = "1 cell" if self.failing == 1 else f"{self.failing} cells"
        return "\n".join([f"{count} will fail, as the model cannot be built:", *(f"- {r}" for r in self.unbuildable)])


def foresee(cells: Sequence[Cell]) -> Outlook:
    """Build the model of every combination of task, norm and options once, and see what tasks say of it."""
    refused: dict[str, None] = {}
    unbuildable: dict[str, None] = {}
    failing = 0
    combinations: dict[str, list[Cell]] = {}
    for cell in cells:
        options = {"model": cell.setting.model, "data": cell.setting.data}
        combinations.setdefault(json.dumps([cell.task, cell.norm, options], sort_keys=True), []).append(cell)
    for same in combinations.values():
        try:
            tasks.check_compatible(same[0].task, same[0].norm, same[0].setting)
        except tasks.Unbuildable as error:
            unbuildable[str(error)] = None
            failing += len(same)
        except NormzooError as error:
            refused[str(error)] = None
    return Outlook(tuple(refused), tuple(unbuildable), failing)


def _varied(cells: Sequence[Cell]) -> list[str]:
    """The keys of the flat configuration, other than what names a cell, that take several values within one task."""
    values: dict[tuple[str, str], set[str]] = {}
    for cell in cells:
        for key, value in cell.config.items():
            if key not in ("study", "norm", "label", "task", "seed", "source_hash"):
                values.setdefault((cell.task, key), set()).add(json.dumps(value))
    return list(dict.fromkeys(key for (_, key), found in values.items() if len(found) > 1))


@dataclass(frozen=True)
class Cell:
    """One training. Its id is a hash of everything that decides its result, and of nothing else.

    Args:
        study: the study's name.
        label_of_norm: the norm's label in the study.
        norm: the canonical name of the norm.
        task: the task's name.
        setting: every training choice.
        seed: of the initial weights, the order of the data and dropout.
        threads: of the training process.
        accelerator: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        imports: Python files, or names of modules, to run first; what they say counts through ``source_hash``.
        source_hash: of the file that defines the norm; None for normzoo's own.
    """

    study: str
    label_of_norm: str
    norm: str
    task: str
    setting: Setting
    seed: int
    threads: int = 1
    accelerator: str = "cpu"
    imports: tuple[str, ...] = ()
    source_hash: str | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The whole configuration as one flat mapping for JSON; options of model and data are ``"model.depth"``."""
        own = {
            "study": self.study,
            "norm": self.norm,
            "label": self.label_of_norm,
            "task": self.task,
            "seed": self.seed,
            "threads": self.threads,
            "accelerator": self.accelerator,
            "source_hash": self.source_hash,
            "normzoo": __version__,
            "torch": importlib.metadata.version("torch"),
        }
        return own | flatten(dataclasses.asdict(self.setting))

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits; the same in any process, on any machine, in any study."""
        return _digest(self._deciding())

    @cached_property
    def key(self) -> str:
        """As `id`, but the same for other versions and sources: of two cells with one key, the later counts."""
        return _digest(self._deciding("source_hash", "normzoo", "torch", "accelerator"))

    @cached_property
    def group(self) -> str:
        """The cell without its seed, for people and for Weights & Biases: ``"digits/cnn batch_norm 0a1b2c3d"``."""
        return f"{self.task} {_portable(self.norm)[:80]} {_digest(self._deciding('seed'))[:8]}"

    @property
    def label(self) -> str:
        """A line for people: task, norm, seed."""
        return f"{self.task} {self.label_of_norm} seed {self.seed}"

    def header(self, attempt: int = 1) -> dict[str, Any]:
        """What is known before the training: the contents of ``config.json``."""
        metric, mode = tasks.primary_metric(self.task)
        return {
            "id": self.id,
            "study": self.study,
            "norm": self.norm,
            "label": self.label_of_norm,
            "task": self.task,
            "seed": self.seed,
            "group": self.group,
            "metric": metric,
            "mode": mode,
            "config": self.config,
            "attempt": attempt,
            "started": time.time(),
        }

    def _deciding(self, *without: str) -> dict[str, Any]:
        config = {k: v for k, v in self.config.items() if k not in ("study", "label", *without)}
        return config | {"norm": _portable(self.norm)}


def _portable(norm: str) -> str:
    """The name of a norm without the folder of its file, whose content the source hash answers for."""
    path, colon, rest = norm.rpartition(".py:")
    name = re.split(r"[/\\]", path)[-1]
    return f"{name}{colon}{rest}"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, their keys joined by dots.

    >>> flatten({"lr": 0.1, "model": {"depth": 2}})
    {'lr': 0.1, 'model.depth': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _digest(config: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        bad = [key for key, value in config.items() if not _is_json(value)]
        raise NormzooError(
            f"a setting must be numbers, texts, True, False, None and lists of them; look at {', '.join(bad)}"
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _canonical(norm: NormLike) -> str:
    return registry.canonical(norm)


def _tasks(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise NormzooError(f"tasks must be a list of names, not one text; write [{names!r}]")
    found = tuple(tasks.find_task(name).name for name in names)
    if not found:
        raise NormzooError(
            f"a study needs at least one task, and there is none; known: {', '.join(tasks.list_tasks())}"
        )
    _no_duplicates("tasks", found)
    return found


def _seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    if not isinstance(seeds, Iterable) or isinstance(seeds, str):
        raise NormzooError(f"seeds must be whole numbers, not {seeds!r}; for {seeds!r} seeds write range({seeds!r})")
    seeds = tuple(seeds)
    if not seeds:
        raise NormzooError("a study needs at least one seed, and there is none; write seeds=range(3)")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise NormzooError(f"a seed is a whole number from 0 to 2**32 - 1, not {seed!r}")
    _no_duplicates("seeds", seeds)
    return seeds


def _settings(settings: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    if isinstance(settings, Mapping):
        return (dict(settings),)
    if isinstance(settings, str) or not isinstance(settings, Iterable):
        raise NormzooError(f"settings must be a list of mappings such as grid(lr=[0.1, 0.2]), not {settings!r}")
    settings = tuple(settings)
    if not settings:
        raise NormzooError("settings is empty; leave it out for the tasks' own settings")
    for overrides in settings:
        if not isinstance(overrides, Mapping):
            raise NormzooError(f"one of the settings must be a mapping such as {{'lr': 0.1}}, not {overrides!r}")
    return tuple(dict(overrides) for overrides in settings)


def _labels(norms: Sequence[NormLike] | Mapping[str, NormLike]) -> dict[str, str]:
    """Label to canonical name, each of them once."""
    if isinstance(norms, str) or not isinstance(norms, Iterable):
        raise NormzooError(f"norms must be a list or a mapping, not {norms!r}; write [{norms!r}]")
    if isinstance(norms, Mapping):
        pairs = [(str(label), _canonical(norm)) for label, norm in norms.items()]
    else:
        pairs = [(registry.label(norm), _canonical(norm)) for norm in norms]
    if not pairs:
        raise NormzooError("a study needs at least one norm, and there is none")
    _no_duplicates("norms", [norm for _, norm in pairs])
    labels = [label for label, _ in pairs]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise NormzooError(f"two norms have the label {twice[0]!r}; name them yourself: norms={{'label': norm, ...}}")
    return dict(pairs)


def _no_duplicates(what: str, values: Sequence[Any]) -> None:
    twice = [value for index, value in enumerate(values) if value in values[:index]]
    if twice:
        raise NormzooError(f"{twice[0]!r} is given twice in {what}; remove one of them")


def _home(norm: str) -> tuple[str, ...]:
    """Where another process finds a norm known by its registered name alone: a file, or the name of a module."""
    found, _ = registry.resolve(norm)
    while isinstance(found, functools.partial):
        found = found.func
    home = inspect.getmodule(found)
    if ":" in norm or home is None or home.__name__.split(".")[0] == "normzoo":
        return ()
    if home.__name__ == "__main__" or not home.__package__:
        # A notebook's norm has no file: the runner answers for that, since it matters only to other processes.
        file = getattr(home, "__file__", None)
        return (str(Path(file).resolve()),) if file else (NOWHERE,)
    return (home.__name__,)


def _find_accelerator() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_study_file(path: str | Path) -> Study:
    """The one study that a Python file defines at its top level; its trainings will run the file first.

    Raises:
        NormzooError: when there is no such file, when it raises, when it defines no study or several.
    """
    file = Path(path).expanduser()
    if not file.is_file() or file.suffix != ".py":
        raise NormzooError(f"{path} is no study file; expected a Python file that says `study = nz.Study(...)`")
    module = registry.load_file(file)
    studies = {name: value for name, value in vars(module).items() if isinstance(value, Study)}
    if not studies:
        raise NormzooError(f"{path} defines no study; expected `study = nz.Study(...)` at its top level")
    if len({id(study) for study in studies.values()}) > 1:
        raise NormzooError(f"{path} defines several studies ({', '.join(studies)}); a file holds one: split it")
    study = next(iter(studies.values()))
    return dataclasses.replace(study, imports=tuple(dict.fromkeys((str(file.resolve()), *map(str, study.imports)))))
