from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from rich.console import Console
from scipy import stats

from normzoo.errors import NormzooError
from normzoo.report import load_frame, make_report, print_table
from normzoo.report.comparison import compare, compare_settings
from normzoo.report.figures import _scale, _spread, _transform
from normzoo.report.frame import load
from normzoo.report.statistics import (
    Seed,
    bootstrap_ceiling,
    bootstrap_interval,
    paired_difference,
    smallest_p,
    t_interval,
)
from normzoo.report.table import print_comparison
from normzoo.report.text import Numbers, code, escape, fenced, safe_cell
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
        curve: Sequence[float | None] | None = None,
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
            result = store.make_result(
                header,
                status,
                metrics=metrics if metrics is not None else found,
                steps=100,
                seconds={"total": 4.0, "train": 3.0, "setup": 1.0, "start": 0.1},
                step_ms=10.0,
                parameters=12345,
                norm_parameters=128,
                peak_memory_mb=512.0,
                versions={"normzoo": "0.1.0", "torch": "2.13.0"},
                host={"platform": "Linux", "cpu": "a processor", "threads": 1, "accelerator": "cpu"},
                error=error,
            )
            store.write_json_atomic(folder / store.RESULT, result | {"finished": 104.0} | row)
        return cell_id

    def write(self) -> Path:
        store.open_study(self.path, self.study)
        return self.path


