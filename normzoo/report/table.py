"""The comparison in the terminal: Rich when there is one, plain lines of the same content when not."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from normzoo.report import findings
from normzoo.report.comparison import Comparison, Row, compare
from normzoo.report.frame import load
from normzoo.report.text import count, one_line

_STYLES = {"better": "green", "worse": "red"}
_ASCII = str.maketrans({"±": "+-", "−": "-", "–": "-", "×": "x", "·": "*", "√": "sqrt ", "…": "..."})


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        title: its heading.
        cells: one text a row.
        spare: the larger, the sooner it is left out where the terminal is narrow; 0 is never.
        left: whether it is text, aligned to the left.
        verbatim: whether its cells are names that somebody else chose.
    """

    title: str
    cells: list[str]
    spare: int = 0
    left: bool = False
    verbatim: bool = False

    @property
    def width(self) -> int:
        """What it needs, a long text folded."""
        longest = max(len(text) for text in (self.title, *self.cells))
        return min(longest, 9 if self.title == "seeds" else 16) if self.left else longest


def columns(comparison: Comparison) -> list[Column]:
    """The table of one task, best norm first: what the terminal and the page both show."""
    c = comparison
    rows = c.rows
    result = [Column("norm", [one_line(row.label) for row in rows], left=True, verbatim=True)]
    if len({row.setting for row in rows}) > 1:
        result.append(Column("setting", [one_line(row.setting) for row in rows], left=True, verbatim=True))
    result.append(Column(one_line(c.measured), [value_text(row, c) for row in rows]))
    if c.baseline is not None:
        result += _differences(c)
    result.append(Column("seeds", [seeds_text(row) for row in rows], left=True))
    if not all(math.isnan(row.step_ms) for row in rows):
        result.append(Column("ms/step", [time_text(row) for row in rows], 1))
    if not all(math.isnan(row.parameters) for row in rows):
        result.append(Column("params", [compact(row.parameters) for row in rows], 3))
    return result


def _differences(c: Comparison) -> list[Column]:
    found = [row.difference for row in c.rows]
    boot = [c.numbers.interval(d.bootstrap.low, d.bootstrap.high) if d and d.bootstrap else "" for d in found]
    won = ["" if d is None else f"{d.won}:{d.lost}" for d in found]
    verdict = ["" if d is None or d.t is None else d.verdict for d in found]
    return [
        Column(f"difference [{findings.PERCENT} t]", [difference_text(row, c) for row in c.rows]),
        Column("verdict", verdict, 4, left=True),
        Column("bootstrap", boot, 5),
        Column("won:lost", won, 2),
    ]


def difference_text(row: Row, c: Comparison) -> str:
    """Mean paired difference and its t interval, or why there is none."""
    d = row.difference
    if d is None:
        return "baseline"
    if d.n == 0:
        return d.verdict
    interval = c.numbers.interval(d.t.low, d.t.high) if d.t else f"({d.verdict})"
    return f"{c.numbers.value(d.mean, True)} {interval}"


def value_text(row: Row, c: Comparison) -> str:
    """Mean and standard deviation."""
    if not row.values:
        return "–"
    spread = f" ± {c.numbers.value(row.sd)}" if len(row.values) > 1 else ""
    return f"{c.numbers.value(row.mean)}{spread}"


def seeds_text(row: Row) -> str:
    """How many seeds the mean is over, and what became of the others."""
    used = f"{len(row.values)}/{row.planned}"
    if row.difference and row.difference.n < len(row.values):
        used += f", {count(row.difference.n, 'pair')}"
    return f"{used}, {row.troubles}" if row.troubles else used


def time_text(row: Row) -> str:
    """Milliseconds of a training step, and their ratio to the baseline's."""
    if math.isnan(row.step_ms):
        return "–"
    ratio = "" if math.isnan(row.step_ratio) else f" {row.step_ratio:.2f}×"
    return f"{_short(row.step_ms)}{ratio}"


