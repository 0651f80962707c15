"""Runs the cells of a study: one process a cell, forked from a warm one, until each has its row.

The result file decides whether a cell is done, never an exit code: a training that is told to stop may exit with 0.
Nothing here imports torch or Lightning; only the cells' processes, and `run_study` with ``in_process=True``, do.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from normzoo.errors import NormzooError
from normzoo.study import store
from normzoo.study.progress import Progress, duration

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

    from normzoo.study.spec import Cell, Outlook, Study

ATTEMPTS = 2
"""How often a cell is started when it is killed."""

CANNOT_WRITE = 74
"""Exit code of a cell's process that could not write its files, as in sysexits.h."""

_MIRROR = "normzoo.study.tracking"
_TICK = 0.2
_inside_cell = False


@dataclass(frozen=True)
class Summary:
    """What came of a study.

    Attributes:
        directory: where the results are.
        done: cells with a finite result, of this run or an earlier one.
        diverged: cells whose loss was not finite.
        failed: cells that raised or were killed.
        unfinished: cells without a row.
        skipped: cells that had their row before this run.
        seconds: what this run took.
        signal: the number of the signal that ended it early, or None.
        problem: why the run was given up, or None.
    """

    directory: Path
    done: int
    diverged: int
    failed: int
    unfinished: int
    skipped: int
    seconds: float
    signal: int | None = None
    problem: str | None = None

    @property
    def exit_code(self) -> int:
        """0: all done; 1: some failed; 3: none failed, some diverged; 130 or 143: interrupted."""
        if self.signal is not None:
            return 128 + self.signal
        if self.failed or self.problem is not None or self.unfinished:
            return 1
        return 3 if self.diverged else 0

    def __str__(self) -> str:
        counts = {"done": self.done, "diverged": self.diverged, "failed": self.failed, "unfinished": self.unfinished}
        listed = ", ".join(f"{count} {name}" for name, count in counts.items() if count or name == "done")
        return f"{listed} in {duration(self.seconds)}; results in {self.directory}"


def run_study(
    study: Study,
    out: str | os.PathLike[str] = "runs",
    *,
    workers: int | None = None,
    in_process: bool = False,
    retry_failed: bool = False,
    progress: bool = True,
    track: bool = True,
    mirror_wait: float = 60.0,
) -> Summary:
    """Run every cell of a study that has no row yet; interrupted, the same call goes on where it was.

    Args:
        study: what to run.
        out: the folder of all studies; results go to ``out/<study.name>``.
        workers: how many cells at once; as many as there are processors for the study's threads when left out.
        in_process: one after the other in this process, for a debugger.
        retry_failed: also run the cells again that have failed before.
        progress: show what happens.
        track: keep a mirror of the results in Weights & Biases, by a process of its own.
        mirror_wait: how many seconds the mirror may take to finish after the last cell.

    Raises:
        NormzooError: for a study that cannot be run, a folder that cannot be written or that another runner holds.
    """
    if _inside_cell:
        raise NormzooError(
            "run_study was called by a file that a training loads for its norms; put the call under "
            '`if __name__ == "__main__":`'
        )
    began = time.monotonic()
    cells = study.cells()
    directory = Path(out).expanduser().resolve() / study.name
    with _held(directory), _Signals() as stop:
        rows = {cell.id: row for cell in cells if (row := store.load_result(directory, cell.id)) is not None}
        if retry_failed:
            rows = {cell_id: row for cell_id, row in rows.items() if row["status"] != "failed"}
        todo = [cell for cell in cells if cell.id not in rows]
        workers = _workers(workers, study.threads, in_process)
        display = Progress(cells, list(rows.values()), workers, shown=progress)
        run = _Run(directory, todo, workers, stop, display)
        display.say(
            f"{study.name}: {len(todo)} of {len(cells)} cells to run, {workers} at once; results in {directory}"
        )
        if todo:
            run.check(in_process)
        if stop.signal is None:
            with _writing(directory):
                store.open_study(directory, study.record(cells))
        if todo and stop.signal is None:
            with _mirror(directory, track, mirror_wait, stop, display), display:
                (run.in_process if in_process else run.in_processes)()
                display.ends_with_table = stop.signal is None
        summary = _summarise(cells, len(rows), time.monotonic() - began, run)
    if summary.signal is not None:
        kept = f"{len(cells) - summary.unfinished} of {len(cells)} cells are done"
        failed = f" ({summary.failed} failed)" if summary.failed else ""
        display.say(f"interrupted: {kept}{failed}, and kept in {directory}; to go on, run it again")
        return summary
    display.say(str(summary))
    if summary.problem is not None:
        display.say(f"stopped: {summary.problem}; mend that and run the same command again: what is finished is kept")
    elif summary.failed:
        display.say(f"failed cells keep their traceback in {directory / 'cells'}; run them again with --retry-failed")
    return summary


