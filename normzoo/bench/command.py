"""`normzoo bench`: what it prints."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from normzoo.bench import suite
from normzoo.bench.accuracy import Errors, measure_accuracy
from normzoo.bench.case import DIRECTIONS, Case, one_of, parse_shape
from normzoo.bench.contenders import OURS, alternatives, checked
from normzoo.bench.machine import choices, machine, memory_bytes
from normzoo.bench.measure import Subject, measure_case
from normzoo.bench.pages import measure_pages
from normzoo.bench.recurrent import Recurrent, measure_recurrent
from normzoo.bench.result import FLOOR, Row, as_csv
from normzoo.bench.timing import Effort
from normzoo.errors import NormzooError, unknown
from normzoo.ops import kernels, memory

SHAPES = {"channels-first": (64, 64, 32, 32), "channels-last": (64, 64, 32, 32), "tokens": (32, 512, 512)}
"""What is measured when no shape is given."""


def run_bench_command(
    norms: Sequence[str],
    *,
    shapes: Sequence[str],
    layouts: Sequence[str],
    dtypes: Sequence[str],
    device: str,
    direction: str,
    parameters: str,
    masked: bool,
    against: Sequence[str] | None,
    compiled: bool,
    effort: Effort,
    accuracy: bool,
    csv: Path | None,
    plot: Path | None,
) -> int:
    """Measure norms in each shape, layout and dtype, print a table for each, and write what was asked for.

    Raises:
        NormzooError: for a norm, shape, layout, dtype, device, alternative or folder that is none, or a tensor that
            does not fit into memory.
    """
    norms = [checked(norm) for norm in norms]
    one_of("direction", direction, DIRECTIONS)
    rivals = _rivals(against, compiled)
    cases = []
    for layout in layouts:
        one_of("layout", layout, SHAPES)
        for shape in [parse_shape(text) for text in shapes] or [SHAPES[layout]]:
            cases += [Case(shape, layout, dtype, device, parameters) for dtype in dtypes]
    _need_folder(csv, "--csv")
    _need_folder(plot, "--plot")
    subjects = [Subject(norm, masked) for norm in norms]
    console = _begin(device, effort, rivals)
    rows: list[Row] = []
    errors: list[Errors] = []
    try:
        for case in cases:
            with _enough_memory(str(case), case, "give a smaller --shape, or a --dtype of fewer bytes"):
                if accuracy:
                    errors += (wrong := measure_accuracy(case, subjects, rivals))
                    print_errors(console, case, wrong)
                    continue
                found = measure_case(case, subjects, rivals, direction, effort)
            rows += found
            print_rows(console, str(case) + (", 70 % real" if masked else ""), found)
    finally:  # what was measured before something went wrong is kept
        if rows:
            _write(rows, csv, plot, console)
    return _exit_code([*rows, *errors])


def run_recurrent_command(
    recurrents: Sequence[Recurrent], norms: Sequence[str], direction: str, effort: Effort, csv: Path | None
) -> int:
    """Measure recurrent layers with each norm inside against torch's own without any.

    Raises:
        NormzooError: for a norm, model or folder that is none, or sequences that do not fit into memory.
    """
    norms = [checked(norm) for norm in norms]
    one_of("direction", direction, DIRECTIONS)
    _need_folder(csv, "--csv")
    console = _begin(recurrents[0].device, effort, ())
    rows: list[Row] = []
    try:
        for each in recurrents:
            title = f"{each.model}, {each.steps} steps, batch {each.batch}, {each.hidden} units, {each.dtype}"
            with _enough_memory(title, each.case, "give smaller --steps, --batch or --hidden"):
                found = measure_recurrent(each, norms, direction=direction, effort=effort)
            rows += found
            print_rows(console, title, found)
    finally:
        if rows:
            _write(rows, csv, None, console)
    return _exit_code(rows)


def run_pages_command(rounds: int | None) -> int:
    """Print what keeping pages gains."""
    gains = measure_pages(rounds or 7)
    console = _console()
    console.print("The same calls in a process that keeps its pages and in one that does not, in turn; CPU time.")
    table = Table("", "default ms", "kept ms", "gain", box=None, pad_edge=False)
    for gain in gains:
        table.add_row(gain.workload, f"{gain.default * 1e3:.2f}", f"{gain.kept * 1e3:.2f}", f"{gain.gain:.2f}x")
    console.print(table)
    return 0


def run_suite_command(device: str, compiled: bool, effort: Effort, out: Path) -> int:
    """Run the suite, write it, and say what is met; 1 when something is not.

    Raises:
        NormzooError: when the files cannot be written, or there is no such device.
    """
    parts = suite.sections(device, compiled)
    _need_folder(out, "--out")
    console = _begin(device, effort, ("compile",) if compiled else ())
    targets, begun = [], False
    try:
        for part, found, number in suite.run_suite(out, parts, effort, device=device, compiled=compiled):
            begun = True
            if number < suite.PASSES:
                console.print(f"pass {number} of {suite.PASSES}: {part.name}", markup=False)
                continue
            console.print(part.name, style="bold")
            for note in found.notes:
                console.print(f"  {note}", markup=False)
            for target in found.targets:
                value = "not measured" if target.value is None else f"{target.value:.3g}"
                word = "at least" if target.least else "at most"
                mark = "[green]met    [/green]" if target.met else "[red]not met[/red]"
                console.print(f"  {mark}  {value:>12}, {word} {target.limit:<5.3g} {escape(target.what)}")
            for gain in found.gains:
                console.print(f"  {gain.gain:.2f}x  {gain.workload}")
            targets += found.targets
    except KeyboardInterrupt:
        console.print(f"interrupted: what was measured is in {out}" if begun else "interrupted")
        raise
    console.print(f"{sum(target.met for target in targets)} of {len(targets)} targets met; written to {out}")
    return int(not all(target.met for target in targets))


@contextmanager
def _enough_memory(what: str, case: Case, mend: str) -> Iterator[None]:
    """Say what does not fit, and how large it is, before the system ends the process for it, or when torch says so."""
    size, room = case.tensor_bytes, memory_bytes(case.device)
    try:
        if 4 * size > room:  # the input, the output, and the gradient of each
            raise MemoryError
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        refused = re.search(r"allocate (\d+) bytes", str(error))
        size = int(refused[1]) if refused else size
        raise NormzooError(
            f"{what} does not fit into memory: it needs several tensors of {size:,} bytes ({size / 2**30:,.1f} GiB), "
            f"and there are {room / 2**30:,.1f} GiB; {mend}"
        ) from error


def _need_folder(path: Path | None, option: str) -> None:
    """Find out before measuring that nothing can be written."""
    if path is not None and not path.parent.is_dir():
        raise NormzooError(
            f"there is no folder {path.parent} for {path.name}; make it, or choose another with {option}"
        )


def _exit_code(found: Sequence[Row | Errors]) -> int:
    """1 when none of the norms could be measured, whatever became of what they are compared with."""
    return int(not any(each.contender.startswith(OURS) and not each.reason for each in found))


def _rivals(against: Sequence[str] | None, compiled: bool) -> list[str]:
    for name in against or ():
        if name not in alternatives():
            raise unknown("alternative", name, alternatives())
    chosen = list(against) if against else [name for name in alternatives() if name not in ("cpu", "triton", "compile")]
    return [*chosen, "compile"] if compiled and "compile" not in chosen else chosen


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no width; rows stay rows
    return console


def _begin(device: str, effort: Effort, rivals: Sequence[str]) -> Console:
    """Keep pages, and print on what this is measured, and how."""
    if device != "cuda":
        memory.start()
        kernels.load()  # whatever there is to build is built now
    console = _console()
    facts = machine(device, effort.threads)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for name, serves in choices():
        console.print(f"  {name}: {serves}")
    if "compile" not in rivals:
        console.print("torch.compile is left out, as compiling takes up to half a minute each; --compile includes it")
    return console


def print_rows(console: Console, title: str, rows: Sequence[Row]) -> None:
    """A case as a table: a line for each contender, with its directions side by side."""
    directions = [one for one in DIRECTIONS if any(row.direction == one and not row.reason for row in rows)]
    last = directions[-1] if directions else "both"
    console.print(title, style="bold")
    table = Table(box=None, pad_edge=False)
    table.add_column("norm")
    table.add_column("computed by")
    for one in directions:
        table.add_column(f"{one} ms", justify="right")
    base = next((row.contender for row in rows if row.floors == 1.0), FLOOR)
    moved = any(row.gb_per_s for row in rows)  # of a recurrent layer nobody says how much it must move
    columns = ("quartiles", *(["GB/s"] * moved), f"x {base}", "x best other", *(["saved MiB"] * moved))
    for column in (*columns, "rounds x calls"):
        table.add_column(column, justify="right")
    for norm, contender in dict.fromkeys((row.norm, row.contender) for row in rows):
        own = {row.direction: row for row in rows if (row.norm, row.contender) == (norm, contender)}
        row = own.get(last)
        if row is None or row.seconds is None:
            table.add_row(norm, contender, "–")
            continue
        times = [f"{(own[one].seconds or 0) * 1e3:.4g}" for one in directions]
        spread = f"{(row.low or 0) * 1e3:.3g}–{(row.high or 0) * 1e3:.3g}"
        table.add_row(
            norm,
            f"{contender} ({row.way})" if row.way and contender == OURS else contender,
            *times,
            spread,
            *([_number(row.gb_per_s, ".1f")] * moved),
            _number(row.floors, ".2f"),
            _number(row.to_best, ".2f"),
            *(["" if row.saved_bytes is None else f"{row.saved_bytes / 2**20:.1f}"] * moved),
            f"{row.rounds} x {row.calls}",
        )
    console.print(table)
    _print_reasons(console, rows)


def print_errors(console: Console, case: Case, found: Sequence[Errors]) -> None:
    """Relative errors as a table."""
    title = f"{case}: relative errors against the formula in float64"
    header = ("norm", "computed by", "output", "input gradient", "weight gradient", "bias gradient")
    console.print(title, style="bold")
    table = Table(*header, box=None, pad_edge=False)
    for errors in found:
        values = (errors.output, errors.input, errors.weight, errors.bias)
        table.add_row(errors.norm, errors.contender, *(_number(value, ".2e") for value in values))
    console.print(table)
    _print_reasons(console, found)


def _print_reasons(console: Console, found: Sequence[Row] | Sequence[Errors]) -> None:
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in found:
        if each.reason:
            reasons.setdefault((each.norm, each.reason), []).append(each.contender)
    for (norm, reason), contenders in reasons.items():
        console.print(f"– {norm} by {', '.join(contenders)}: {reason}", markup=False)
    console.print()


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _write(rows: Sequence[Row], csv: Path | None, plot: Path | None, console: Console) -> None:
    if csv is not None:
        try:
            csv.write_text(as_csv(rows), encoding="utf-8")
        except OSError as error:
            raise NormzooError(f"cannot write {csv}: {error.strerror}") from error
        console.print(f"rows: {csv}")
    if plot is not None:
        from normzoo.bench.plot import roofline

        roofline(rows, plot)
        console.print(f"plot: {plot}")
