"""One training: a cell goes in, its curve and its row of results come out."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import logging
import math
import os
import platform
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.utilities.warnings import PossibleUserWarning
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.seed import isolate_rng

from normzoo import __version__, registry, tasks
from normzoo.layers.base import parameter_roles
from normzoo.ops import kernels
from normzoo.study import store
from normzoo.study.spec import NOWHERE, Cell

_SYNCHRONISE_EVERY = 16
"""On a device whose steps return before they are done, one in so many is waited for, to time it and see its loss."""


class _Diverged(Exception):
    """Ends a training whose loss is not finite any more."""


class JsonLines(Logger):
    """Lightning's metrics as lines of ``metrics.jsonl``; ``last`` holds the latest value of each."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.last: dict[str, float] = {}
        self.began = time.perf_counter()

    @property
    def name(self) -> str:
        """Lightning asks; nothing is named after it."""
        return "metrics"

    @property
    def version(self) -> int:
        """Lightning asks; there is one."""
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the configuration is in ``config.json``."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line."""
        values = {key: float(value) for key, value in metrics.items() if key != "epoch"}
        self.last |= values
        row = {
            "step": step,
            "epoch": int(metrics.get("epoch", 0)),
            "seconds": round(time.perf_counter() - self.began, 4),
        }
        store.append_line(self.path, row | values)


class Watch(pl.Callback):
    """Times the training steps, and stops a training whose loss is not finite."""

    def __init__(self, accelerator: str, threads: int) -> None:
        # what else the machine does disturbs the CPU time of one thread less than the clock on the wall
        one_thread = accelerator == "cpu" and threads == 1
        self._clock = time.process_time if one_thread else time.perf_counter
        self.steps: list[float] = []
        self._began = 0.0
        self._timed = True

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        if pl_module.device.type == "cuda":
            self._timed = trainer.global_step % _SYNCHRONISE_EVERY == 0
            if self._timed:
                torch.cuda.synchronize()
        self._began = self._clock()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock, and the training when its loss is not finite."""
        if not self._timed:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.steps.append(self._clock() - self._began)
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if loss is not None and not math.isfinite(loss := float(loss)):
            _log_last(trainer, {"train/loss": loss})
            raise _Diverged(f"the training loss is {loss} at step {trainer.global_step}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the training when a measure of it is not finite."""
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val/") and not math.isfinite(value):
                raise _Diverged(f"{name} is {float(value)} at step {trainer.global_step}")