def _workers(workers: int | None, threads: int, in_process: bool) -> int:
    if workers is None:
        available = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        workers = max(1, available // threads)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise NormzooError(f"workers must be a whole number from 1 on, not {workers!r}")
    return 1 if in_process else workers


@contextlib.contextmanager
def _held(directory: Path) -> Iterator[None]:
    """The study's folder, made and locked; what the system refuses is one clear message, before anything runs."""
    with contextlib.ExitStack() as stack:
        with _writing(directory):
            (directory / "cells").mkdir(parents=True, exist_ok=True)
            stack.enter_context(store.lock(directory))
            probe = directory / "cells" / f".{os.getpid()}.tmp"
            probe.write_bytes(b"")
            probe.unlink()
        yield


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NormzooError(
            f"cannot write results to {directory}: {error.strerror or error}; choose another folder with --out"
        ) from error


def _summarise(cells: list[Cell], skipped: int, seconds: float, run: _Run) -> Summary:
    rows = [store.load_result(run.directory, cell.id) for cell in cells]
    count = {status: sum(row is not None and row["status"] == status for row in rows) for status in store.STATUSES}
    unwritten = sum(cell.id in run.unwritten and row is None for cell, row in zip(cells, rows, strict=True))
    return Summary(
        directory=run.directory,
        done=count["done"],
        diverged=count["diverged"],
        failed=count["failed"] + unwritten,
        unfinished=rows.count(None) - unwritten,
        skipped=skipped,
        seconds=seconds,
        signal=run.stop.signal if None in rows else None,
        problem=run.problem,
    )


# ------------------------------------------------------------------------------------------------------- the cells


@dataclass
class _Job:
    cell: Cell
    attempt: int
    process: BaseProcess


class _Run:
    """The cells still to run, and how the run goes."""

    def __init__(self, directory: Path, todo: list[Cell], workers: int, stop: _Signals, display: Progress) -> None:
        self.directory, self.todo, self.workers, self.stop, self.display = directory, todo, workers, stop, display
        self.problem: str | None = None
        self.unwritten: set[str] = set()

    def check(self, in_process: bool) -> None:
        """Find what would keep cells from running, before any does; wait meanwhile for the forkserver's imports.

        A model that cannot be built is only said: its cells are rows that failed, and the others go on.

        Raises:
            NormzooError: when the imports fail, a norm cannot be found by another process, or a task refuses one.
        """
        if in_process:
            from normzoo.study.spec import foresee

            failure, outlook = None, foresee(self.todo)
        else:
            self._check_findable()
            self.display.say("loading torch and Lightning, once")
            try:
                with self.stop.raising():
                    failure, outlook = _ask(self.todo)
            except KeyboardInterrupt:
                return
        if failure is not None:
            hint = ""
            if "torchvision::" in failure:
                hint = " (torchvision does not fit this torch: uninstall it, nothing here needs it)"
            last = "\n".join(f"  {line}" for line in failure.rstrip().splitlines()[-4:])
            raise NormzooError(f"the processes of the trainings cannot start{hint}:\n{last}")
        if outlook is not None:
            outlook.check()
            if outlook.failing:
                self.display.say(str(outlook))

    def _check_findable(self) -> None:
        from normzoo.study.spec import NOWHERE

        for cell in self.todo:
            if NOWHERE in cell.imports:
                raise NormzooError(
                    f"the norm {cell.norm!r} was defined in an interactive session, where no other process finds it; "
                    "put it into a file, or run with in_process=True"
                )

    def in_process(self) -> None:
        """One cell after the other, here."""
        from normzoo.study.cell import run_cell

        for cell in self.todo:
            if self.stop.signal is not None or self.problem is not None:
                return
            self.display.start(cell)
            try:
                with self.stop.raising():
                    row = run_cell(cell, self.directory)
            except (KeyboardInterrupt, SystemExit):  # Lightning makes the one into the other
                self.display.stop(cell)
                if self.stop.signal is not None:
                    return
                row = self._failed(cell, 1, "SystemExit", "the training called sys.exit")
            except OSError as error:
                row = self._not_written(cell, str(error))
            if row is not None:
                self.display.finish(cell, row)

    def in_processes(self) -> None:
        """Each cell in a process of its own, `workers` at once."""
        context = _context()
        queue = deque((cell, 1) for cell in self.todo)
        jobs: dict[int, _Job] = {}
        try:
            while ((queue and self.problem is None) or jobs) and self.stop.signal is None:
                while queue and self.problem is None and len(jobs) < self.workers:
                    cell, attempt = queue.popleft()
                    process = _start(context, _work, cell, self.directory, attempt)
                    jobs[process.sentinel] = _Job(cell, attempt, process)
                    self.display.start(cell)
                for sentinel in multiprocessing.connection.wait(list(jobs), timeout=_TICK):
                    job = jobs.pop(sentinel)  # pyright: ignore[reportArgumentType]
                    job.process.join()
                    if not self._settle(job):
                        queue.appendleft((job.cell, job.attempt + 1))
        finally:
            for job in jobs.values():
                job.process.kill()
            for job in jobs.values():
                job.process.join()

    def _settle(self, job: _Job) -> bool:
        """See what a cell's process has left behind; False when it has to be started again."""
        self.display.stop(job.cell)
        row = self._row_of(job)
        if row is not None:
            self.display.finish(job.cell, row)
        elif self.stop.signal is None and job.cell.id not in self.unwritten:
            self.display.say(f"{job.cell.label}: {_how_it_ended(job.process)}; starting it again")
            return False
        return True

    def _row_of(self, job: _Job) -> dict[str, Any] | None:
        """The row of a cell whose process has ended; None when it has to be started again, or cannot be written."""
        row = store.load_result(self.directory, job.cell.id)
        if row is not None or self.stop.signal is not None:  # Ctrl-C ends a process that has only begun as well
            return row
        if job.process.exitcode == CANNOT_WRITE:
            return self._not_written(job.cell, _last_lines(self.directory, job.cell, 1))
        if job.attempt < ATTEMPTS:
            return None
        message = f"{_how_it_ended(job.process)}, {ATTEMPTS} times"
        if "SIGKILL" in message:
            message += "; where memory ran out, run with fewer workers"
        return self._failed(job.cell, job.attempt, "Killed", message)

    def _failed(self, cell: Cell, attempt: int, kind: str, message: str) -> dict[str, Any] | None:
        error = {"type": kind, "message": message, "traceback": _last_lines(self.directory, cell, 30)}
        row = store.make_result(cell.header(attempt), "failed", error=error)
        try:
            store.write_json_atomic(store.cell_dir(self.directory, cell.id) / store.RESULT, row)
        except OSError as failure:
            self.unwritten.add(cell.id)
            self.problem = f"{cell.label}: cannot write its result: {failure}"
            return None
        return row

    def _not_written(self, cell: Cell, message: str) -> dict[str, Any] | None:
        """A cell that could not write its files has failed; where nothing can be written at all, the run ends."""
        return self._failed(cell, 1, "OSError", f"the cell could not write its files: {message}")


def _how_it_ended(process: BaseProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code} and without a result"


def _last_lines(directory: Path, cell: Cell, count: int) -> str:
    try:
        text = (store.cell_dir(directory, cell.id) / store.LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-count:])