def three_norms(root: Path, name: str = "synthetic") -> Path:
    """Two tasks, one larger and one smaller is better, three seeds, a norm better, a norm worse."""
    folder = Folder(root, name)
    for seed, base in enumerate((0.90, 0.92, 0.91)):
        accuracy = {
            "batch_norm": base,
            "layer_norm": base + 0.03 + 0.001 * seed,
            "rms_norm": base - 0.02 - 0.001 * seed,
        }
        for norm, value in accuracy.items():
            curve = [0.3, 0.6, 0.8, 0.85, 0.88, value]
            folder.cell(norm, seed, value, curve=curve)
            error = 0.1 - value / 20
            folder.cell(norm, seed, error, task="adding/lstm", metric="mse", mode="min", curve=[0.2, 0.1, error])
    return folder.write()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of `three_norms`, to be read only."""
    return make_report(three_norms(tmp_path_factory.mktemp("report")))


def difference(norm: dict[int, float], baseline: dict[int, float], mode: Any = "max") -> Any:
    as_seeds = [{seed: Seed("ok", value) for seed, value in runs.items()} for runs in (norm, baseline)]
    return paired_difference(as_seeds[0], as_seeds[1], mode, rng=np.random.default_rng(0))


def printed(directory: Path, width: int = 160, **options: Any) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), **options)  # noqa: SIM115
    print_comparison(directory, console)
    console.file.close()
    return console.export_text()


# ---------------------------------------------------------------------------------------------------------- statistics


def test_t_interval_is_scipys() -> None:
    d = np.array([0.3, -0.1, 0.25, 0.07])
    expected = stats.ttest_1samp(d, 0).confidence_interval(0.95)
    interval = t_interval(d)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_t_interval_of_three_has_its_closed_form() -> None:
    interval = t_interval([1.0, 2.0, 3.0])
    assert interval is not None
    assert interval.high - 2.0 == pytest.approx(4.302652729911275 / math.sqrt(3), rel=1e-9)
    assert 2.0 - interval.low == pytest.approx(interval.high - 2.0, rel=1e-9)


@pytest.mark.parametrize("n", [3, 5, 12])
def test_bootstrap_interval_is_scipys(n: int) -> None:
    d = np.random.default_rng(n).normal(0.1, 1.0, n)
    ours = bootstrap_interval(d, rng=np.random.default_rng(0), resamples=20000)
    theirs = stats.bootstrap((d,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(1))
    assert ours is not None
    assert (ours.low, ours.high) == pytest.approx(theirs.confidence_interval, abs=0.05 * d.std())


def test_bootstrap_interval_comes_from_its_generator_alone() -> None:
    d = np.random.default_rng(3).normal(size=12)
    np.random.seed(1)  # noqa: NPY002  the global generator must not matter
    first = bootstrap_interval(d, rng=np.random.default_rng(7), resamples=200)
    np.random.seed(2)  # noqa: NPY002
    assert bootstrap_interval(d, rng=np.random.default_rng(7), resamples=200) == first
    assert bootstrap_interval(d, rng=np.random.default_rng(8), resamples=200) != first


def test_coverage_with_three_seeds_is_what_the_report_says() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(1500, 3))
    hits = {"t": 0, "bootstrap": 0}
    for d in samples:
        for name, interval in (("t", t_interval(d)), ("bootstrap", bootstrap_interval(d, rng=rng, resamples=300))):
            assert interval is not None
            hits[name] += interval.low <= 0 <= interval.high
    assert hits["t"] / 1500 == pytest.approx(0.95, abs=0.02)
    assert hits["bootstrap"] / 1500 <= bootstrap_ceiling(3) + 0.03


def test_smallest_p_is_that_of_scipys_permutation_test() -> None:
    d = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    found = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=1000)
    assert smallest_p(5) == pytest.approx(found.pvalue)


def test_difference_is_paired_by_seed_not_by_position() -> None:
    d = difference({2: 0.5, 0: 0.9, 1: 0.7}, {0: 0.8, 1: 0.6, 2: 0.45, 9: 0.1})
    assert d.seeds == pytest.approx({0: 0.1, 1: 0.1, 2: 0.05})
    assert (d.n, d.pairs) == (3, 3)
    assert d.mean == pytest.approx(0.25 / 3)


def test_a_common_effect_of_the_seed_cancels() -> None:
    seeds = {s: 10.0 * s for s in range(5)}
    d = difference({s: v + 1 + 0.01 * (s % 2) for s, v in seeds.items()}, seeds)
    assert d.verdict == "better"
    assert d.sd < 0.01


@pytest.mark.parametrize(("mode", "expected"), [("max", (3, 0, "better")), ("min", (0, 3, "worse"))])
def test_direction_of_the_metric(mode: str, expected: tuple[int, int, str]) -> None:
    d = difference({0: 1.1, 1: 1.2, 2: 1.15}, {0: 1.0, 1: 1.1, 2: 1.06}, mode)
    assert (d.won, d.lost, d.verdict) == expected
    assert d.mean > 0


def test_one_seed_has_no_interval_and_decides_nothing() -> None:
    d = difference({0: 0.9}, {0: 0.1})
    assert (d.t, d.bootstrap, d.better, d.verdict) == (None, None, 0, "one seed")
    assert d.mean == pytest.approx(0.8)


def test_equal_differences_are_not_certainty() -> None:
    d = difference({0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4, 1: 0.6, 2: 0.8})
    assert d.verdict == "undecided"
    same = difference({0: 0.5, 1: 0.7}, {0: 0.5, 1: 0.7})
    assert (same.verdict, same.tied) == ("identical", 2)


def test_divergence_is_lost_and_failure_is_neither() -> None:
    norm = {0: Seed("ok", 0.9), 1: Seed("diverged"), 2: Seed("failed"), 3: Seed("diverged"), 4: Seed("ok", 0.5)}
    base = {0: Seed("ok", 0.8), 1: Seed("ok", 0.1), 2: Seed("ok", 0.1), 3: Seed("diverged"), 4: Seed("diverged")}
    d = paired_difference(norm, base, "max", rng=np.random.default_rng(0))
    assert (d.n, d.pairs) == (1, 5)
    assert (d.won, d.lost, d.tied) == (2, 1, 1)


def test_survivors_do_not_make_a_norm_better() -> None:
    ok = {s: Seed("ok", 0.9 + 0.001 * s) for s in range(4)}
    less = {s: Seed("ok", 0.5) for s in range(4)}
    rng = np.random.default_rng(0)
    assert paired_difference(ok, less, "max", rng=rng).verdict == "better"
    assert (
        paired_difference(ok | {4: Seed("diverged")}, less | {4: Seed("ok", 0.5)}, "max", rng=rng).verdict
        == "undecided"
    )
    assert paired_difference(less, ok, "max", rng=rng).verdict == "worse"
    assert (
        paired_difference(less | {4: Seed("ok", 0.5)}, ok | {4: Seed("diverged")}, "max", rng=rng).verdict
        == "undecided"
    )
    assert paired_difference(less | {4: Seed("diverged")}, ok | {4: Seed("ok", 0.9)}, "max", rng=rng).verdict == "worse"


def test_a_value_that_is_not_finite_cannot_enter_a_mean() -> None:
    with pytest.raises(ValueError, match="finite"):
        t_interval([1.0, math.nan])


# ---------------------------------------------------------------------------------------------------------- comparison


def test_rows_hold_the_known_numbers(tmp_path: Path) -> None:
    cnn, lstm = compare(load(three_norms(tmp_path)))
    assert [row.label for row in cnn.rows] == ["layer_norm", "batch_norm", "rms_norm"]
    assert [row.label for row in lstm.rows] == ["layer_norm", "batch_norm", "rms_norm"]
    best, base, worst = cnn.rows
    assert (base.baseline, base.difference) == (True, None)
    assert base.mean == pytest.approx(0.91)
    assert base.sd == pytest.approx(0.01)
    assert best.difference is not None
    assert best.difference.mean == pytest.approx(0.031)
    expected = stats.t.interval(0.95, 2, 0.031, 0.001 / math.sqrt(3))
    assert best.difference.t is not None
    assert (best.difference.t.low, best.difference.t.high) == pytest.approx(expected)
    assert worst.difference is not None
    assert (best.difference.verdict, worst.difference.verdict) == ("better", "worse")
    smaller = lstm.rows[0].difference
    assert smaller is not None
    assert (smaller.verdict, smaller.mean < 0, smaller.won) == ("better", True, 3)


def test_outcomes_are_counted_and_shown(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for seed in range(3):
        folder.cell("batch_norm", seed, 0.8 + 0.01 * seed)
        folder.cell("none", seed, 0.99 if seed == 0 else None, status="done" if seed == 0 else "diverged")
        error = {"type": "RuntimeError", "message": "first line\nout of memory", "traceback": "Traceback …"}
        folder.cell("broken", seed, None, status="failed", error=error, metrics={})
        folder.cell("nan_norm", seed, float("nan") if seed == 2 else 0.81)
    directory = folder.write()
    (comparison,) = compare(load(directory))
    rows = {row.label: row for row in comparison.rows}
    assert [row.label for row in comparison.rows] == ["batch_norm", "none", "nan_norm", "broken"]
    assert rows["none"].troubles == "2 diverged"
    assert rows["nan_norm"].troubles == "1 diverged"
    assert rows["broken"].troubles == "3 failed"
    assert rows["none"].difference is not None
    assert (rows["none"].difference.n, rows["none"].difference.won, rows["none"].difference.lost) == (1, 1, 2)
    page = make_report(directory).read_text(encoding="utf-8")
    assert "3 of 12 runs diverged, 3 failed." in page
    assert "RuntimeError: out of memory" in page
    assert "1/3, 2 diverged" in page
    assert "1/3, 2 diverged" in printed(directory)
    frame = load_frame(directory)
    assert frame["outcome"].value_counts().to_dict() == {"ok": 6, "diverged": 3, "failed": 3}
    assert len(frame) == 12


def test_settings_are_chosen_on_validation_alone(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for seed in range(3):
        folder.cell("batch_norm", seed, 0.80, validation=0.80, setting={"lr": 0.1})
        folder.cell("batch_norm", seed, 0.99, validation=0.70, setting={"lr": 0.2})  # the trap: better on the test part
        folder.cell("rms_norm", seed, 0.99, validation=0.60, setting={"lr": 0.1})  # and again
        folder.cell("rms_norm", seed, 0.75 + seed / 100, validation=0.61, setting={"lr": 0.2})
    directory = folder.write()
    (comparison,) = compare(load(directory))
    rows = {row.label: row for row in comparison.rows}
    assert rows["batch_norm"].setting == "lr=0.1"
    assert rows["rms_norm"].setting == "lr=0.2"
    assert rows["rms_norm"].difference is not None
    assert rows["rms_norm"].difference.mean == pytest.approx(-0.04)
    by_setting = [{row.label: row for row in c.rows} for c in compare_settings(load(directory), "digits/cnn")]
    matched = [rows["rms_norm"].difference.mean for rows in by_setting if rows["rms_norm"].difference]
    assert matched == pytest.approx([0.19, -0.23])
    page = make_report(directory).read_text(encoding="utf-8")
    assert "## Every setting" in page
    assert page.count("✓") == 3  # one for each norm, and the sentence that explains it


def test_the_choice_does_not_depend_on_any_test_value(tmp_path: Path) -> None:
    chosen = []
    for attempt in range(4):
        folder = Folder(tmp_path, f"attempt{attempt}")
        rng = np.random.default_rng(attempt)
        for seed in range(2):
            for i, norm in enumerate(("batch_norm", "a", "b")):
                for lr in (0.1, 0.2, 0.3):
                    test = None if rng.random() < 0.3 else float(rng.random())
                    folder.cell(norm, seed, test, validation=(lr * (i + 1) * 7) % 1, setting={"lr": lr})
        (comparison,) = compare(load(folder.write()))
        chosen.append({row.label: row.setting for row in comparison.rows})
    assert all(choice == chosen[0] for choice in chosen)
    assert len(set(chosen[0].values())) > 1


def test_a_setting_that_diverges_is_chosen_last(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for seed in range(2):
        folder.cell("batch_norm", seed, 0.5, setting={"lr": 0.1})
        folder.cell("batch_norm", seed, 0.9, setting={"lr": 1.0}, status="diverged" if seed else "done")
    (comparison,) = compare(load(folder.write()))
    assert comparison.rows[0].setting == "lr=0.1"


def test_validation_chooses_the_smaller_of_a_metric_to_be_minimised(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for value, lr in ((0.5, 0.1), (0.2, 0.2), (0.3, 0.3)):
        folder.cell("batch_norm", 0, value, setting={"lr": lr}, metric="mse", mode="min")
    (comparison,) = compare(load(folder.write()))
    assert comparison.rows[0].setting == "lr=0.2"


def test_one_seed_says_so(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.cell("batch_norm", 0, 0.8)
    folder.cell("rms_norm", 0, 0.9)
    folder.cell("layer_norm", 0, 0.7)
    directory = folder.write()
    assert "One seed: no interval, so nothing here is decided." in printed(directory).replace("\n", " ")
    page = make_report(directory).read_text(encoding="utf-8")
    assert "+0.1" in page
    assert "[+" not in page.split("## How to read it")[0]


def test_two_norms_are_compared_in_one_sentence(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for seed in range(3):
        folder.cell("batch_norm", seed, 0.8)
        folder.cell("rms_norm", seed, 0.9 + seed / 100)
    opening = make_report(folder.write()).read_text(encoding="utf-8").split("\n\n")[1]
    assert opening.startswith("On 1 task with 3 seeds, `rms_norm` against `batch_norm`, mean paired difference: +0.11")
    assert opening.endswith("0 of 6 runs diverged, 0 failed.")


def test_a_missing_baseline_is_said(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for seed in range(3):
        folder.cell("rms_norm", seed, 0.9)
    folder.cell("batch_norm", 0, status=None)
    directory = folder.write()
    text = printed(directory).replace("\n", " ")
    assert "The baseline batch_norm has no result yet" in text
    assert "1 of its 4 cells has no result yet" in text
    page = make_report(directory).read_text(encoding="utf-8")
    assert "no difference was computed" in page
    assert (directory / "report/figures/seeds-digits-cnn.png").exists()


def test_a_study_without_baseline(tmp_path: Path) -> None:
    folder = Folder(tmp_path, baseline=None)
    folder.cell("rms_norm", 0, 0.9)
    assert "names no baseline" in make_report(folder.write()).read_text(encoding="utf-8")


def test_a_partial_study_is_preliminary(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for seed in range(3):
        folder.cell("batch_norm", seed, 0.8)
        folder.cell("rms_norm", seed, 0.9, status="done" if seed < 2 else None)
    directory = folder.write()
    results = load(directory)
    assert results.unfinished == 1
    (comparison,) = compare(results)
    assert {row.label: row.troubles for row in comparison.rows} == {"batch_norm": "", "rms_norm": "1 to come"}
    assert "preliminary" in make_report(directory).read_text(encoding="utf-8")


def test_only_cells_of_the_study_take_part(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.cell("batch_norm", 0, 0.8)
    superseded = folder.cell("batch_norm", 1, 0.1)
    folder.study["cells"].remove(superseded)
    assert load_frame(folder.write())["id"].tolist() == folder.study["cells"]


def test_a_torn_result_is_skipped_and_said(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.cell("batch_norm", 0, 0.8)
    torn = folder.cell("batch_norm", 1, 0.8)
    directory = folder.write()
    (store.cell_dir(directory, torn) / store.RESULT).write_text('{"id": "', encoding="utf-8")
    results = load(directory)
    assert (len(results.rows), results.unfinished, len(results.skipped)) == (1, 1, 1)
    page = make_report(directory).read_text(encoding="utf-8")
    assert "1 file could not be read and took no part" in page
    assert str(tmp_path) not in page


def test_norms_of_one_label_are_told_apart(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.cell("/a/one.py:PeakNorm", 0, 0.8, label="PeakNorm")
    folder.cell("/b/two.py:PeakNorm", 0, 0.9, label="PeakNorm")
    assert len(set(load(folder.write()).labels)) == 2


def test_baseline_may_be_named_by_its_label(tmp_path: Path) -> None:
    folder = Folder(tmp_path, baseline="mine")
    folder.cell("/a/one.py:PeakNorm", 0, 0.8, label="mine")
    folder.cell("batch_norm", 0, 0.9)
    (comparison,) = compare(load(folder.write()))
    assert comparison.baseline is not None
    assert comparison.baseline.label == "mine"


def test_without_a_test_part_validation_is_shown_and_said(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.cell("batch_norm", 0, metrics={"val/accuracy": 0.7})
    folder.cell("rms_norm", 0, metrics={"val/accuracy": 0.8})
    directory = folder.write()
    (comparison,) = compare(load(directory))
    assert comparison.measured == "val/accuracy"
    assert "no test metric" in make_report(directory).read_text(encoding="utf-8")


def test_a_run_without_the_metric_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.cell("batch_norm", 0, 0.8)
    folder.cell("rms_norm", 0, metrics={"val/accuracy": 0.7})
    frame = load_frame(folder.write()).set_index("norm")
    assert frame.loc["rms_norm", "outcome"] == "failed"
    assert frame.loc["rms_norm", "error.message"] == "the run ended without logging test/accuracy"


def test_a_logged_metric_cannot_take_another_column(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.cell("batch_norm", 0, metrics={"test/accuracy": 0.7, "norm": 5.0, "seed": 9.0})
    (row,) = load(folder.write()).rows
    assert (row["norm"], row["seed"], row["metrics.norm"]) == ("batch_norm", 0, 5.0)


def test_uneven_training_is_said(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.cell("batch_norm", 0, 0.8)
    folder.cell("rms_norm", 0, 0.8, steps=50)
    assert "NOT held fixed: the number of training steps" in make_report(folder.write()).read_text(encoding="utf-8")


def test_mixed_machines_are_said(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.cell("batch_norm", 0, 0.8)
    folder.cell("rms_norm", 0, 0.8, host={"platform": "Linux", "cpu": "another"})
    assert "different machines (`cpu`)" in make_report(folder.write()).read_text(encoding="utf-8")


def test_notes_are_shown_once_with_their_norms(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for seed in range(2):
        folder.cell("batch_norm", seed, 0.8, notes=["statistics span later positions"])
        folder.cell("ghost(size=4)", seed, 0.8, label="ghost", notes=["statistics span later positions"])
    directory = folder.write()
    page = make_report(directory).read_text(encoding="utf-8")
    assert page.count("- Note on `batch_norm` and `ghost`: `statistics span later positions`.") == 1
    assert printed(directory).count("Note on batch_norm and ghost: statistics span later positions.") == 1
    assert "- `ghost` is `ghost(size=4)`" in page


def test_cost_is_shown_beside_quality(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for seed in range(3):
        folder.cell("batch_norm", seed, 0.8, step_ms=10.0 + seed)
        folder.cell("rms_norm", seed, 0.8, step_ms=22.0, parameters=2_000_000)
    text = printed(folder.write())
    assert "22.0 2.00×" in text
    assert "12.3k" in text
    assert "2M" in text


# --------------------------------------------------------------------------------------------------------------- files


def test_report_holds_everything(report: Path) -> None:
    assert report.parts[-3:] == ("synthetic", "report", "report.md")
    page = report.read_text(encoding="utf-8")
    for section in (
        "At a glance",
        "How to read it",
        "What was held fixed",
        "What was not controlled",
        "Cost",
        "Settings",
    ):
        assert f"## {section}\n" in page
    for said in (
        "Student's t",
        "same initial weights",
        "none was tuned by itself",
        "75 %",
        "0.25",
        "`lr = 0.003`",
        "`2.13.0`",
    ):
        assert said in page
    linked = re.findall(r"\((figures/[^)]+)\)", page)
    assert len(linked) == 8
    assert all((report.parent / name).stat().st_size > 1000 for name in linked)


def test_the_study_in_the_report_is_python(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.cell("/home/me/it's.py:Peak\"Norm", 0, 0.8, label='Peak"Norm')
    folder.cell("batch_norm", 0, 0.8)
    page = make_report(folder.write()).read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(
        block.replace("import normzoo as nz", ""),
        {"nz": type("nz", (), {"Study": lambda **options: found.update(options)})},
    )
    assert found["norms"] == {'Peak"Norm': "it's.py:Peak\"Norm", "batch_norm": "batch_norm"}
    assert "/home/me" not in page


def test_identical_results_give_an_identical_report(tmp_path: Path, report: Path) -> None:
    first = report.parent
    second = make_report(three_norms(tmp_path)).parent
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(second)) for path in second.rglob("*") if path.is_file())
    assert len(names) == 11
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    again = make_report(tmp_path / "synthetic").parent
    assert all((again / name).read_bytes() == (first / name).read_bytes() for name in names)


def test_a_row_does_not_change_when_another_norm_joins(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for seed in range(4):
        folder.cell("batch_norm", seed, 0.8)
        folder.cell("rms_norm", seed, 0.8 + seed / 100)
    (alone,) = compare(load(folder.write()))
    for seed in range(4):
        folder.cell("layer_norm", seed, 0.7 + seed / 50)
    (joined,) = compare(load(folder.write()))
    intervals = [next(row.difference for row in c.rows if row.label == "rms_norm") for c in (alone, joined)]
    assert intervals[0] == intervals[1]


def test_tables_for_machines_agree(report: Path) -> None:
    folder = report.parent
    from_csv = pd.read_csv(folder / "results.csv")
    from_parquet = pd.read_parquet(folder / "results.parquet")
    frame = load_frame(folder.parent)
    assert len(from_csv) == len(from_parquet) == len(frame) == 18
    assert list(from_csv.columns) == list(from_parquet.columns) == list(frame.columns)
    assert from_csv["value"].tolist() == frame["value"].tolist() == from_parquet["value"].tolist()
    assert from_parquet.loc[0, "config.lr"] == 0.003
    assert from_parquet["config.model.depth"].tolist() == [2] * 18


def test_mixed_types_in_one_column_survive_parquet(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for seed, clip in enumerate((None, 1.0, "auto", True, [1, 2])):
        folder.cell("batch_norm", seed, 0.8, setting={"clip": clip})
    path = make_report(folder.write()).parent / "results.parquet"
    assert pd.read_parquet(path)["config.clip"].dropna().tolist() == ["1.0", "auto", "True", "[1, 2]"]


NASTY = "=cmd()|`x`*b*_i_<script>[a](b)$x$\x1b[31m\u202e"


def test_what_others_wrote_is_no_markup(tmp_path: Path) -> None:
    folder = Folder(tmp_path, baseline="batch_norm")
    folder.cell("batch_norm", 0, 0.8, curve=[0.1, 0.2, 0.3])
    folder.cell("evil.py:Evil", 0, 0.9, label=NASTY, curve=[0.1, 0.2, 0.3])
    error = {"type": "ValueError", "message": f"{NASTY}\n{NASTY}", "traceback": f"```\n{NASTY}"}
    folder.cell(
        "worse.py:Worse", 0, None, label="+worse", status="failed", error=error, warnings=[NASTY], task="a|b/*c*"
    )
    directory = folder.write()
    page = make_report(directory).read_text(encoding="utf-8")
    assert "\x1b" not in page
    assert "\u202e" not in page
    prose = re.sub(r"(`{3,})[^\n]*\n.*?\n\1", "", page, flags=re.DOTALL)
    outside = re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", prose)
    assert "<script>" not in outside
    assert "[a](b)" not in outside
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().split("\n")}) == 1, table
    with (directory / "report/results.csv").open(encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert f"'{NASTY}" in cells
    assert not [cell for cell in cells if re.match(r"\s*[=@+]", cell)]
    text = printed(directory)
    assert "\x1b" not in text
    assert "=cmd()|`x`*b*_i_<script>[a](b)$x$[31m" in text


def test_escapes() -> None:
    assert code("a`b``c") == "``` a`b``c ```"
    assert fenced("```\nx").split("\n")[0] == "````"
    assert escape("# a\n- b") == r"\# a - b"
    assert [safe_cell(v) for v in ("@x", "\t=x", -3, None)] == ["'@x", "'\t=x", -3, None]


def test_numbers_keep_the_digits_that_matter() -> None:
    assert Numbers.fitting([0.91, 0.92], [0.012]).value(0.9134) == "0.913"
    assert Numbers.fitting([1e-6, 3e-6], [1e-7]).value(1.234e-6) == "1.23e-06"
    assert Numbers.fitting([0.9], [0.0]).value(-0.00001) == "0.000"
    assert Numbers.fitting([], []).value(math.nan) == "–"
    assert Numbers(3).value(6.07e16) == "6.07e+16"


# ------------------------------------------------------------------------------------------------------------- figures


def test_figures_are_not_blank_and_differ(report: Path) -> None:
    folder = report.parent / "figures"
    images = {path.name: imread(path)[..., :3] for path in folder.glob("*.png")}
    assert len(images) == 4
    for name, image in images.items():
        ink = np.any(image < 0.9, axis=-1)
        assert 0.01 < ink.mean() < 0.5, name
        colors = {tuple(color) for color in (image[ink] * 8).astype(int)}
        assert len(colors) > 20, name
        edge = np.concatenate([ink[:3].ravel(), ink[-3:].ravel(), ink[:, :3].ravel(), ink[:, -3:].ravel()])
        assert not edge.any(), f"{name} is cut off"
    for path in folder.glob("*.pdf"):
        assert path.read_bytes().startswith(b"%PDF")


def test_many_norms_long_names_outliers_and_foreign_scripts(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(24):
        label = "batch_norm" if i == 0 else f"規範{i}$x$_" + "long" * (i % 12)
        for seed in range(2):
            value = 0.2 if i == 5 else 0.95 + 0.04 * float(rng.random())
            status = "diverged" if i == 7 else "done"
            folder.cell(
                f"norm{i}" if i else "batch_norm",
                seed,
                value,
                label=label,
                status=status,
                curve=[0.1, 0.5, None if i == 7 else value],
            )
    path = make_report(folder.write()).parent / "figures/curves-digits-cnn.png"
    ink = np.any(imread(path)[..., :3] < 0.9, axis=-1)
    assert not ink[:, :2].any()
    assert not ink[:, -2:].any()


def test_tasks_with_equal_slugs_get_their_own_figures(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    for task in ("a/b", "a:b", "../x"):
        folder.cell("batch_norm", 0, 0.8, task=task)
    figures = make_report(folder.write()).parent / "figures"
    assert len(list(figures.glob("seeds-*.png"))) == 3
    assert len(list((tmp_path / "synthetic").rglob("*.png"))) == 3


def test_perfect_scores_have_a_place_on_the_error_scale() -> None:
    values = [0.2, 0.9, 0.99, 0.998, 1.0]
    scale = _scale(values, "max")
    assert scale.kind == "error"
    there, back = _transform(scale)
    placed = there(np.array(values))
    assert (np.diff(placed) > 0).all()
    assert placed[-1] - placed[-2] == pytest.approx(math.log10(2))
    assert back(placed) == pytest.approx(values)
    assert _scale([1.0, 1.0], "max").kind == "linear"
    assert _scale([0.5, 0.001], "min").kind == "log"
    assert _scale([-1.0, 100.0], "min").kind == "linear"


def test_labels_stay_in_order_apart_and_beside_the_axis() -> None:
    spots = _spread([0.0, 0.5, 0.5, 0.51, 1.0, 1.0], 0.06)
    assert (np.diff(spots) >= 0.06 - 1e-9).all()
    assert min(spots) >= -0.02
    assert max(spots) <= 1.02 + 1e-9
    assert spots[2] == pytest.approx(0.5033, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------ terminal


@pytest.mark.parametrize("width", [30, 60, 80, 100, 160])
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, width: int) -> None:
    text = printed(three_norms(tmp_path), width=width)
    assert max(len(line.rstrip()) for line in text.split("\n")) <= width
    assert "+0.031" in text
    assert "3/3" in text


def test_a_wide_terminal_shows_both_intervals(tmp_path: Path) -> None:
    text = printed(three_norms(tmp_path))
    (line,) = [line for line in text.split("\n") if line.startswith("layer_norm") and "0.941" in line]
    assert "+0.0310 [+0.0285, +0.0335]" in line
    assert "[+0.0300, +0.0320]" in line
    assert "better" in line
    assert "3:0" in line


def test_a_pipe_gets_whole_lines_and_no_colour(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(three_norms(tmp_path))
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert re.search(r"^layer_norm .*better.*3:0.*12\.3k$", text, re.MULTILINE)


def test_a_terminal_without_unicode(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    with path.open("w", encoding="ascii") as file:
        print_comparison(three_norms(tmp_path), Console(file=file, width=140))
    text = path.read_text(encoding="ascii")
    assert "0.9100 +- 0.0100" in text
    assert "?" not in text


def test_make_report_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path)
    folder.cell("batch_norm", 0, 0.8, curve=[0.1, 0.2])
    make_report(folder.write())
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("call", [make_report, print_table, load_frame])
def test_folders_that_are_no_study(tmp_path: Path, call: Any) -> None:
    with pytest.raises(NormzooError, match="no folder"):
        call(tmp_path / "nothing")
    with pytest.raises(NormzooError, match="no study folder"):
        call(tmp_path)
    folder = Folder(tmp_path, "empty")
    folder.cell("batch_norm", 0, status=None)
    with pytest.raises(NormzooError, match="no results yet: 0 of 1 cells"):
        call(folder.write())
    assert not (tmp_path / "empty/report").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    directory = three_norms(tmp_path)
    (directory / "report").write_text("a file in the way", encoding="utf-8")
    with pytest.raises(NormzooError, match="cannot be written"):
        make_report(directory)


def test_results_that_disagree_on_the_metric(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.cell("batch_norm", 0, 0.8)
    folder.cell("rms_norm", 0, 0.8, mode="min")
    with pytest.raises(NormzooError, match="must share one metric"):
        load_frame(folder.write())


def test_a_report_needs_no_training_stack(tmp_path: Path) -> None:
    directory = three_norms(tmp_path)
    script = (
        "import sys, normzoo.report\n"
        "light = [m for m in ('numpy', 'pandas', 'matplotlib', 'rich') if m in sys.modules]\n"
        f"normzoo.report.make_report({str(directory)!r})\n"
        f"normzoo.report.print_table({str(directory)!r})\n"
        "heavy = [m for m in ('torch', 'pytorch_lightning', 'wandb', 'matplotlib.pyplot') if m in sys.modules]\n"
        "print('loaded', light, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded [] []\n")
