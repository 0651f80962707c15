"""The fixed list of measurements behind every claim of speed, and what each has to show."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import normzoo
from normzoo.bench.accuracy import Errors, measure_accuracy
from normzoo.bench.case import Case
from normzoo.bench.contenders import COMPILED, FORMULA, OURS, PACKAGES, TORCH
from normzoo.bench.machine import choices, machine
from normzoo.bench.measure import Subject, measure_case
from normzoo.bench.pages import Gain, measure_pages
from normzoo.bench.recurrent import Recurrent, measure_recurrent
from normzoo.bench.result import FLOOR, Row, as_csv
from normzoo.bench.timing import Effort
from normzoo.errors import NormzooError

IMAGES = (64, 64, 32, 32)
MAPS = (32, 256, 7, 7)
TOKENS = (32, 512, 512)
ROWS = (16384, 512)
SMALL = (64, 256)
MANY_ROWS = (65536, 256)

GROUP = "group_norm(groups=8)"
HALO = "normzoo.bench.example:HaloNorm(groups=8)"
NORMS = ("batch_norm", GROUP, "instance_norm", "layer_norm", "layer_norm_joint", "rms_norm", HALO)
RELATIVES = ("batch_renorm", "ghost_batch_norm", "switchable_norm", "filter_response_norm")
_HALO = "HaloNorm(groups=8)"

NOT_SLOWER = 1 / 0.95

PASSES = 3
"""How often the suite is measured from beginning to end; a figure is the median over the passes."""


@dataclass
class Target:
    """Something that must be shown.

    Attributes:
        what: in words.
        value: what was measured; ``None`` where it could not be.
        limit: what it may be at most, or must be at least.
        least: whether the limit is the least that will do.
    """

    what: str
    value: float | None
    limit: float
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether it is shown."""
        return self.value is not None and (self.value >= self.limit if self.least else self.value <= self.limit)


@dataclass
class Found:
    """What a section of the suite found."""

    rows: list[Row] = field(default_factory=list)
    errors: list[Errors] = field(default_factory=list)
    gains: list[Gain] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, norm: str, contender: str = OURS, direction: str = "both") -> Row | None:
        """The row of a contender that was timed."""
        wanted = (norm, contender, direction)
        return next((r for r in self.rows if (r.norm, r.contender, r.direction) == wanted and r.seconds), None)

    def times(self, slow: Row | None, fast: Row | None) -> float | None:
        """How many times the one's time the other takes, by their multiples of the same floor."""
        if slow is None or fast is None:
            return None
        if slow.floors is None or fast.floors is None:
            return None
        return slow.floors / fast.floors


@dataclass(frozen=True)
class Section:
    """A part of the suite.

    Attributes:
        name: its title.
        measure: fills everything but the targets.
        judge: the targets, by what was measured.
        once: whether one pass is enough.
    """

    name: str
    measure: Callable[[Effort], Found]
    judge: Callable[[Found], list[Target]]
    once: bool = False


def sections(device: str = "cpu", compiled: bool = False) -> list[Section]:
    """The suite for a CPU or for a GPU."""
    against = [FORMULA, TORCH, *(["compile"] if compiled else []), *(PACKAGES if device == "cuda" else ())]
    found = []
    if device == "cuda":
        shapes = [
            ((64, 256, 32, 32), "channels-first"),
            ((64, 256, 32, 32), "channels-last"),
            ((16, 4096, 1024), "tokens"),
            ((16384, 4096), "tokens"),
        ]
    else:
        shapes = [(IMAGES, "channels-first"), (IMAGES, "channels-last"), (TOKENS, "tokens"), (ROWS, "tokens")]
    for shape, layout in shapes:
        for dtype in ("float32", "bfloat16"):
            case = Case(shape, layout, dtype, device)
            judge = _on_gpu if device == "cuda" else _standard
            found.append(Section(str(case), partial(_rows, case, NORMS, against), partial(judge, case)))
    if device == "cuda":
        return found
    for layout in ("channels-first", "channels-last"):
        case = Case(MAPS, layout)
        found.append(Section(str(case), partial(_rows, case, NORMS, against), _beside))
    for shape, layout in shapes[:3]:
        case = Case(shape, layout)
        found.append(Section(f"relatives of batch norm, {case}", partial(_relatives, case), _like_batch_norm))
    small = Case(SMALL, "tokens")
    norms = [norm for norm in NORMS if norm != "instance_norm"]
    found.append(Section(f"small calls, {small}", partial(_rows, small, norms, against), _small))
    many = Case(MANY_ROWS, "tokens", "bfloat16")
    found.append(Section(f"gradients against float64, {many}", partial(_gradients, many), _exact, once=True))
    for model in ("lstm", "gru"):
        for steps in (64, 256):
            recurrent = Recurrent(model, steps)
            name = f"{model} of {steps} steps, norms inside"
            found.append(Section(name, partial(_recurrent, recurrent), partial(_beside_plain, recurrent)))
    found.append(Section("keeping pages", _pages, lambda _: [], once=True))
    found.append(Section("a training step of the tasks", _training_step, _beside_bare, once=True))
    return found