def _log_last(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Write what ended the training, which came before its block of steps was due to be logged."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics | {"epoch": trainer.current_epoch}, step=trainer.global_step)


def run_cell(
    cell: Cell, directory: str | os.PathLike[str], attempt: int = 1, launched: float | None = None
) -> dict[str, Any]:
    """Train one cell in this process, write its files, and return its row.

    Whatever goes wrong inside the training is a row with the status ``failed`` and the traceback; a loss that is not
    finite is one with the status ``diverged``.

    Args:
        cell: what to train.
        directory: the study's folder.
        attempt: counts the times this cell was started, where earlier ones were killed.
        launched: when the runner started the process (seconds since 1970), to know what that cost.

    Raises:
        OSError: when the cell's files cannot be written.
    """
    start_seconds = None if launched is None else time.time() - launched
    header = cell.header(attempt)
    folder = store.prepare_cell(directory, header)
    clock = time.perf_counter()
    found: dict[str, Any] = {}
    logger = JsonLines(folder / store.METRICS)
    with _own_state(cell.threads), _recorded_warnings() as messages:
        try:
            for name in cell.imports:
                load(name)
            status = _train(cell, folder, logger, found)
        except Exception as error:
            status = "failed"
            text = "".join(traceback.format_exception(error))
            found["error"] = {"type": type(error).__name__, "message": str(error), "traceback": text}
            print(text, file=sys.stderr)
    found["seconds"] = {
        "total": time.perf_counter() - clock,
        "train": None,
        "setup": None,
        "start": start_seconds,
        **found.get("seconds", {}),
    }
    row = store.make_result(
        header,
        status,
        **found,
        metrics=logger.last,
        warnings=messages,
        versions=versions(),
        host=_host(cell),
        peak_memory_mb=_peak_memory_mb(cell),
    )
    store.write_json_atomic(folder / store.RESULT, row)
    return row


def load(name: str) -> None:
    """Run a file, or import a module, that defines or registers norms; once in a process."""
    if name.endswith(".py"):
        registry.load_file(name)
    elif name != NOWHERE:
        importlib.import_module(name)


def _train(cell: Cell, folder: Path, logger: JsonLines, found: dict[str, Any]) -> str:
    """Build, fit and test; what is learnt on the way goes into ``found``, so that it is kept when something raises."""
    began = time.perf_counter()
    pl.seed_everything(cell.seed, verbose=False)
    module, data = tasks.build(cell.task, cell.norm, cell.setting, cell.seed)
    found["notes"] = list(module.notes)
    roles = parameter_roles(module)
    found["parameters"] = sum(p.numel() for p in module.parameters())
    found["norm_parameters"] = sum(p.numel() for name, p in module.named_parameters() if name in roles)
    watch = Watch(cell.accelerator, cell.threads)
    trainer = pl.Trainer(
        **cell.setting.trainer_arguments(lean=True),
        accelerator=cell.accelerator,
        devices=1,
        logger=logger,
        callbacks=[watch],
        plugins=[LightningEnvironment()],
        default_root_dir=folder,
    )
    seconds = found["seconds"] = {"setup": time.perf_counter() - began}
    began = time.perf_counter()
    try:
        trainer.fit(module, datamodule=data)
        seconds["train"] = time.perf_counter() - began
        trainer.test(module, datamodule=data, verbose=False)
    except _Diverged as error:
        seconds.setdefault("train", time.perf_counter() - began)
        found["error"] = {"type": "Diverged", "message": str(error), "traceback": ""}
        return "diverged"
    finally:
        found["steps"] = trainer.global_step
        found["step_ms"] = statistics.median(watch.steps) * 1000 if watch.steps else None
    bad = [name for name, value in logger.last.items() if not math.isfinite(value)]
    if bad:
        found["error"] = {"type": "Diverged", "message": f"{', '.join(bad)} not finite at the end", "traceback": ""}
        return "diverged"
    return "done"


# ------------------------------------------------------------------------------------------- the state of the process


@contextlib.contextmanager
def _own_state(threads: int) -> Iterator[None]:
    """The cell's number of threads and random state; in a process that goes on, the former ones come back."""
    before = torch.get_num_threads()
    environment = {name: os.environ.get(name) for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")}
    torch.set_num_threads(threads)
    try:
        with isolate_rng(), _quiet_lightning():
            yield
    finally:
        torch.set_num_threads(before)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's advice and advertisements; its errors are exceptions."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _recorded_warnings() -> Iterator[list[str]]:
    """The warnings of the training as texts, each once; Lightning's advice on loaders and logging is left out."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        warnings.filterwarnings("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", module=r"(pytorch_lightning|lightning_fabric|lightning_utilities)\b")
        try:
            yield messages
        finally:
            messages.extend(dict.fromkeys(f"{w.category.__name__}: {w.message}" for w in caught))


# --------------------------------------------------------------------------------------------------- what it ran on


@functools.cache
def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    names = ("torch", "pytorch-lightning", "torchmetrics", "numpy", "einops")
    return {"normzoo": __version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in names
    }


@functools.cache
def processor() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _host(cell: Cell) -> dict[str, Any]:
    on_cuda = cell.accelerator == "cuda" and torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_cuda else cell.accelerator
    return {
        "platform": platform.platform(),
        "cpu": processor(),
        "threads": cell.threads,
        "accelerator": device,
        "kernels": kernels.status().state,  # with and without them results differ in the last bits
    }


def _peak_memory_mb(cell: Cell) -> float | None:
    """On CUDA what tensors took at most; elsewhere the most that the process held in memory, its libraries included."""
    if cell.accelerator == "cuda" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