# ---------------------------------------------------------------------------------------------------- its processes


def warm_up() -> None:
    """Let the forkserver begin its imports, without waiting; what a command does first, before it reads its study."""
    if _context().get_start_method() == "spawn":
        return
    with _without_main():
        forkserver.ensure_running()


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["normzoo.study.warm"])
    return context


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep multiprocessing from running the user's script again in every process; cells name the files they need."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start(context: BaseContext, target: Any, *args: Any) -> BaseProcess:
    process = context.Process(target=target, args=(*args, time.time()))  # pyright: ignore[reportAttributeAccessIssue]
    with _without_main():
        process.start()
    return process


def _ask(cells: list[Cell]) -> tuple[str | None, Outlook | None]:
    """Ask a process like the cells' own whether everything can be imported there, and what it foresees.

    Returns:
        The traceback of what failed, or what was foreseen.
    """
    context = _context()
    reader, writer = context.Pipe(duplex=False)
    try:
        process = _start(context, _answer, writer, cells)
        writer.close()
        answer = reader.recv()
        process.join()
        return answer
    except (EOFError, ConnectionError):
        why = "a process ended while it imported what they need, or built their models"
        return f"{why}; run `python -m normzoo.study.warm` to see whether it is an import", None


def _answer(writer: multiprocessing.connection.Connection, cells: list[Cell], launched: float) -> None:
    global _inside_cell
    _inside_cell = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from normzoo.study import warm

    failure, outlook = warm.failure, None
    if failure is None:
        from normzoo.study import cell, spec

        try:
            for name in dict.fromkeys(name for each in cells for name in each.imports):
                cell.load(name)
            outlook = spec.foresee(cells)
        except Exception:
            failure = traceback.format_exc()
    with contextlib.suppress(BrokenPipeError):  # the runner was interrupted meanwhile
        writer.send((failure, outlook))


