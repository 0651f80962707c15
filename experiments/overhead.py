"""What the framework adds: a training step against a bare PyTorch loop, a cell's start against importing Lightning.

Run it with `python experiments/overhead.py`. Everything is measured interleaved, in CPU seconds of one thread where
that is possible, and printed as ratios.
"""

import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch.nn import functional as F

import normzoo as nz
from normzoo.tasks import Setting, build, resolve
from normzoo.tasks.optim import configure


class Clock(pl.Callback):
    """CPU seconds from the first training batch to the last."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.began = time.process_time()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = time.process_time() - self.began


def bare(task: str, setting: Setting) -> float:
    """Seconds of a step of the loop that everybody writes, over the same tensors, model and optimizer."""
    module, data = build(task, "batch_norm", setting)
    model, loader = module.model, data.train_dataloader()
    steps = setting.epochs * len(loader)
    optimizer, schedule = configure(model, setting, steps=steps)
    assert schedule is not None
    began = time.process_time()
    for _ in range(setting.epochs):
        for batch in loader:
            loss = F.cross_entropy(model(batch["x"]), batch["y"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return (time.process_time() - began) / steps


def task_step(task: str, setting: Setting) -> float:
    """Seconds of a step of the task in a Lightning Trainer, logging included."""
    module, data = build(task, "batch_norm", setting)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        logger = CSVLogger(folder)
        arguments = setting.trainer_arguments(lean=True) | {"logger": logger, "callbacks": [clock]}
        pl.Trainer(**arguments, limit_val_batches=0).fit(module, data)
    return clock.seconds / (setting.epochs * len(data.train_dataloader()))


def step_overhead(rounds: int = 7) -> None:
    """Print the cost of a step, ours over the bare loop's."""
    torch.set_num_threads(1)
    for task, overrides in (("digits/cnn", {"convs": (48, 96, 96)}), ("digits/cnn", {})):
        setting = resolve(task, overrides | {"epochs": 2})
        pairs = [(bare(task, setting), task_step(task, setting)) for _ in range(rounds + 1)][1:]
        plain, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
        best = min(own for _, own in pairs) / min(one for one, _ in pairs)
        print(
            f"training step of {task} {overrides or ''}: bare {plain * 1e3:.2f} ms, task {ours * 1e3:.2f} ms, "
            f"ratio of medians {ours / plain:.2f}, of minima {best:.2f}"
        )


def cell_start(cells: int = 20) -> None:
    """Print the time from the runner's call to a cell's first line, against importing Lightning in a new process."""
    study = nz.Study("start", norms=["batch_norm"], tasks=["digits/mlp"], settings=[{"epochs": 1}], seeds=range(cells))
    imports = []
    for _ in range(3):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import pytorch_lightning"], check=True, capture_output=True)
        imports.append(time.perf_counter() - began)
    with tempfile.TemporaryDirectory() as folder:
        summary = nz.run_study(study, folder, workers=1, track=False, progress=False)
        from normzoo.study import load_results

        starts = [row["seconds"]["start"] for row in load_results(summary.directory)]
    start, lightning = statistics.median(starts), min(imports)
    print(
        f"start of a cell: {start:.3f} s (median of {len(starts)}, longest {max(starts):.3f}); importing Lightning: "
        f"{lightning:.2f} s; ratio {start / lightning:.3f}"
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    step_overhead()
    cell_start()