def _short(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:#.3g}"


def whole(n: float) -> str:
    """A count with its thousands told apart, ``–`` for NaN.

    >>> whole(12345.0)
    '12,345'
    """
    return "–" if math.isnan(n) else f"{n:,.0f}"


def compact(n: float) -> str:
    """A count in at most five characters.

    >>> compact(950), compact(12345), compact(2.5e6)
    ('950', '12.3k', '2.5M')
    """
    if math.isnan(n):
        return "–"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{suffix}"
    return f"{n:.0f}"


def print_comparison(directory: str | os.PathLike[str], console: Console | None = None) -> None:
    """Print the finding, one table a task, what was held fixed, and how to read it.

    Args:
        directory: the study's folder.
        console: where to; standard output when None, as wide as it needs when that is no terminal.

    Raises:
        NormzooError: when the folder is no study, or no cell has a result.
    """
    results = load(directory)
    comparisons = compare(results)
    printer = _Printer(console or _console())
    printer.text(findings.headline(results, comparisons, one_line))
    for message in results.skipped:
        printer.text(f"Skipped: {one_line(message)}")
    for comparison in comparisons:
        printer.blank()
        printer.text(findings.title(comparison, one_line), style="bold")
        printer.table(comparison)
        for note in findings.notes(results, comparison.task, one_line):
            printer.text(f"Note on {note}", indent="  ")
    printer.blank()
    printer.listing("Held fixed", findings.held_fixed(results, comparisons, one_line))
    printer.listing("To read it", [*findings.intervals(comparisons), findings.RANKING])
    printer.blank()
    printer.text(findings.cost(results))


def _console() -> Console:
    """Standard output; a file or a pipe has no width, so nothing is left out or folded there."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 1000
    return console


@dataclass(frozen=True)
class _Printer:
    console: Console

    def blank(self) -> None:
        self.console.print()

    def text(self, text: str, style: str = "", indent: str = "") -> None:
        """Print one paragraph, folded where the terminal ends, or at a width that reads well."""
        width = max(20, min(self.console.width, 110))
        for line in textwrap.wrap(self._speakable(text), width, subsequent_indent=indent, break_on_hyphens=False):
            self.console.print(Text(line, style=style))

    def listing(self, title: str, lines: Sequence[str]) -> None:
        self.text(f"{title}:", style="bold")
        for line in lines:
            self.text(f"- {line}", indent="  ")

    def table(self, comparison: Comparison) -> None:
        kept = columns(comparison)
        while _needed(kept) > self.console.width and any(column.spare for column in kept):
            kept.remove(max(kept, key=lambda column: column.spare))
        if _needed(kept) > self.console.width:
            self._stacked(comparison)
            return
        self.console.print(_table(kept, [_style(row) for row in comparison.rows], self._speakable))
        dropped = [column.title for column in columns(comparison) if column.title not in [k.title for k in kept]]
        if dropped:
            self.text(f"Left out for want of width: {', '.join(dropped)}.", style="dim")

    def _stacked(self, comparison: Comparison) -> None:
        """One paragraph a norm, where no table fits."""
        shown = columns(comparison)
        for i, row in enumerate(comparison.rows):
            parts = [f"{column.title} {column.cells[i]}" for column in shown[1:] if column.cells[i]]
            self.text(f"{shown[0].cells[i]}: {'; '.join(parts)}", style=_style(row), indent="  ")

    def _speakable(self, text: str) -> str:
        """The text in what the output can encode: a terminal without Unicode must not end in a traceback."""
        if self.console.encoding.lower().startswith("utf"):
            return text
        plain = text.translate(_ASCII)
        return plain.encode(self.console.encoding, errors="replace").decode(self.console.encoding)


def _style(row: Row) -> str:
    if row.baseline:
        return "bold"
    return _STYLES.get(row.difference.verdict, "") if row.difference else ""


def _needed(kept: Sequence[Column]) -> int:
    return sum(column.width for column in kept) + 2 * (len(kept) - 1)


def _table(kept: Sequence[Column], styles: Sequence[str], speakable: Callable[[str], str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for column in kept:
        table.add_column(
            Text(speakable(column.title)),
            justify="left" if column.left else "right",
            overflow="fold",
            no_wrap=not column.left,
        )
    for i, style in enumerate(styles):
        table.add_row(*(Text(speakable(column.cells[i])) for column in kept), style=style)
    return table