def _work(cell: Cell, directory: Path, attempt: int, launched: float) -> None:
    """The life of a cell's process."""
    global _inside_cell
    _inside_cell = True
    code = 0
    try:
        _prepare_process(directory, cell)
        from normzoo.study.cell import run_cell

        run_cell(cell, directory, attempt, launched)
    except OSError as error:
        traceback.print_exc()
        print(error, file=sys.stderr)
        code = CANNOT_WRITE
    except Exception:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):  # a full disk, once more
        sys.stdout.flush()
        sys.stderr.flush()
    # At once: a thread that a norm or a loader left behind must not keep a finished cell from ending.
    os._exit(code)


def _prepare_process(directory: Path, cell: Cell) -> None:
    """Ignore Ctrl-C, which is the runner's to answer; die by SIGTERM, and with the runner; print to the log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Lightning turns a SIGTERM into an exit with code 0, except that it calls the handler it finds.
    signal.signal(signal.SIGTERM, _die)
    threading.Thread(target=_die_with_the_runner, daemon=True).start()
    folder = store.cell_dir(directory, cell.id)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / store.LOG, "wb") as log:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _die(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _die_with_the_runner() -> None:
    runner = multiprocessing.parent_process()
    assert runner is not None
    multiprocessing.connection.wait([runner.sentinel])
    os._exit(1)


# ------------------------------------------------------------------------------------------- signals and the mirror


class _Signals:
    """Notes SIGINT and SIGTERM instead of dying of them."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.count = 0
        self._raising = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Within, a signal also interrupts what is running, as a KeyboardInterrupt."""
        self._raising = True
        try:
            yield
        finally:
            self._raising = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        self.count += 1
        if self._raising:
            raise KeyboardInterrupt


@contextlib.contextmanager
def _mirror(directory: Path, track: bool, wait: float, stop: _Signals, display: Progress) -> Iterator[None]:
    """The Weights & Biases mirror runs beside; none of its faults is one of the study."""
    process, trouble = None, ""
    if track:
        try:
            process = _start_mirror(directory)
        except OSError as error:
            trouble = f"did not start ({error})"
    try:
        yield
    finally:
        if process is not None:
            trouble = _end_mirror(process, directory, wait, stop)
        if trouble:
            display.say(f"the Weights & Biases mirror {trouble}; `normzoo sync {directory}` completes it")


def _start_mirror(directory: Path) -> subprocess.Popen[bytes]:
    (directory / store.MIRROR_STOP).unlink(missing_ok=True)
    with open(directory / store.MIRROR_LOG, "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", _MIRROR, str(directory), "--follow"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C at the terminal is for the runner
        )


def _end_mirror(process: subprocess.Popen[bytes], directory: Path, wait: float, stop: _Signals) -> str:
    """Tell the mirror to finish, and wait a while; a second signal ends the waiting. What went wrong, or nothing."""
    flag = directory / store.MIRROR_STOP
    with contextlib.suppress(OSError):
        flag.touch()
    assert process.stdin is not None
    process.stdin.close()
    deadline, signals = time.monotonic() + wait, stop.count
    while process.poll() is None and time.monotonic() < deadline and stop.count == signals:
        time.sleep(0.05)
    with contextlib.suppress(OSError):
        flag.unlink(missing_ok=True)
    if process.poll() is None:
        process.kill()
        process.wait()
        return f"had not finished after {wait:g} s"
    return (
        f"ended with exit code {process.returncode} (see {directory / store.MIRROR_LOG})" if process.returncode else ""
    )