def _rows(case: Case, norms: Sequence[str], against: Sequence[str], effort: Effort) -> Found:
    return Found(measure_case(case, [Subject(norm) for norm in norms], against, effort=effort))


def _beside(found: Found) -> list[Target]:
    targets = []
    for norm in (*NORMS[:-1], _HALO):
        ours, rivals = found.row(norm), [found.row(norm, name) for name in (TORCH, *COMPILED)]
        best = min((r for r in rivals if r is not None), key=lambda r: r.floors or 0, default=None)
        if ours is not None and best is not None:
            targets.append(Target(f"{norm}: time over {best.contender}'s", found.times(ours, best), NOT_SLOWER))
    return targets


def _standard(case: Case, found: Found) -> list[Target]:
    limit = 1.6 if case.dtype == "float32" else 2.0
    targets = _beside(found)
    for norm in (*NORMS[:-1], _HALO):
        if (ours := found.row(norm)) is not None:  # one value per statistic is refused, as the rows say
            targets.append(Target(f"{norm}: multiple of the floor", ours.floors, 2.0 if norm == _HALO else limit))
    at_least = {
        (TOKENS, "tokens", "float32"): ("rms_norm", 5.0),
        (TOKENS, "tokens", "bfloat16"): ("rms_norm", 10.0),
        (IMAGES, "channels-last", "float32"): ("instance_norm", 3.0),
        (IMAGES, "channels-first", "float32"): ("batch_norm", 2.0),
        (IMAGES, "channels-last", "bfloat16"): (GROUP, 4.0),
        (ROWS, "tokens", "float32"): (GROUP, 6.0),
    }
    if (case.shape, case.layout, case.dtype) in at_least:
        norm, factor = at_least[case.shape, case.layout, case.dtype]
        faster = found.times(found.row(norm, TORCH), found.row(norm))
        targets.append(Target(f"{norm}: times as fast as torch.nn", faster, factor, least=True))
    return targets


def _on_gpu(case: Case, found: Found) -> list[Target]:
    targets = []
    copy = found.row("", FLOOR, "forward")
    for norm in (*NORMS[:-1], _HALO):
        if found.row(norm) is None:
            continue
        for direction, share in (("forward", 0.85), ("backward", 0.75)):
            row = found.row(norm, direction=direction)
            reached = row.gb_per_s / copy.gb_per_s if row and copy and row.gb_per_s and copy.gb_per_s else None
            targets.append(Target(f"{norm}: {direction}, share of the copy bandwidth", reached, share, least=True))
        if case.layout == "channels-last" and norm in ("batch_norm", GROUP, "instance_norm"):
            faster = found.times(found.row(norm, TORCH), found.row(norm))
            targets.append(Target(f"{norm}: times as fast as torch.nn", faster, 3.0, least=True))
        for package in PACKAGES:
            if (theirs := found.row(norm, package)) is not None:
                targets.append(Target(f"{norm}: time over {package}'s", found.times(found.row(norm), theirs), 1.05))
    return targets


def _relatives(case: Case, effort: Effort) -> Found:
    subjects = [Subject("batch_norm"), Subject("batch_norm", masked=True), *map(Subject, RELATIVES)]
    return Found(measure_case(case, subjects, (), effort=effort))


def _like_batch_norm(found: Found) -> list[Target]:
    ours = found.row("batch_norm")
    return [
        Target(f"{norm}: time over our batch norm's", found.times(found.row(norm), ours), 1.5)
        for norm in ("batch_norm masked", *RELATIVES)
    ]


def _small(found: Found) -> list[Target]:
    native = found.row("layer_norm", TORCH)
    return [
        Target(f"{norm}: time over torch.nn.LayerNorm's", found.times(found.row(norm), native), 1.1)
        for norm in (*NORMS[:-1], _HALO)
        if norm != "instance_norm"
    ]


