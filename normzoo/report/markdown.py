"""The page: ``report.md`` with its figures, and the same numbers as tables for a machine."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normzoo.errors import NormzooError
from normzoo.report import figures, findings, table
from normzoo.report.comparison import Comparison, Row, compare, compare_settings
from normzoo.report.frame import IDENTITY, Results, column, load, unique
from normzoo.report.frame import Row as Run
from normzoo.report.text import code, count, escape, fenced, one_line, safe_cell

if TYPE_CHECKING:
    import pandas as pd

FOLDER = "report"
_TRACEBACKS = 5
_TRACEBACK_LINES = 12


def write_report(directory: str | os.PathLike[str]) -> Path:
    """Write everything into ``report/`` in the study's folder; ``report.md`` is written last.

    Raises:
        NormzooError: when the folder is no study, no cell has a result, or the report cannot be written.
    """
    results = load(directory)
    comparisons = compare(results)
    folder = results.directory / FOLDER
    path = folder / "report.md"
    try:
        folder.mkdir(exist_ok=True)
        drawn = figures.draw_all(results, comparisons, folder / "figures")
        frame = results.frame()
        write_csv(frame, folder / "results.csv")
        frame.to_parquet(folder / "results.parquet", index=False)
        path.write_text(page(results, comparisons, drawn), encoding="utf-8", newline="\n")
    except OSError as error:
        raise NormzooError(
            f"the report cannot be written to {folder}: {error}. Make the folder writable, or free some space"
        ) from error
    return path


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Write the frame so that no text in it is a formula for a spreadsheet."""
    safe = frame.astype(object).map(safe_cell)
    safe.columns = [safe_cell(name) for name in frame.columns]
    safe.to_csv(path, index=False, lineterminator="\n", encoding="utf-8")


def page(results: Results, comparisons: Sequence[Comparison], drawn: Mapping[str, Mapping[str, str]]) -> str:
    """The whole page as Markdown.

    Args:
        results: the study.
        comparisons: one for each task.
        drawn: file stems of the figures, by task and kind.
    """
    parts = [
        f"# {escape(results.study.get('name', results.directory.name))}",
        findings.headline(results, comparisons, code),
        *_notes(results),
        _bullets([findings.task_line(c, code) for c in comparisons]),
        *_overview(results, comparisons),
    ]
    for comparison in comparisons:
        parts += _task(results, comparison, drawn.get(comparison.task, {}))
    parts += ["## How to read it", _bullets(findings.reading(comparisons))]
    parts += ["## What was held fixed", _bullets(findings.held_fixed(results, comparisons, code))]
    parts += ["## What was not controlled", _bullets(findings.not_controlled(results, comparisons, code))]
    parts += _every_setting(results, comparisons)
    parts += _troubles(results)
    parts += ["## Cost", findings.cost(results), _costs(comparisons)]
    parts += _settings(results)
    parts += _provenance(results)
    parts += _again(results)
    return "\n\n".join(part for part in parts if part) + "\n"


