"""From the tidy table to the rows of the report: which setting, how many runs, what difference to the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from normzoo.report.frame import Results
from normzoo.report.statistics import Difference, Mode, Seed, paired_difference, standard_deviation
from normzoo.report.text import Numbers

# Every comparison draws the same resamples, so a row does not change when another norm joins the study.
_BOOTSTRAP_SEED = 0


@dataclass(frozen=True)
class Row:
    """One norm on one task, at one setting.

    Attributes:
        label: the norm.
        setting: the setting the numbers are from, empty when there is only one.
        runs: outcome and value by seed.
        planned: how many seeds any norm was run with here; fewer ``runs`` means some are still to come.
        mean: of the values, over the seeds that trained; NaN when none did.
        sd: their standard deviation.
        validation: mean of the validation metric over the same seeds.
        difference: to the baseline; None for the baseline itself, or when it has no runs.
        step_ms: median time of a training step, NaN when it was not measured.
        step_ratio: ``step_ms`` over that of the baseline.
        parameters: of the whole model.
        norm_parameters: of its norms.
        peak_memory_mb: the largest among the runs.
        seconds: median time of a whole run.
        ids: cell by seed.
    """

    label: str
    setting: str
    baseline: bool
    runs: dict[int, Seed]
    planned: int
    mean: float
    sd: float
    validation: float
    difference: Difference | None
    step_ms: float
    step_ratio: float
    parameters: float
    norm_parameters: float
    peak_memory_mb: float
    seconds: float
    ids: dict[int, str]

    @property
    def values(self) -> dict[int, float]:
        """The metric of every seed that trained."""
        return {seed: run.value for seed, run in self.runs.items() if run.outcome == "ok"}

    def ended(self, outcome: str) -> int:
        """How many runs ended this way."""
        return sum(run.outcome == outcome for run in self.runs.values())

    @property
    def complete(self) -> bool:
        """Whether every seed trained to a value."""
        return len(self.values) == self.planned

    @property
    def troubles(self) -> str:
        """``1 diverged, 2 failed, 1 to come``; empty when every seed trained."""
        counts = ((self.ended(o), o) for o in ("diverged", "failed"))
        parts = [f"{n} {word}" for n, word in (*counts, (self.planned - len(self.runs), "to come")) if n]
        return ", ".join(parts)


@dataclass(frozen=True)
class Comparison:
    """All norms on one task.

    Attributes:
        task: its name.
        measured: key of the metric that is reported, ``"test/accuracy"``.
        validation: key of the metric that settings are chosen by, ``"val/accuracy"``.
        mode: ``"max"`` when larger is better.
        rows: best first; norms with a run that has no value come after all others, their means being over survivors.
        seeds: every seed that was run.
        settings: every setting that was run, in the order of the study.
        numbers: how values of the metric are written.
        baseline: the baseline's row; None when it has no results here.
    """

    task: str
    measured: str
    validation: str
    mode: Mode
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    settings: tuple[str, ...]
    numbers: Numbers

    @property
    def baseline(self) -> Row | None:
        """The row of the norm that the others are compared with."""
        return next((row for row in self.rows if row.baseline), None)

    @property
    def differences(self) -> list[tuple[Row, Difference]]:
        """The rows that are compared with the baseline, in their order."""
        return [(row, row.difference) for row in self.rows if row.difference is not None]


def compare(results: Results) -> list[Comparison]:
    """Compare all norms on every task, each at the setting that validation chose for it.

    Validation alone chooses: for each task and norm, the setting with the fewest seeds that did not train, and among
    those the one with the best mean validation metric (the first of the study in a tie). The norm's test values and its
    differences are then those of that setting.
    """
    return [_compare(results, task, _choose(_of(results.frame, task))) for task in results.tasks]


def compare_settings(results: Results, task: str) -> list[Comparison]:
    """Compare all norms on one task at every setting in turn, pairs matched on the setting too."""
    frame = _of(results.frame, task)
    return [_compare(results, task, frame[frame["setting"] == setting]) for setting in dict.fromkeys(frame["setting"])]


def _of(frame: pd.DataFrame, task: str) -> pd.DataFrame:
    return frame[frame["task"] == task]


def _choose(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs of the chosen setting of every norm of one task."""
    if frame["setting"].nunique() == 1:
        return frame
    sign = 1 if frame["mode"].iloc[0] == "max" else -1
    order = {setting: i for i, setting in enumerate(dict.fromkeys(frame["setting"]))}
    kept = []
    for _, runs in frame.groupby("norm", sort=False):
        planned = runs["seed"].nunique()

        def rank(group: pd.DataFrame, planned: int = planned) -> tuple[int, float, int]:
            # A run without a finite validation value did not train, whatever its test value.
            values = group["validation"].dropna()
            mean = sign * values.mean() if len(values) else -math.inf
            return planned - len(values), -mean, order[group["setting"].iloc[0]]

        kept.append(min((group for _, group in runs.groupby("setting", sort=False)), key=rank))
    return pd.concat(kept)


