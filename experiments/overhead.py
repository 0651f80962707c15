"""What the framework adds: a training step against a bare PyTorch loop, a cell's start against importing Lightning.

Run it with `python experiments/overhead.py`. Everything is measured interleaved, in CPU seconds of one thread where
that is possible, and printed as ratios. With `--json` it is the steps alone, for `normzoo bench --suite`.
"""

import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.nn import functional as F

import normzoo as nz
from normzoo.ops import memory
from normzoo.study.cell import JsonLines, Watch
from normzoo.tasks import Setting, build, resolve
from normzoo.tasks.optim import configure

TASKS = (("digits/cnn", {"convs": (64, 112, 112)}), ("digits/cnn", {}))
"""A step of about 10 ms, and one of half as much."""


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
    """Seconds of a step of the task in a Lightning Trainer, as a cell of a study runs and logs it."""
    module, data = build(task, "batch_norm", setting)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        logger = JsonLines(Path(folder) / "metrics.jsonl")
        arguments = setting.trainer_arguments(lean=True) | {"logger": logger, "callbacks": [clock, Watch("cpu", 1)]}
        pl.Trainer(**arguments, accelerator="cpu", limit_val_batches=0).fit(module, data)
    return clock.seconds / (setting.epochs * len(data.train_dataloader()))


def step_overhead(rounds: int = 15) -> Iterator[dict[str, Any]]:
    """The cost of a step, ours and the bare loop's: medians in seconds, and the median of the rounds' ratios."""
    torch.set_num_threads(1)
    memory.start()
    for task, overrides in TASKS:
        setting = resolve(task, overrides | {"epochs": 2})
        pairs = []
        for number in range(rounds + 1):  # whoever is first alternates; the first round warms up
            one, own = (bare(task, setting), 0.0) if number % 2 else (0.0, task_step(task, setting))
            pairs.append((one or bare(task, setting), own or task_step(task, setting)))
        pairs = pairs[1:]
        plain, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
        name = f"{task} {', '.join(f'{key}={value}' for key, value in overrides.items())}".strip()
        yield {"task": name, "bare": plain, "ours": ours, "ratio": statistics.median(own / one for one, own in pairs)}


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
    for _name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(_name).setLevel(logging.ERROR)
    if "--json" in sys.argv[1:]:
        print(json.dumps(list(step_overhead())))
    else:
        for step in step_overhead():
            print(
                f"training step of {step['task']}: bare {step['bare'] * 1e3:.2f} ms, task {step['ours'] * 1e3:.2f} ms, "
                f"ratio {step['ratio']:.2f}"
            )
        cell_start()