# -------------------------------------------------------------------------------------------------------------- blocks


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _grid(titles: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A Markdown table whose columns ``left`` are text; its cells are Markdown already."""
    rule = ["---" if i in left else "--:" for i in range(len(titles))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, rule, *rows))


def _plain(text: str) -> str:
    return text.replace("|", r"\|")


def _notes(results: Results) -> list[str]:
    if not results.skipped:
        return []
    lines = [f"{escape(message)}" for message in results.skipped]
    return [f"{count(len(lines), 'file')} could not be read and took no part:", _bullets(lines)]


# ------------------------------------------------------------------------------------------------------------ sections


def _overview(results: Results, comparisons: Sequence[Comparison]) -> list[str]:
    """Norms by tasks: the difference and what it comes to."""
    with_differences = [c for c in comparisons if c.differences]
    if len(with_differences) < 2:
        return []
    labels = results.labels
    cells: dict[str, list[str]] = {label: [] for label in labels}
    for c in with_differences:
        found = {row.label: row for row in c.rows}
        for label in labels:
            cells[label].append(_short(found.get(label), c))
    titles = [
        "norm",
        *(f"{code(c.task)}<br>{code(c.measured)} {'↑' if c.mode == 'max' else '↓'}" for c in with_differences),
    ]
    rows = [[code(label), *texts] for label, texts in cells.items()]
    return [
        "## At a glance",
        "Mean paired difference to the baseline (↑ higher is better, ↓ lower is better). Bold where the interval is on "
        "one side of zero.",
        _grid(titles, rows),
    ]


def _short(row: Row | None, c: Comparison) -> str:
    if row is None:
        return "–"
    if row.difference is None:
        return "baseline"
    d = row.difference
    if d.n == 0:
        return row.troubles or d.verdict
    text = c.numbers.value(d.mean, True)
    text = f"**{text}** {d.verdict}" if d.better else text
    return f"{text} ({row.troubles})" if row.troubles else text


def _task(results: Results, c: Comparison, drawn: Mapping[str, str]) -> list[str]:
    parts = [f"## {escape(c.task)}", _main_table(c)]
    if len(c.settings) > 1:
        parts.append("Each norm at the setting that validation chose for it. The tables by setting are further down.")
    parts.append(_bullets([f"Note on {note}" for note in findings.notes(results, c.task, code)]))
    if "seeds" in drawn:
        what = "Every seed, and the mean"
        if any(d.n for _, d in c.differences):
            what += (
                "; at the right the difference to the baseline with its interval. Blue is better, orange is worse, "
                "grey with a hollow mark is undecided. A seed has the same height in every row"
            )
        parts += _figure(drawn["seeds"], f"{c.task}: {c.measured} of every seed", what)
    if "curves" in drawn:
        what = (
            "Thick lines are means over the seeds that trained, thin lines are seeds, a cross is where a run stopped "
            "being finite"
        )
        parts += _figure(drawn["curves"], f"{c.task}: {c.validation} during training", what)
    return parts


def _figure(stem: str, title: str, caption: str) -> list[str]:
    return [f"![{escape(title)}](figures/{stem}.png)", f"*{caption}.* [PDF](figures/{stem}.pdf)"]


def _main_table(c: Comparison) -> str:
    found = table.columns(c)
    rows = []
    for i, row in enumerate(c.rows):
        cells = [
            code(shown.cells[i]) if shown.verbatim and shown.cells[i] else _plain(shown.cells[i]) for shown in found
        ]
        if row.baseline:
            cells[0] = f"**{cells[0]}**"
        rows.append(cells)
    titles = [code(shown.title) if shown.title == one_line(c.measured) else _plain(shown.title) for shown in found]
    return _grid(titles, rows, left=[i for i, shown in enumerate(found) if shown.left])


def _every_setting(results: Results, comparisons: Sequence[Comparison]) -> list[str]:
    """All settings of the tasks that have several, pairs matched on the setting."""
    parts: list[str] = []
    for c in comparisons:
        if len(c.settings) < 2:
            continue
        chosen = {(row.label, row.setting) for row in c.rows}
        rows = []
        for at in compare_settings(results, c.task):
            for row in at.rows:
                d = row.difference
                rows.append(
                    [
                        code(row.setting),
                        code(row.label),
                        at.numbers.value(row.validation) + (" ✓" if (row.label, row.setting) in chosen else ""),
                        table.value_text(row, at),
                        table.difference_text(row, at) if at.baseline else "–",
                        d.verdict if d else "",
                        table.seeds_text(row),
                    ]
                )
        titles = [
            "setting",
            "norm",
            code(c.validation),
            code(c.measured),
            f"difference [{findings.PERCENT} t]",
            "verdict",
            "seeds",
        ]
        parts += [f"### {escape(c.task)}", _grid(titles, rows, left=(0, 1, 5, 6))]
    if not parts:
        return []
    lead = (
        "Here the baseline of every difference ran at the same setting. ✓ is the setting that validation chose for the "
        "norm. The test metric is shown at all of them, and chose none: picking the best of these rows afterwards "
        "would let it choose."
    )
    return ["## Every setting", lead, *parts]


def _troubles(results: Results) -> list[str]:
    """Every run that came to no value, with the last line of its error."""
    bad = [row for row in results.rows if row["outcome"] != "ok"]
    parts = ["## Runs without a value"]
    if not bad:
        parts.append(f"None: all {count(len(results.rows), 'run')} trained to the end with a finite result.")
    else:
        rows = [
            [
                code(r["label"]),
                code(r["task"]),
                code(r["setting"]) if r["setting"] else "",
                str(r["seed"]),
                r["outcome"],
                code(_last_line(r)),
                code(f"cells/{r['id']}/log.txt"),
            ]
            for r in bad
        ]
        parts.append(_grid(["norm", "task", "setting", "seed", "ended", "error", "log"], rows, left=range(7)))
        parts += _tracebacks(bad)
    said = Counter(line for text in results.column("warnings") for line in unique(text.split("\n")))
    if said:
        parts += [
            "Warnings of the runs:",
            _bullets([f"{code(text)} ({count(n, 'run')})" for text, n in said.most_common(10)]),
        ]
    return parts


def _last_line(row: Mapping[str, Any]) -> str:
    message = str(row["error.message"] or "")
    kind = str(row["error.type"] or "")
    lines = [line for line in message.splitlines() if line.strip()]
    last = one_line(lines[-1]) if lines else ""
    text = f"{kind}: {last}" if kind and last else kind or last or "no finite value of the metric"
    return text if len(text) <= 200 else f"{text[:199]}…"


def _tracebacks(bad: Sequence[Run]) -> list[str]:
    """The ends of the first few different tracebacks."""
    parts = []
    told = list({row["error.traceback"]: row for row in reversed(bad) if row["error.traceback"]}.values())[::-1]
    for row in told[:_TRACEBACKS]:
        lines = str(row["error.traceback"]).rstrip().splitlines()[-_TRACEBACK_LINES:]
        parts += [f"{code(row['label'])} on {code(row['task'])}, seed {row['seed']}:", fenced("\n".join(lines), "text")]
    if len(told) > _TRACEBACKS:
        parts.append(f"{len(told) - _TRACEBACKS} more are in results.csv.")
    return parts


def _costs(comparisons: Sequence[Comparison]) -> str:
    rows = []
    for c in comparisons:
        for row in c.rows:
            rows.append(
                [
                    code(c.task),
                    code(row.label),
                    table.time_text(row),
                    "–" if row.seconds != row.seconds else f"{row.seconds:.1f}",
                    table.whole(row.parameters),
                    table.whole(row.norm_parameters),
                    table.whole(row.peak_memory_mb),
                ]
            )
    return _grid(["task", "norm", "ms/step", "s/run", "parameters", "of the norms", "peak MB"], rows, left=(0, 1))


def _settings(results: Results) -> list[str]:
    """The whole configuration: what all tasks share in one list, the rest by task."""
    names = [name for name in results.names("config.") if name.removeprefix("config.") not in IDENTITY]
    by_task = {task: [row for row in results.rows if row["task"] == task] for task in results.tasks}
    values = {name: {task: _distinct(column(rows, name)) for task, rows in by_task.items()} for name in names}
    shared = [n for n in names if len(set(values[n].values())) == 1]
    rest = [n for n in names if n not in shared]
    parts = ["## Settings"]
    meaning = {row["label"]: _portable(row["norm"]) for row in results.rows}
    unlike = [f"{code(label)} is {code(norm)}" for label, norm in meaning.items() if label != norm]
    if unlike:
        parts += ["Norms whose label is not their whole name:", _bullets(unlike)]
    if shared:
        parts += [
            "The same for all tasks:",
            ", ".join(code(f"{n.removeprefix('config.')} = {next(iter(values[n].values()))}") for n in shared),
        ]
    if rest:
        rows = [
            [code(n.removeprefix("config.")), *(code(values[n][t]) if values[n][t] else "" for t in by_task)]
            for n in rest
        ]
        parts += ["By task:", _grid(["", *(code(t) for t in by_task)], rows)]
    return parts


def _distinct(values: Sequence[object]) -> str:
    """All values of a column, in their order, as one text."""
    return ", ".join(unique(_number(v) for v in values))


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return one_line(value) or "(empty)"


def _provenance(results: Results) -> list[str]:
    rows = []
    for name in (*results.names("versions."), *results.names("host.")):
        counts = Counter(_number(v) for v in results.column(name))
        texts = [code(v) + (f" ({count(n, 'run')})" if len(counts) > 1 else "") for v, n in counts.items()]
        if texts:
            rows.append([escape(name.split(".", 1)[1]), ", ".join(texts)])
    return ["## Versions and machine", _grid(["", ""], rows, left=(0, 1))] if rows else []


def _again(results: Results) -> list[str]:
    """How to make the report, and the study, once more."""
    study = results.study
    labels = study.get("labels", {})
    norms = {one_line(label): _portable(norm) for norm, label in labels.items()}
    listed: object = list(norms) if all(k == v for k, v in norms.items()) else norms
    lines = [
        "import normzoo as nz",
        "",
        "study = nz.Study(",
        f"    name={study.get('name')!r},",
        f"    norms={listed!r},",
        f"    tasks={study.get('tasks')!r},",
        f"    settings={study.get('settings')!r},",
        f"    seeds={study.get('seeds')!r},",
        f"    baseline={study.get('baseline')!r},",
        f"    threads={study.get('threads', 1)!r},",
        ")",
    ]
    return [
        "## Once more",
        "This page and its figures are made from the result files alone, the same each time, by `normzoo report` "
        "with this study's folder. The study again, as a file for `normzoo run`:",
        fenced("\n".join(lines), "python"),
        "Beside this page: `results.csv` and `results.parquet`, one row a run with its configuration, all metrics, "
        "times, versions and errors; `../cells/`, the curves and the logs.",
    ]


def _portable(norm: str) -> str:
    """A norm from a file without the folder of that file, which is another one on the reader's machine."""
    path, colon, rest = norm.rpartition(".py:")
    file = re.split(r"[/\\]", path)[-1]
    return f"{file}{colon}{rest}"