def _compare(results: Results, task: str, frame: pd.DataFrame) -> Comparison:
    first = frame.iloc[0]
    mode: Mode = first["mode"]
    by_norm = {norm: runs.sort_values("seed") for norm, runs in frame.groupby("norm", sort=False)}
    reference = next((runs for norm, runs in by_norm.items() if norm == results.baseline), None)
    planned = frame["seed"].nunique()
    rows = [_row(runs, reference, norm == results.baseline, planned, mode) for norm, runs in by_norm.items()]
    rows.sort(key=lambda row: _rank(row, mode))
    return Comparison(
        task=task,
        measured=first["measured"],
        validation=f"val/{first['metric']}",
        mode=mode,
        rows=tuple(rows),
        seeds=tuple(sorted(int(seed) for seed in frame["seed"].unique())),
        settings=tuple(dict.fromkeys(_of(results.frame, task)["setting"])),
        numbers=Numbers.fitting(
            (row.mean for row in rows), (row.difference.sd if row.difference else row.sd for row in rows)
        ),
    )


def _row(
    runs: pd.DataFrame, reference: pd.DataFrame | None, baseline: bool, planned: int, mode: Mode
) -> Row:
    outcomes = _outcomes(runs)
    values = [run.value for run in outcomes.values() if run.outcome == "ok"]
    difference = None
    if reference is not None and not baseline:
        difference = paired_difference(
            outcomes, _outcomes(reference), mode, rng=np.random.default_rng(_BOOTSTRAP_SEED)
        )
    step_ms = _median(runs["step_ms"])
    usual = math.nan if reference is None else _median(reference["step_ms"])
    return Row(
        label=str(runs["label"].iloc[0]),
        setting=str(runs["setting"].iloc[0]),
        baseline=baseline,
        runs=outcomes,
        planned=planned,
        mean=float(np.mean(values)) if values else math.nan,
        sd=standard_deviation(values),
        validation=_mean(runs["validation"]),
        difference=difference,
        step_ms=step_ms,
        step_ratio=step_ms / usual if usual > 0 else math.nan,
        parameters=_median(runs["parameters"]),
        norm_parameters=_median(runs["norm_parameters"]),
        peak_memory_mb=_largest(runs["peak_memory_mb"]),
        seconds=_median(pd.to_numeric(runs["seconds.total"])),
        ids={int(seed): str(cell) for seed, cell in zip(runs["seed"], runs["id"], strict=True)},
    )


def _outcomes(runs: pd.DataFrame) -> dict[int, Seed]:
    return {
        int(seed): Seed(outcome, float(value) if outcome == "ok" else math.nan)
        for seed, outcome, value in zip(runs["seed"], runs["outcome"], runs["value"], strict=True)
    }


def _rank(row: Row, mode: Mode) -> tuple[bool, bool, float, str]:
    lost = row.ended("diverged") + row.ended("failed") > 0
    if math.isnan(row.mean):
        return lost, True, 0.0, row.label
    return lost, False, -row.mean if mode == "max" else row.mean, row.label


def _median(column: pd.Series) -> float:
    values = column.dropna()
    return float(values.median()) if len(values) else math.nan


def _mean(column: pd.Series) -> float:
    values = column.dropna()
    return float(values.mean()) if len(values) else math.nan


def _largest(column: pd.Series) -> float:
    values = column.dropna()
    return float(values.max()) if len(values) else math.nan


def all_differences(comparisons: Iterable[Comparison]) -> list[tuple[Comparison, Row, Difference]]:
    """Every comparison with a baseline in the study."""
    return [(c, row, difference) for c in comparisons for row, difference in c.differences]
