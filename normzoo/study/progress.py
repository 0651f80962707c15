"""What a person sees while a study runs: a live table on a terminal, one line a finished cell anywhere else."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from normzoo.study import store

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from normzoo.study.spec import Cell


class Progress:
    """Counts cells and shows them; a context manager.

    Args:
        cells: all cells of the study.
        rows: the rows that were there before.
        workers: how many cells run at once.
        console: where to write; left out, the standard output.
        shown: False shows nothing at all.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        rows: Sequence[Mapping[str, Any]],
        workers: int,
        *,
        console: Console | None = None,
        shown: bool = True,
    ) -> None:
        from rich.console import Console

        self.console = console or Console(quiet=not shown, highlight=False, soft_wrap=True)
        self.tasks = list(dict.fromkeys(cell.task for cell in cells))
        self.total = {task: sum(cell.task == task for cell in cells) for task in self.tasks}
        self.rows: list[Mapping[str, Any]] = list(rows)
        self.running: dict[str, Cell] = {}
        self.workers = workers
        self.ends_with_table = True
        self._live: Any = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal and not self.console.quiet:
            from rich.live import Live

            self._live = Live(get_renderable=self.table, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            self.running.clear()
            live.stop()
            if self.ends_with_table:
                self.console.print(self.table())

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False)

    def start(self, cell: Cell) -> None:
        """A cell begins."""
        self.running[cell.id] = cell

    def stop(self, cell: Cell) -> None:
        """A cell ended without a row."""
        self.running.pop(cell.id, None)

    def finish(self, cell: Cell, row: Mapping[str, Any]) -> None:
        """A cell has its row; on a terminal only what went wrong is worth a line of its own."""
        self.running.pop(cell.id, None)
        self.rows.append(row)
        if self._live is None or row["status"] != "done":
            done, total = len(self.rows), sum(self.total.values())
            self.say(f"[{done:>{len(str(total))}}/{total}] {describe(row)}")

    def time_left(self) -> float | None:
        """Seconds until the study ends, from the durations of its finished cells; None as long as there is none."""
        seconds = {
            task: [_total(row) for row in self.rows if row["task"] == task and _total(row)] for task in self.tasks
        }
        known = [value for values in seconds.values() for value in values]
        if not known:
            return None
        typical = {task: statistics.fmean(values or known) for task, values in seconds.items()}
        done = {task: sum(row["task"] == task for row in self.rows) for task in self.tasks}
        return sum((self.total[task] - done[task]) * typical[task] for task in self.tasks) / self.workers

    def table(self) -> Table:
        """The state of the study, one row a task."""
        from rich.table import Table

        left = self.time_left()
        done, total = len(self.rows), sum(self.total.values())
        caption = f"{done} of {total} cells"
        if self.running:
            caption += f", about {duration(left)} left" if left is not None else ", starting"
        table = Table(caption=caption, caption_justify="left")
        table.add_column("task")
        for name in ("done", "running", "failed", "diverged"):
            table.add_column(name, justify="right")
        table.add_column("best so far (validation)")
        for task in self.tasks:
            rows = [row for row in self.rows if row["task"] == task]
            count = {status: sum(row["status"] == status for row in rows) for status in store.STATUSES}
            running = sum(cell.task == task for cell in self.running.values())
            table.add_row(
                task,
                f"{count['done']}/{self.total[task]}",
                str(running or ""),
                str(count["failed"] or ""),
                str(count["diverged"] or ""),
                best_so_far(rows),
            )
        return table


def best_so_far(rows: Sequence[Mapping[str, Any]]) -> str:
    """The norm, at its setting, with the best mean over its seeds on the validation data."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "done" and row["metrics"].get(f"val/{row['metric']}") is not None:
            groups.setdefault(row["group"], []).append(row)
    if not groups:
        return ""
    sign = 1 if rows[0]["mode"] == "max" else -1
    means = {group: statistics.fmean(r["metrics"][f"val/{r['metric']}"] for r in g) for group, g in groups.items()}
    best = max(means, key=lambda group: sign * means[group])
    row = groups[best][0]
    return f"{row['label']} {row['metric']} {means[best]:.4g}"


def describe(row: Mapping[str, Any]) -> str:
    """One line on one finished cell.

    >>> describe({"task": "digits/cnn", "label": "dyt", "seed": 1, "status": "done", "metric": "accuracy",
    ...     "metrics": {"val/accuracy": 0.9512}, "seconds": {"total": 3.21}, "error": None})
    'digits/cnn  dyt  seed 1  val/accuracy 0.9512  3.2 s'
    """
    parts = [row["task"], row["label"], f"seed {row['seed']}"]
    error = row["error"] or {}
    if row["status"] == "done":
        value = row["metrics"].get(f"val/{row['metric']}")
        parts.append(f"val/{row['metric']} {value:.4g}" if value is not None else "no validation")
    elif row["status"] == "diverged":
        parts.append(f"DIVERGED: {error.get('message', '')}")
    else:
        first = str(error.get("message", "")).partition("\n")[0]
        parts.append(f"FAILED: {error.get('type', 'error')}: {first}")
    if _total(row):
        parts.append(f"{_total(row):.1f} s")
    return "  ".join(parts)


def _total(row: Mapping[str, Any]) -> float:
    return (row.get("seconds") or {}).get("total") or 0.0


def duration(seconds: float) -> str:
    """A duration for people.

    >>> duration(3.2), duration(75), duration(7260)
    ('3 s', '1 min 15 s', '2 h 1 min')
    """
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
