"""The command line: each verb is a call into the part that does the work, imported when it is called."""

from __future__ import annotations

import ast
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
        Show what would be trained, and stop.
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
        for cell in plan.cells():
            print(f"{cell.id}  {cell.label}")
        return 0
    return _run(plan, out, workers, retry_failed, in_process, wandb)


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
