"""What the numbers say, in sentences: the finding, what was held fixed, what was not, how to read an interval.

The sentences are the same in the terminal and on the page; ``name`` writes a label, task or value in either's way.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from normzoo.report.comparison import Comparison, Row, all_differences
from normzoo.report.frame import Results, unique
from normzoo.report.statistics import LEVEL, Difference, bootstrap_ceiling, smallest_p
from normzoo.report.text import count, duration, listing

Name = Callable[[object], str]

PERCENT = f"{100 * LEVEL:.0f} %"

RANKING = (
    "A run that diverged has no value and is in no mean, but it counts as lost against a run that trained, and a norm "
    "that diverged in some seed is never called better. A failed run (an error, a killed process) counts as neither. "
    "Norms with either stand below all others."
)


def headline(results: Results, comparisons: Sequence[Comparison], name: Name) -> str:
    """The finding in a few sentences, with the number of runs that came to nothing."""
    sentences = [_verdicts(results, comparisons, name), _outcomes(results)]
    return " ".join(sentences)


def _verdicts(results: Results, comparisons: Sequence[Comparison], name: Name) -> str:
    scope = f"On {count(len(comparisons), 'task')} with {_seeds(comparisons)}"
    norms = len(results.labels)
    differences = all_differences(comparisons)
    if results.baseline is None:
        return f"{scope}, {count(norms, 'norm')} were run. The study names no baseline, so no difference was computed."
    if not any(c.baseline for c in comparisons):
        missing = name(results.study.get("baseline"))
        text = f"{scope}, {count(norms, 'norm')} were run."
        return f"{text} The baseline {missing} has no result yet, so no difference was computed."
    base = name(next(c.baseline for c in comparisons if c.baseline).label)
    if not differences:
        return f"{scope}, only the baseline {base} was run: there is nothing to compare it with."
    if len({row.label for _, row, _ in differences}) == 1:
        return _single(scope, base, differences, name)
    verdicts = Counter(d.verdict for _, _, d in differences)
    with_interval = sum(d.t is not None for _, _, d in differences)
    text = f"{scope}, {count(norms - 1, 'norm')} {'was' if norms == 2 else 'were'} compared with {base}, seed by seed."
    if not with_interval:
        return f"{text} {_no_interval(differences)}"
    better, worse = verdicts["better"], verdicts["worse"]
    text += (
        f" Of {count(with_interval, 'mean paired difference')}, {better} came out better and {worse} worse ({PERCENT} "
        f"interval wholly on that side of zero); {with_interval - better - worse} decided nothing"
    )
    same = sum(d.identical and d.t is not None for _, _, d in differences)
    text += f" ({same} of them equal to the baseline in every seed)." if same else "."
    if with_interval > 1:
        by_chance = f"{with_interval * (1 - LEVEL):.2g}"
        text += f" If no norm differed at all, about {by_chance} of them would still exclude zero by chance."
    return text


def _single(scope: str, base: str, differences: Sequence[tuple[Comparison, Row, Difference]], name: Name) -> str:
    """The sentence for one norm against the baseline: the numbers themselves."""
    parts = []
    for c, _, d in differences:
        what = f"{c.numbers.value(d.mean, True)} in {name(c.measured)} on {name(c.task)}"
        why = f", {c.numbers.interval(d.t.low, d.t.high)}, {d.verdict}" if d.t else f", {d.verdict}: no interval"
        parts.append(f"{what} ({'higher' if c.mode == 'max' else 'lower'} is better{why})")
    return f"{scope}, {name(differences[0][1].label)} against {base}, mean paired difference: {'; '.join(parts)}."


def _no_interval(differences: Sequence[tuple[Comparison, Row, Difference]]) -> str:
    if any(d.n == 1 for _, _, d in differences):
        return "One seed: no interval, so nothing here is decided."
    return "No pair of runs has a value on both sides, so no difference could be computed."


def _seeds(comparisons: Sequence[Comparison]) -> str:
    numbers = sorted({len(c.seeds) for c in comparisons})
    if len(numbers) > 1:
        return f"{numbers[0]} to {numbers[-1]} seeds each"
    return count(numbers[0], "seed") + (" each" if len(comparisons) > 1 else "")


def _outcomes(results: Results) -> str:
    counts = Counter(results.column("outcome"))
    total = len(results.rows)
    text = f"{counts['diverged']} of {count(total, 'run')} diverged, {counts['failed']} failed."
    if results.unfinished:
        left = results.unfinished
        text += (
            f" The study is not finished: {left} of its {count(total + left, 'cell')} "
            f"{'has' if left == 1 else 'have'} no result yet, so every number here is preliminary."
        )
    return text


def title(comparison: Comparison, name: Name) -> str:
    """The task, what is measured, and which way is better."""
    goal = "higher" if comparison.mode == "max" else "lower"
    return f"{name(comparison.task)} ({name(comparison.measured)}, {goal} is better)"


def task_line(comparison: Comparison, name: Name) -> str:
    """What was found on one task: the best mean, and which norms an interval tells from the baseline."""
    c = comparison
    text = f"{title(c, name)}: "
    best = next((row for row in c.rows if row.values), None)
    if best is None:
        return text + "no run came to a value."
    spread = f" ± {c.numbers.value(best.sd)}" if len(best.values) > 1 else ""
    only = "" if best.complete else f", over {len(best.values)} of {best.planned} seeds"
    text += f"best mean {name(best.label)}, {c.numbers.value(best.mean)}{spread}{only}"
    if c.baseline is None or not c.differences:
        return text + "."
    for verdict in ("better", "worse"):
        found = [
            f"{name(row.label)} {c.numbers.value(d.mean, True)} {c.numbers.interval(d.t.low, d.t.high)}"
            for row, d in c.differences
            if d.verdict == verdict and d.t
        ]
        if found:
            text += f"; {verdict} than {name(c.baseline.label)}: {listing(found)}"
    text += _undecided(c, name)
    failed = [f"{name(row.label)} ({row.troubles})" for row in c.rows if row.troubles]
    return f"{text}{'; not every seed trained: ' + listing(failed) if failed else ''}."


def notes(results: Results, task: str, name: Name) -> list[str]:
    """What the runs of one task said that a reader should know, each once, with the norms it is about."""
    about: dict[str, list[str]] = {}
    for row in results.rows:
        if row["task"] == task and row["notes"]:
            for note in row["notes"].split("\n"):
                about.setdefault(note, []).append(row["label"])
    return [f"{listing(name(label) for label in unique(labels))}: {name(note)}." for note, labels in about.items()]


def _undecided(c: Comparison, name: Name) -> str:
    text = ""
    groups = {"undecided": "undecided", "identical": "equal to it in every seed", "one seed": "one seed, no interval"}
    groups["no pair"] = "no pair of runs to compare"
    for verdict, words in groups.items():
        rows = [name(row.label) for row, d in c.differences if d.verdict == verdict]
        if rows:
            text += f"; {words}: {listing(rows) if len(rows) <= 3 else count(len(rows), 'norm')}"
    return text


def reading(comparisons: Sequence[Comparison]) -> list[str]:
    """How the numbers are to be read, for the number of seeds there are."""
    return [
        "A difference is norm minus baseline, taken seed by seed and then averaged: each seed is one pair of runs.",
        *intervals(comparisons),
        "Better and worse mean that the t interval lies wholly on one side of zero. All else is undecided, which is "
        f"not the same as equal. Each interval is {PERCENT} by itself: nothing is corrected for the number of "
        "comparisons.",
        RANKING,
    ]


def intervals(comparisons: Sequence[Comparison]) -> list[str]:
    """Which intervals these are, and what they are worth with so many seeds."""
    numbers = Counter(d.n for _, _, d in all_differences(comparisons) if d.t is not None)
    if not numbers:
        return ["One seed gives no interval: a difference between two runs cannot say how far it would vary."]
    n = numbers.most_common(1)[0][0]
    student = (
        f"The {PERCENT} interval of a mean paired difference is Student's t, mean ± t · s/√n with n the number of "
        "seeds: exact when the differences are normally distributed, and honestly wide when they are few."
    )
    if n >= 10:
        return [
            student,
            "The bootstrap interval (percentile, fixed seed) assumes nothing about the shape of the differences.",
        ]
    return [
        student,
        "The bootstrap interval (percentile, fixed seed) assumes no shape, but cannot reach beyond the differences "
        f"seen: with {n} seeds it covers the truth in at most {100 * bootstrap_ceiling(n):.3g} % of studies (for "
        "symmetric differences). Take it as the spread of what was seen, not as a test.",
        f"With {n} pairs no sign-flip test can give p below {smallest_p(n):.2g}: these intervals are rough, and only "
        "more seeds mend that.",
    ]


def held_fixed(results: Results, comparisons: Sequence[Comparison], name: Name) -> list[str]:
    """What was the same for all norms, as far as the result files show it."""
    lines = [
        "Pairing: for one seed and one setting, every norm started from the same initial weights of all that is not a "
        "norm, and saw the same order of the data and the same dropout masks.",
        _recipe(comparisons),
        _steps(results, name),
        _test_part(comparisons, name),
    ]
    threads = sorted({int(v) for v in results.column("config.threads")})
    if len(threads) == 1:
        lines.append(f"Every run used {count(threads[0], 'thread')}.")
    if threads == [1] and set(results.column("config.accelerator")) == {"cpu"}:
        lines.append("ms/step is the median CPU time of a training step, forward, backward and update.")
    return [line for line in lines if line]


def _recipe(comparisons: Sequence[Comparison]) -> str:
    most = max(len(c.settings) for c in comparisons)
    if most == 1:
        return (
            "One recipe (optimizer, learning rate, schedule, epochs) for all norms of a task; none was tuned by itself."
        )
    return (
        f"Every norm was run at the same {most} settings of a task; its row shows the one with the best mean "
        "validation metric over the seeds (settings in which a seed did not train come last)."
    )


def _test_part(comparisons: Sequence[Comparison], name: Name) -> str:
    without = [name(c.task) for c in comparisons if c.measured == c.validation]
    if without:
        return f"NOT held apart: {listing(without)} logged no test metric, so validation is shown, which also chooses."
    return "The test part chose nothing: settings are chosen by validation alone."


def _steps(results: Results, name: Name) -> str:
    taken: dict[tuple[str, str], set[float]] = {}
    for row in results.rows:
        if row["status"] == "done" and row["steps"] is not None:
            taken.setdefault((row["task"], row["setting"]), set()).add(row["steps"])
    uneven = [
        f"{name(task)}{' at ' + name(setting) if setting else ''}" for (task, setting), n in taken.items() if len(n) > 1
    ]
    if uneven:
        return f"NOT held fixed: the number of training steps differs between runs of {listing(uneven)}."
    return "Within a task and setting every run that ended took the same number of training steps." if taken else ""


def not_controlled(results: Results, comparisons: Sequence[Comparison], name: Name) -> list[str]:
    """What could explain a difference and was not ruled out."""
    lines = []
    if max(len(c.settings) for c in comparisons) == 1:
        lines.append(
            "Tuning: with one recipe for all, a norm that would want another learning rate or weight decay is shown at "
            "a disadvantage. Give the study several settings, and each norm gets the one that validation chooses."
        )
    else:
        lines.append(
            "Different norms may be shown at different settings. Their pairs then share the seed, but initial weights "
            "only where the model is the same, and the order of the data only where the batch size is. The tables by "
            "setting match all of it."
        )
    if any(len({row.parameters for row in c.rows if row.parameters == row.parameters}) > 1 for c in comparisons):
        lines.append("Size: norms bring different numbers of parameters, as the tables show.")
    lines += [
        "The data: all seeds share one split. The intervals cover new initial weights and orders of the data, not a "
        "new sample of data or another network.",
        "Time: step times are medians of runs that shared the machine with each other; read ratios near 1 as 1.",
    ]
    for kind, words in (("versions", "versions of the software"), ("host", "machines")):
        names = results.names(f"{kind}.")
        mixed = [name(key.removeprefix(f"{kind}.")) for key in names if len(set(results.column(key))) > 1]
        if mixed:
            lines.append(f"The runs come from different {words} ({listing(mixed)}): pairs may differ in the last bits.")
    return lines


def cost(results: Results) -> str:
    """How much computing the study took."""
    seconds, memory = results.column("seconds.total"), results.column("peak_memory_mb")
    if not seconds:
        return "The results hold no times."
    text = f"{count(len(seconds), 'run')} took {duration(sum(seconds))} of computing"
    text += f" (median {duration(statistics.median(seconds))}, longest {duration(max(seconds))} each)"
    return f"{text}; peak memory {max(memory):,.0f} MB." if memory else f"{text}."
