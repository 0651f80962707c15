"""The kit on the command line."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap

from normzoo.checks.kit import CheckReport, check_norm

_MARKS = {"passed": ("✓", "+"), "failed": ("✗", "x"), "expected_failure": ("!", "!"), "not_applicable": ("–", "-")}


_TIE = "\0"  # where a line must not be broken


def run_check_command(
    spec: str, only: str | None = None, fail_fast: bool = False, as_json: bool = False, slow: bool = True
) -> int:
    """Check a norm and print what came of it.

    Args:
        spec: as for :func:`normzoo.create`.
        only: an expression over parts of names and groups of checks, as in ``"half or mask"``.
        fail_fast: stop at the first failure.
        as_json: print ``{"norm", "traits", "checks": [{"name", "status", "detail"}]}`` instead of text.
        slow: include the checks that compile, export and start processes.

    Returns:
        The exit code: 0 when nothing failed, 1 otherwise.

    Raises:
        NormzooError: for an unknown norm or an expression that selects no check.
    """
    report = check_norm(spec, only=only, fail_fast=fail_fast, slow=slow)
    print(json.dumps(report.as_dict(), indent=2, ensure_ascii=False) if as_json else render(report))
    return 0 if report.ok else 1


def render(report: CheckReport) -> str:
    """The report as text: the passed in a row, then what each failure is about and what to do."""
    plain = not _encodes("✓✗–·")
    mark = {status: marks[plain] for status, marks in _MARKS.items()}
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    lines = [str(report), ""]
    passed = "  ".join(f"{mark['passed']}{_TIE}{r.name}" for r in report if r.status == "passed")
    lines += ["  " + line.replace(_TIE, " ") for line in textwrap.wrap(passed, width - 4)]
    lines += ["", *_paragraphs("declared" if report.subject.traits else "inferred", _traits(report), width)]
    inferred = report.inferred
    shares = f"{_said(inferred.shares)} in training; {_said(inferred.shares_in_evaluation)} in evaluation"
    lines += _paragraphs("statistics over", shares, width)
    noticed = [f"{r.name}: {r.detail}" for r in report if r.status == "passed" and r.detail]
    for text in [*noticed, *inferred.untold]:
        lines += _paragraphs("noticed", text, width)
    reasons = dict.fromkeys(r.detail for r in report if r.status == "not_applicable")
    for reason in reasons:
        names = ", ".join(r.name for r in report if (r.status, r.detail) == ("not_applicable", reason))
        lines += _paragraphs(f"{mark['not_applicable']} {reason}", names, width)
    for result in report:
        if result.status == "expected_failure":
            lines += _paragraphs(f"{mark[result.status]} {result.name}", f"fails as expected: {result.detail}", width)
    for result in report.failed:
        lines += ["", *_paragraphs(f"{mark['failed']} {result.name}", result.detail, width)]
        lines += _paragraphs("", result.check.mend, width)
    text = "\n".join(lines)
    return text.replace("·", "-").encode("ascii", "replace").decode() if plain else text


def _paragraphs(head: str, text: str, width: int) -> list[str]:
    indent = " " * 28
    first = f"  {head:24}  "
    if len(first) > len(indent):  # a long head has a line of its own
        return [first.rstrip(), *_paragraphs("", text, width)]
    return textwrap.wrap(text, width, initial_indent=first, subsequent_indent=indent, break_long_words=False)


def _said(shares: str | None) -> str:
    return {None: "could not be told", "nothing": "nothing shared"}.get(shares, shares or "")


def _traits(report: CheckReport) -> str:
    traits = report.as_dict()["traits"]
    said = [
        f"{name.replace('_', ' ')} {'yes' if value else 'no'}" for name, value in traits.items()
        if isinstance(value, bool) and name != "declared"
    ]  # fmt: skip
    return " · ".join(said)


def _encodes(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
