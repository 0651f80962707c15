"""The command line: each verb is a call into the part that does the work, imported when it is called."""

from __future__ import annotations

import ast
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from cyclopts import App, CycloptsError, Parameter

from normzoo import __version__
from normzoo.errors import NormzooError

if TYPE_CHECKING:
    from normzoo.layers.base import Traits
    from normzoo.registry import NormInfo
    from normzoo.study import Study

app = App(
    name="normzoo",
    help="Interchangeable normalization layers, and fair comparisons between them.",
    version=__version__,
    help_flags=["--help", "-h"],
)

Many = Annotated[list[str] | None, Parameter(consume_multiple=True, negative=())]


@app.command(name="list")
def list_(
    pattern: str = "*", *, family: str | None = None, trait: Many = None, year: int | None = None, contrib: bool = True
) -> None:
    """List the registered norms.

    Parameters
    ----------
    pattern:
        A wildcard, as in '*batch*'.
    family:
        Only this family, as 'batch' or 'rms'.
    trait:
        Only norms with these traits, as 'causal not-stateful'.
    year:
        Only norms published in this year.
    contrib:
        Include norms that pass the checks but reproduce no number of their paper.
    """
    from rich.console import Console
    from rich.table import Table

    from normzoo.errors import unknown
    from normzoo.registry import info, list_norms

    rows = [info(name) for name in list_norms(pattern)]
    if family is not None:
        if family not in (families := {row.family for row in rows}):
            raise unknown("family", family, families)
        rows = [row for row in rows if row.family == family]
    for wanted in trait or ():
        rows = [row for row in rows if _has(row.traits, wanted)]
    rows = [row for row in rows if (contrib or not row.contrib) and year in (None, row.paper and row.paper.year)]
    if not rows:
        raise NormzooError("no norm matches; `normzoo list` shows all")
    columns = ("name", "family", "year", "moments", "training statistics", "causal", "params/channel", "paper")
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(
            row.name,
            row.family,
            str(row.paper.year) if row.paper else "",
            row.pattern or "",
            _statistics(row.traits),
            "" if row.traits is None else "yes" if row.traits.causal else "no",
            "" if row.parameters_per_channel is None else str(row.parameters_per_channel),
            row.paper.authors if row.paper else "",
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a pipe has no width; rows stay rows
    console.print(table)


def _has(traits: Traits | None, wanted: str) -> bool:
    from dataclasses import asdict, fields

    from normzoo.errors import unknown
    from normzoo.layers.base import Traits

    name = wanted.removeprefix("not-").replace("-", "_")
    if name not in (known := [field.name for field in fields(Traits)]):
        raise unknown("trait", name, known)
    return traits is not None and asdict(traits)[name] is not wanted.startswith("not-")


def _statistics(traits: Traits | None) -> str:
    if traits is None:
        return ""
    return "batch, running" if traits.stateful else "batch" if traits.batch_dependent else "sample"


@app.command
def show(name: str) -> None:
    """Show one norm: formula, the axes that share a statistic, traits, options, paper, source file.

    Parameters
    ----------
    name:
        A registered name, 'module:Name' or 'path/file.py:Name'.
    """
    from normzoo.registry import info

    print(describe(info(name)))


def describe(info: NormInfo) -> str:
    """All that is known of a norm, as text."""
    import dataclasses
    import textwrap

    from normzoo.ops.pattern import Pattern
    from normzoo.ops.picture import draw

    aliases = f" ({', '.join(info.aliases)})" if info.aliases else ""
    parts = [f"{info.name}{aliases}\n{info.summary}"]
    if info.formula:
        parts.append(textwrap.indent(info.formula, "    "))
    if info.pattern is not None:
        picture = draw(Pattern.parse(info.pattern))
        parts.append(f"moments: {info.pattern}\nelements with the same letter share a statistic:\n\n{picture}")
    if info.traits is not None:
        traits = dataclasses.asdict(info.traits)
        width = max(map(len, traits))
        parts.append("traits\n" + "\n".join(f"  {key:<{width}}  {'yes' if on else 'no'}" for key, on in traits.items()))
    options = ", ".join(f"{key}={value!r}" for key, value in info.options.items())
    parts.append(f"options: {options}")
    if info.parameters_per_channel is not None:
        parts.append(f"cost: {info.parameters_per_channel} parameters per channel")
    if info.paper is not None:
        parts.append(f"paper: {info.paper}")
    if info.source:
        parts.append(f"source: {info.source}")
    return "\n\n".join(parts)


@app.command
def check(
    norm: str,
    *,
    only: Annotated[str | None, Parameter(name=["-k", "--only"])] = None,
    fail_fast: Annotated[bool, Parameter(name=["-x", "--fail-fast"], negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Check that a norm is right: shapes, precision, masks, state, invariances, compilation and more.

    Parameters
    ----------
    norm:
        A registered name, with options if need be, 'module:Name' or 'path/file.py:Name'.
    only:
        Checks whose name or group matches, as in 'half or mask'.
    fail_fast:
        Stop at the first failure.
    json:
        Print the results as JSON.
    """
    from normzoo.checks import run_check_command

    return run_check_command(norm, only, fail_fast, json)


@app.command
def bench(
    norms: list[str] | None = None,
    /,
    *,
    shape: Many = None,
    layout: Many = None,
    dtype: Many = None,
    device: str = "cpu",
    direction: str = "both",
    parameters: str = "",
    masked: Annotated[bool, Parameter(negative=())] = False,
    against: Many = None,
    compile_: Annotated[bool, Parameter(name="--compile", negative=())] = False,
    accuracy: Annotated[bool, Parameter(negative=())] = False,
    model: str | None = None,
    steps: int = 64,
    batch: int = 64,
    hidden: int = 128,
    threads: int = 1,
    rounds: int | None = None,
    seconds: float = 3.0,
    csv: Path | None = None,
    plot: Path | None = None,
    pages: Annotated[bool, Parameter(negative=())] = False,
    suite: Annotated[bool, Parameter(negative=())] = False,
    out: Path | None = None,
) -> int:
    """Measure how fast norms are, beside torch's own layers, the plain formula and a mere copy of the tensor.

    Everything runs interleaved in one process, round after round. On a CPU with one thread the time is CPU time, which
    other processes disturb least. A backward pass is timed right after its forward pass, as in training, and includes
    freeing what was saved. GB/s count what must be moved: 2 tensors forward, 3 backward, 5 both. The floor moves just
    that, into buffers that are kept. Ratios are medians over the rounds, of each round's ratio; 'x best other' is the
    time over that of the fastest other contender of the same norm, where ours do not count against each other.

    Parameters
    ----------
    norms:
        Names, with options if need be, 'module:Name' or 'path/file.py:Name'.
    shape:
        One or several, as '64,64,32,32'.
    layout:
        'channels-first' for (N, C, *S), 'channels-last' for the same in torch's memory format, 'tokens' for (N, *S, C).
    dtype:
        'float32', 'bfloat16', 'float16' or 'float64'; several for a table each.
    device:
        'cpu' or 'cuda'.
    direction:
        'forward', 'backward' or 'both', which shows all three.
    parameters:
        The dtype of gains and shifts; that of the input when left out.
    masked:
        Give our norms a mask that leaves about 70 % of the positions.
    against:
        What to compare with: 'torch.nn', 'formula', 'compile', 'liger', 'quack', or a backend of ours.
    compile_:
        Compare with torch.compile of torch's layer and of the formula too; each takes up to half a minute.
    accuracy:
        Show the errors against float64 in place of times.
    model:
        'lstm', 'gru' or 'rnn_tanh': measure a recurrent layer with the norms inside, against torch's without any.
    steps:
        Length of its sequences.
    batch:
        Number of its sequences.
    hidden:
        Number of its units, and of the features that come in.
    threads:
        Threads of torch; with more than one it is the clock on the wall that counts.
    rounds:
        How many; as many as fit into --seconds when left out.
    seconds:
        How long to measure each case, once everything is warm.
    csv:
        Write every row to this file.
    plot:
        Draw the achieved bandwidths under the machine's own into this file.
    pages:
        Show what it gains that a process keeps the memory of freed tensors.
    suite:
        Run the fixed list of cases behind the documentation, and write it to --out, whose neighbours are a CSV file
        and the tables of the page.
    out:
        The suite's JSON file, speed.json when left out.
    """
    from normzoo.bench import Effort, Recurrent, command

    if min(threads, steps, batch, hidden, 1 if rounds is None else rounds) < 1 or not seconds > 0:
        raise NormzooError("--threads, --rounds, --seconds, --steps, --batch and --hidden must be positive")
    effort = Effort(threads, rounds, seconds)
    if (suite or pages) and norms:
        raise NormzooError(f"{'--suite' if suite else '--pages'} measures a fixed list; leave {norms[0]!r} out")
    if suite:
        return command.run_suite_command(device, compile_, effort, out or Path("speed.json"))
    if out is not None:
        raise NormzooError(f"--out {out} goes with --suite alone; --csv writes the rows of other measurements")
    if pages:
        return command.run_pages_command(rounds)
    if not norms:
        raise NormzooError("nothing to measure; name norms, `normzoo bench layer_norm rms_norm`, or give --suite")
    if model is not None:
        others = {"--shape": shape, "--layout": layout, "--parameters": parameters, "--masked": masked}
        others |= {"--against": against, "--compile": compile_, "--accuracy": accuracy, "--plot": plot}
        if given := [option for option, value in others.items() if value]:
            raise NormzooError(
                f"{given[0]} does not go with --model, which has --steps, --batch, --hidden and --dtype "
                "and is compared with torch's own layer"
            )
        recurrent = [Recurrent(model, steps, batch, hidden, each, device) for each in dtype or ["float32"]]
        return command.run_recurrent_command(recurrent, norms, direction, effort, csv)
    return command.run_bench_command(
        norms,
        shapes=shape or [],
        layouts=layout or ["channels-first"],
        dtypes=dtype or ["float32"],
        device=device,
        direction=direction,
        parameters=parameters,
        masked=masked,
        against=against,
        compiled=compile_,
        effort=effort,
        accuracy=accuracy,
        csv=csv,
        plot=plot,
    )


kernels = App(name="kernels", help="The compiled CPU kernels: build them, or see how they stand.")
app.command(kernels)


@kernels.command(name="build")
def build_kernels() -> None:
    """Compile the CPU kernels for this machine, which their first use does otherwise."""
    from normzoo.ops import kernels

    print(kernels.build())


@kernels.command(name="status")
def kernels_status() -> None:
    """Say whether the CPU kernels are built for this machine, and if not, why."""
    from normzoo.ops import kernels

    status = kernels.status()
    print(f"{status.state}: {status.reason}\nlibrary: {status.path}\ncompiler: {status.compiler or 'none'}")


@app.command
def run(
    study: Path | None = None,
    *,
    norms: Many = None,
    models: Many = None,
    data: str = "digits",
    seeds: int | None = None,
    set_: Annotated[list[str] | None, Parameter(name="--set", consume_multiple=True, negative=())] = None,
    baseline: str | None = None,
    name: str | None = None,
    out: Path = Path("runs"),
    workers: int | None = None,
    retry_failed: Annotated[bool, Parameter(negative=())] = False,
    in_process: Annotated[bool, Parameter(negative=())] = False,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    wandb: bool = True,
) -> int:
    """Run a study, print the comparison and write its report. Interrupted, the same command goes on.

    Parameters
    ----------
    study:
        A Python file that defines `study = normzoo.Study(...)`. Without one, --norms and --models make a study.
    norms:
        Norms to compare: names, 'group_norm(groups=8)', 'my_file.py:MyNorm'.
    models:
        Models to train, as 'cnn rnn transformer'.
    data:
        What the models are trained on.
    seeds:
        Number of paired seeds (3 when left out).
    set_:
        Settings that differ from the task's defaults, as 'epochs=2 lr=0.01'.
    baseline:
        The norm that the others are compared with.
    name:
        Name of the study made from --norms and --models.
    out:
        Folder of all studies.
    workers:
        Trainings at once; as many as there are processors when left out.
    retry_failed:
        Train the cells again that have failed before.
    in_process:
        One training after the other in this process, for a debugger.
    dry_run:
        Show what would be trained and which models cannot be built, and stop.
    wandb:
        Mirror the runs to Weights & Biases: online when you are logged in, offline otherwise.
    """
    from normzoo.study import load_study_file, runner

    made = {
        "--norms": norms,
        "--models": models,
        "--seeds": seeds,
        "--set": set_,
        "--baseline": baseline,
        "--name": name,
    }
    if not (dry_run or in_process):
        runner.warm_up()  # Lightning loads while the study is read
    if study is not None:
        if given := [option for option, value in made.items() if value is not None]:
            raise NormzooError(
                f"{given[0]} goes with --norms and --models alone; a study file says these things itself"
            )
        plan = load_study_file(study)
    else:
        plan = _study_of(norms, models, data, seeds, set_, baseline, name)
    if dry_run:
        return _dry_run(plan)
    return _run(plan, out, workers, retry_failed, in_process, wandb)


def _dry_run(plan: Study) -> int:
    from normzoo.study.spec import foresee

    cells = plan.cells()
    outlook = foresee(cells)
    outlook.check()
    for cell in cells:
        print(f"{cell.id}  {cell.label}")
    if outlook.failing:
        print(f"normzoo: {outlook}", file=sys.stderr)
    return int(outlook.failing > 0)


def _study_of(
    norms: list[str] | None,
    models: list[str] | None,
    data: str,
    seeds: int | None,
    overrides: list[str] | None,
    baseline: str | None,
    name: str | None,
) -> Study:
    from normzoo.study import Study

    if not norms or not models:
        raise NormzooError(
            "nothing to run; give a study file, `normzoo run experiments/quickstart.py`, or norms and models, "
            "`normzoo run --norms batch_norm layer_norm --models cnn rnn --seeds 3`"
        )
    return Study(
        name=name or "command-line",
        norms=norms,
        tasks=[f"{data}/{model}" for model in models],
        settings=[dict(_assignment(text) for text in overrides or ())],
        seeds=range(3 if seeds is None else seeds),
        baseline=baseline,
    )


def _assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise NormzooError(f"--set {text!r}; expected setting=value, as in --set epochs=2 lr=0.01")
    try:
        return key.strip(), ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key.strip(), value


def _run(plan: Study, out: Path, workers: int | None, retry_failed: bool, in_process: bool, wandb: bool) -> int:
    from normzoo.report import make_report, print_table
    from normzoo.study import load_results, run_study

    summary = run_study(plan, out, workers=workers, retry_failed=retry_failed, in_process=in_process, track=wandb)
    if summary.signal is not None:
        program = "normzoo" if shutil.which("normzoo") else sys.argv[0]
        print(f"  {shlex.join([program, *sys.argv[1:]])}")
        return summary.exit_code
    if load_results(summary.directory):
        print()
        print_table(summary.directory)
        print(f"\nreport: {make_report(summary.directory)}")
    return summary.exit_code


@app.command
def report(directory: Path) -> None:
    """Print the comparison of a study's results and write its report.

    Parameters
    ----------
    directory:
        The study's folder, as 'runs/quickstart'.
    """
    from normzoo.report import make_report, print_table

    print_table(directory)
    print(f"\nreport: {make_report(directory)}")


@app.command
def status(directory: Path) -> None:
    """Count a study's cells: done, diverged, failed, unfinished; name those that failed, and why.

    Parameters
    ----------
    directory:
        The study's folder, as 'runs/quickstart'.
    """
    from normzoo.study import store

    counts = store.overview(directory)
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    for row in store.load_results(directory):
        if row["status"] != "done":
            error = row.get("error") or {}
            message = str(error.get("message", "")).strip().splitlines()
            print(f"{row['status']}: {row['task']} {row['label']} seed {row['seed']}: {message[-1] if message else ''}")


@app.command
def sync(directory: Path) -> int:
    """Mirror a study's results to Weights & Biases; repeating it makes no duplicates.

    Parameters
    ----------
    directory:
        The study's folder, as 'runs/quickstart'.
    """
    from normzoo.study import tracking

    mirrored = tracking.sync(directory)
    print(mirrored)
    return mirrored.exit_code


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point: 0 done, 1 something failed, 2 bad input, 3 something diverged, 130 interrupted."""
    try:
        result = app(arguments, exit_on_error=False, result_action="return_value")
    except CycloptsError:  # said by cyclopts, with what was probably meant
        sys.exit(2)
    except NormzooError as error:
        print(f"normzoo: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, `head` for instance, has had enough
        sys.stderr.close()
        sys.exit(0)
    sys.exit(result if isinstance(result, int) else 0)


if __name__ == "__main__":
    main()