def _gradients(case: Case, effort: Effort) -> Found:
    norms = ("batch_norm", GROUP, "layer_norm", "rms_norm", HALO)
    return Found(errors=measure_accuracy(case, [Subject(norm) for norm in norms]))


def _exact(found: Found) -> list[Target]:
    targets = []
    for errors in found.errors:
        if errors.contender == OURS:
            worst = max((e for e in (errors.weight, errors.bias) if e is not None), default=None)
            targets.append(Target(f"{errors.norm}: relative error of the parameter gradients", worst, 0.005))
    return targets


INSIDE = ("layer_norm", "batch_norm", "rms_norm")


def _recurrent(recurrent: Recurrent, effort: Effort) -> Found:
    return Found(measure_recurrent(recurrent, INSIDE, effort=effort))


def _beside_plain(recurrent: Recurrent, found: Found) -> list[Target]:
    targets = []
    for norm in INSIDE:
        row = found.row(norm)
        what = f"{norm} inside: time over torch.nn.{recurrent.model.upper()}'s without any"
        targets.append(Target(what, None if row is None else row.floors, 1.15))
    return targets


def _pages(effort: Effort) -> Found:
    return Found(gains=measure_pages())


def _training_step(effort: Effort) -> Found:
    """Our own training loop needs Lightning, which a measurement of norms does not: a script of its own runs it."""
    script = Path(normzoo.__file__).parents[1] / "experiments" / "overhead.py"
    if not script.is_file():
        return Found(notes=[f"left out: {script.name} comes with the repository alone"])
    done = subprocess.run(
        [sys.executable, str(script), "--json"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NormzooError(f"{script} failed:\n{done.stderr.strip()}")
    return Found(steps=json.loads(done.stdout))


def _beside_bare(found: Found) -> list[Target]:
    return [
        Target(f"{step['task']}: time of a step over a bare loop's", step["ratio"], 1.15) for step in found.steps[:1]
    ]


# ---- running it ------------------------------------------------------------------------------------------------------


def run_suite(
    out: Path,
    parts: Sequence[Section],
    effort: Effort,
    *,
    passes: int = PASSES,
    device: str = "cpu",
    compiled: bool = False,
) -> Iterator[tuple[Section, Found, int]]:
    """Measure section after section, pass after pass, each written to ``out`` before the next begins.

    A machine that others use too is slow in one minute and fast in the next, and so are the places where tensors come
    to lie: the passes are minutes apart, and what counts is the median over them.

    Args:
        out: a JSON file; rows go beside it as ``.csv``, the page's tables as ``.inc``.
        parts: the sections.
        effort: how long each, over all passes.
        passes: how often.
        device: for the record.
        compiled: for the record.

    Yields:
        Each section, what its passes found so far, and the number of the pass, from 1 on.

    Raises:
        NormzooError: when the files cannot be written.
    """
    kept: dict[str, list[Found]] = {part.name: [] for part in parts}
    facts = machine(device, effort.threads)
    command = "normzoo bench --suite" + " --compile" * compiled + (" --device cuda" if device == "cuda" else "")
    each = replace(effort, seconds=effort.seconds / passes)
    found: dict[str, Found] = {}
    for number in range(1, passes + 1):
        for part in parts:
            if number == 1 or not part.once:
                kept[part.name].append(part.measure(effort if part.once else each))
                found[part.name] = middle(kept[part.name])
                found[part.name].targets = part.judge(found[part.name])
            _write(out, command, facts, found, complete=number == passes and part is parts[-1])
            yield part, found[part.name], number


def middle(passes: Sequence[Found]) -> Found:
    """What several passes over a section found: every number of a row is the median over them."""
    rows: dict[tuple[str, str, str], list[Row]] = {}
    for found in passes:
        for row in found.rows:
            rows.setdefault((row.norm, row.contender, row.direction), []).append(row)
    return replace(passes[0], rows=[_middle_row(same) for same in rows.values()])


def _middle_row(same: Sequence[Row]) -> Row:
    timed = [row for row in same if row.seconds is not None] or same
    numbers = {}
    for name in ("seconds", "low", "high", "gb_per_s", "floors", "to_best"):
        values = [value for row in timed if (value := getattr(row, name)) is not None]
        numbers[name] = statistics.median(values) if values else None
    return replace(timed[0], **numbers, rounds=sum(row.rounds for row in timed))


def _write(out: Path, command: str, facts: Mapping[str, str], kept: Mapping[str, Found], complete: bool) -> None:
    record = {
        "command": command,
        "complete": complete,
        "machine": dict(facts),
        "choices": [list(choice) for choice in choices()],
        "sections": {name: _as_dict(found) for name, found in kept.items()},
    }
    rows = [row for found in kept.values() for row in found.rows]
    texts = {
        out: json.dumps(record) + "\n",
        out.with_suffix(".csv"): as_csv(rows),
        out.with_suffix(".inc"): page(record),
    }
    try:
        for path, text in texts.items():
            half = path.with_name(f".{path.name}.tmp")
            half.write_text(text, encoding="utf-8")
            half.replace(path)
    except OSError as error:
        raise NormzooError(f"cannot write {out}: {error.strerror}; choose another file with --out") from error


def _as_dict(found: Found) -> dict:
    values = {name: [asdict(each) for each in getattr(found, name)] for name in ("rows", "errors", "gains")}
    values["targets"] = [asdict(target) | {"met": target.met} for target in found.targets]
    return {name: value for name, value in {**values, "steps": found.steps, "notes": found.notes}.items() if value}


# ---- the page --------------------------------------------------------------------------------------------------------


def page(record: Mapping) -> str:
    """The tables of a record, as Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in record["machine"].items())
    targets = [target for section in record["sections"].values() for target in section.get("targets", ())]
    met = sum(target["met"] for target in targets)
    parts = [f"`{record['command']}`: {facts}."]
    if not record["complete"]:
        parts.append("Interrupted: sections or passes are missing.")
    parts.append(f"{met} of {len(targets)} targets are met.")
    for name, section in record["sections"].items():
        parts.append(f"### {name}")
        parts += section.get("notes", ())
        if "rows" in section:
            parts.append(_times(section["rows"]))
        if "errors" in section:
            parts.append(_errors(section["errors"]))
        if "gains" in section:
            header = ["", "default, ms", "kept, ms", "gain"]
            cells = [[g["workload"], _ms(g["default"]), _ms(g["kept"]), f"{g['gain']:.2f}x"] for g in section["gains"]]
            parts.append(markdown(header, cells))
        if "steps" in section:
            header = ["", "bare loop, ms", "task, ms", "ratio"]
            cells = [[s["task"], _ms(s["bare"]), _ms(s["ours"]), f"{s['ratio']:.2f}"] for s in section["steps"]]
            parts.append(markdown(header, cells))
        if "targets" in section:
            parts.append(_targets(section["targets"]))
    return "\n\n".join(parts) + "\n"


def _times(rows: Sequence[Mapping]) -> str:
    """Forward and backward together, a line for each norm and a column for each contender."""
    timed = {(row["norm"], row["contender"]): row for row in rows if row["direction"] == "both"}
    base = timed.pop(("", FLOOR), None)
    if base is None:
        base = timed.pop(next(iter(timed)))
    columns = list(dict.fromkeys(contender for _, contender in timed))
    cells = []
    for norm in dict.fromkeys(norm for norm, _ in timed):
        line = [norm]
        for contender in columns:
            row = timed.get((norm, contender))
            if row is None or row["reason"]:
                line.append("–" if row is None else "refused")
            else:
                line.append(f"{row['floors']:.2f}x ({_ms(row['seconds'])} ms)")
        saved = timed[norm, columns[0]]["saved_bytes"]
        cells.append([*line, "" if saved is None else f"{saved / 2**20:.1f}"])
    said = f"Forward and backward, multiples of {base['contender']}, {_ms(base['seconds'])} ms."
    return f"{said}\n\n{markdown(['', *columns, 'saved, MiB'], cells)}"


def _errors(errors: Sequence[Mapping]) -> str:
    names = ("output", "input", "weight", "bias")
    cells = [
        [e["norm"], e["contender"], *("" if e[name] is None else f"{e[name]:.2%}" for name in names)] for e in errors
    ]
    header = ["", "", "output", "gradient of the input", "of the gain", "of the shift"]
    return f"Relative errors.\n\n{markdown(header, cells)}"


def _targets(targets: Sequence[Mapping]) -> str:
    cells = []
    for target in targets:
        value = "not measured" if target["value"] is None else f"{target['value']:.3g}"
        limit = f"{'at least' if target['least'] else 'at most'} {target['limit']:.3g}"
        cells.append([target["what"], value, limit, "met" if target["met"] else "**not met**"])
    return markdown(["target", "measured", "asked", ""], cells)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
