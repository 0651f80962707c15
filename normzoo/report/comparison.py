"""From the tidy table to the rows of the report: which setting, how many runs, what difference to the baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from normzoo.report.frame import Results, column, median, unique
from normzoo.report.frame import Row as Run
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
    return [_compare(results, task, _choose(_of(results, task))) for task in results.tasks]


def compare_settings(results: Results, task: str) -> list[Comparison]:
    """Compare all norms on one task at every setting in turn, pairs matched on the setting too."""
    return [_compare(results, task, runs) for runs in _split(_of(results, task), "setting").values()]


def _of(results: Results, task: str) -> list[Run]:
    return [run for run in results.rows if run["task"] == task]


def _split(runs: Iterable[Run], name: str) -> dict[str, list[Run]]:
    """The runs by one of their columns, in the order of its first appearance."""
    parts: dict[str, list[Run]] = {}
    for run in runs:
        parts.setdefault(run[name], []).append(run)
    return parts


def _choose(runs: Sequence[Run]) -> list[Run]:
    """The runs of one task at the chosen setting of every norm."""
    order = unique(run["setting"] for run in runs)
    sign = 1 if runs[0]["mode"] == "max" else -1
    kept: list[Run] = []
    for mine in _split(runs, "norm").values():
        planned = len({run["seed"] for run in mine})

        def rank(group: list[Run], planned: int = planned) -> tuple[int, float, int]:
            # A run without a finite validation value did not train, whatever its test value.
            values = column(group, "validation")
            mean = sign * float(np.mean(values)) if values else -math.inf
            return planned - len(values), -mean, order.index(group[0]["setting"])

        kept += min(_split(mine, "setting").values(), key=rank)
    return kept


def _compare(results: Results, task: str, runs: Sequence[Run]) -> Comparison:
    first = runs[0]
    mode: Mode = first["mode"]
    by_norm = {norm: sorted(mine, key=lambda run: run["seed"]) for norm, mine in _split(runs, "norm").items()}
    reference = by_norm.get(results.baseline or "", [])
    seeds = sorted({run["seed"] for run in runs})
    rows = [_row(mine, reference, norm == results.baseline, len(seeds), mode) for norm, mine in by_norm.items()]
    rows.sort(key=lambda row: _rank(row, mode))
    spreads = (row.difference.sd if row.difference else row.sd for row in rows)
    return Comparison(
        task=task,
        measured=first["measured"],
        validation=f"val/{first['metric']}",
        mode=mode,
        rows=tuple(rows),
        seeds=tuple(seeds),
        settings=tuple(unique(run["setting"] for run in _of(results, task))),
        numbers=Numbers.fitting((row.mean for row in rows), spreads),
    )


def _row(runs: Sequence[Run], reference: Sequence[Run], baseline: bool, planned: int, mode: Mode) -> Row:
    outcomes = _outcomes(runs)
    values = [run.value for run in outcomes.values() if run.outcome == "ok"]
    validation = column(runs, "validation")
    difference = None
    if reference and not baseline:
        rng = np.random.default_rng(_BOOTSTRAP_SEED)
        difference = paired_difference(outcomes, _outcomes(reference), mode, rng=rng)
    step_ms, usual = median(runs, "step_ms"), median(reference, "step_ms")
    return Row(
        label=runs[0]["label"],
        setting=runs[0]["setting"],
        baseline=baseline,
        runs=outcomes,
        planned=planned,
        mean=float(np.mean(values)) if values else math.nan,
        sd=standard_deviation(values),
        validation=float(np.mean(validation)) if validation else math.nan,
        difference=difference,
        step_ms=step_ms,
        step_ratio=step_ms / usual if usual > 0 else math.nan,
        parameters=median(runs, "parameters"),
        norm_parameters=median(runs, "norm_parameters"),
        peak_memory_mb=max(column(runs, "peak_memory_mb"), default=math.nan),
        seconds=median(runs, "seconds.total"),
        ids={run["seed"]: run["id"] for run in runs},
    )


def _outcomes(runs: Iterable[Run]) -> dict[int, Seed]:
    return {run["seed"]: Seed(run["outcome"], math.nan if run["value"] is None else run["value"]) for run in runs}


def _rank(row: Row, mode: Mode) -> tuple[bool, bool, float, str]:
    lost = row.ended("diverged") + row.ended("failed") > 0
    if math.isnan(row.mean):
        return lost, True, 0.0, row.label
    return lost, False, -row.mean if mode == "max" else row.mean, row.label


def all_differences(comparisons: Iterable[Comparison]) -> list[tuple[Comparison, Row, Difference]]:
    """Every comparison with a baseline in the study."""
    return [(c, row, difference) for c in comparisons for row, difference in c.differences]
