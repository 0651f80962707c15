"""What a check is, and what comes of running some."""

from __future__ import annotations

import ast
import inspect
import random
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np
import torch

from normzoo.checks import pair
from normzoo.checks.inference import Inferred
from normzoo.checks.subject import CheckFailed, NotApplicable, Subject
from normzoo.errors import NormzooError, unknown
from normzoo.layers.base import Traits
from normzoo.registry import Spec

Status = Literal["passed", "failed", "expected_failure", "not_applicable"]
GROUPS = ("contract", "values", "state", "independence", "invariance", "systems")

_checks: dict[str, Check] = {}
_HERE = Path(__file__).parent
_TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Check:
    """A named check of a norm.

    Attributes:
        name: what ``-k``, expected failures and results call it.
        group: the kind of fault it looks for.
        guards: one sentence, what it guards.
        mend: one sentence, what to do when it fails.
        slow: whether it takes more than a moment (it compiles, exports or starts processes).
        function: raises :class:`CheckFailed` or :class:`NotApplicable`, or returns what it noticed.
    """

    name: str
    group: str
    guards: str
    mend: str
    slow: bool
    function: Callable[[Subject], str | None]

    def __call__(self, norm: Spec | Subject) -> str:
        """Run the check on a norm.

        Returns:
            What the check noticed, mostly nothing.

        Raises:
            CheckFailed: with what is wrong. Whatever a norm raises unasked is a failure that names the exception.
            NotApplicable: with the reason why there is nothing to check.
        """
        subject = norm if isinstance(norm, Subject) else Subject(norm)
        with isolated():
            try:
                return self.function(subject) or ""
            except (CheckFailed, NotApplicable):
                raise
            except Exception as error:  # the norm is somebody else's code: it may raise anything
                raise CheckFailed(_crash(error)) from error

    def __repr__(self) -> str:
        return f"<check {self.group}/{self.name}>"


@overload
def check(function: Callable[[Subject], str | None]) -> Check: ...
@overload
def check(*, slow: bool) -> Callable[[Callable[[Subject], str | None]], Check]: ...
def check(function: Callable[[Subject], str | None] | None = None, *, slow: bool = False) -> Any:
    """Make a function of a :class:`Subject` a check, under its own name and in the group of its module.

    Its docstring is a sentence on what it guards, an empty line, and a sentence on what to do when it fails.

    Raises:
        NormzooError: when the name is taken or the docstring is not of this form.
    """
    if function is None:
        return lambda function: _register(function, slow)
    return _register(function, slow)


def _register(function: Callable[[Subject], str | None], slow: bool) -> Check:
    name = function.__name__
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    if len(paragraphs) != 2:
        raise NormzooError(
            f"the docstring of the check {name!r} has {len(paragraphs)} paragraphs; expected two: what it guards, and "
            "what to do when it fails"
        )
    guards, mend = (" ".join(paragraph.split()) for paragraph in paragraphs)
    if name in _checks and inspect.unwrap(_checks[name].function).__module__ != function.__module__:
        raise NormzooError(f"the name {name!r} is taken by a check of {_checks[name].group!r}; choose another")
    made = Check(name, function.__module__.rpartition(".")[2], guards, mend, slow, function)
    _checks[name] = made
    return made


def list_checks(only: str | Collection[str] | None = None, *, slow: bool = True) -> list[Check]:
    """The checks in the order in which they run.

    Args:
        only: names of checks, or an expression over parts of names and groups: ``"half or mask"``,
            ``"systems and not onnx"``.
        slow: include the slow ones.

    Raises:
        NormzooError: for a name that no check has, or an expression that selects nothing.
    """
    checks = sorted(_checks.values(), key=lambda c: (c.slow, GROUPS.index(c.group) if c.group in GROUPS else 99))
    if isinstance(only, str):
        chosen = [c for c in checks if _matches(only, f"{c.group}/{c.name}")]
    elif only is None:
        chosen = checks
    else:
        for name in only:
            if name not in _checks:
                raise unknown("check", name, _checks)
        chosen = [c for c in checks if c.name in only]
    if not chosen:
        words = " ".join(name for name in ast.unparse(_parsed(only)).split()) if isinstance(only, str) else ""
        raise unknown("check", words, _checks)
    return [c for c in chosen if slow or not c.slow]


def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        raise NormzooError(
            f"cannot read {expression!r}; expected parts of names with 'and', 'or', 'not', as in 'half or mask'"
        ) from error


def _matches(expression: str, name: str) -> bool:
    def holds(node: ast.expr) -> bool:
        if isinstance(node, ast.Name):
            return node.id.lower() in name
        if isinstance(node, ast.BoolOp):
            return (all if isinstance(node.op, ast.And) else any)(map(holds, node.values))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return not holds(node.operand)
        raise NormzooError(
            f"cannot read {expression!r}; expected parts of names with 'and', 'or', 'not', as in 'half or mask'"
        )

    return holds(_parsed(expression))


@contextmanager
def isolated() -> Iterator[None]:
    """Leave every global generator as it was, and hear no warnings: the verdict depends on the norm alone."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  a norm may draw from them: put them back
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _crash(error: Exception) -> str:
    """One line: the exception, and the last place outside torch and the kit."""
    text = str(error).strip().splitlines()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(".py")]
    own = [f for f in frames if _TORCH not in Path(f.filename).parents and Path(f.filename).parent != _HERE]
    where = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"raised {type(error).__name__}: {text[0] if text else ''}{where}"


# ---- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckResult:
    """What came of a check.

    Attributes:
        name: of the check.
        status: ``"passed"``, ``"failed"``, ``"expected_failure"`` or ``"not_applicable"``.
        detail: what is wrong, the reason of an expected failure, why the check does not apply, or what was noticed.
        seconds: how long it took.
    """

    name: str
    status: Status
    detail: str
    seconds: float

    @property
    def check(self) -> Check:
        """The check itself, with what it guards and what to do."""
        return _checks[self.name]


class CheckReport(list[CheckResult]):
    """The results of all checks of one norm, in the order they ran."""

    def __init__(self, subject: Subject, results: list[CheckResult] | None = None) -> None:
        super().__init__(results or [])
        self.subject = subject

    @property
    def norm(self) -> str:
        """A short name of the norm."""
        return self.subject.name

    @cached_property
    def inferred(self) -> Inferred:
        """What the norm does, found out by trying."""
        with isolated():
            return self.subject.inferred

    @property
    def failed(self) -> list[CheckResult]:
        """The failures that were not expected."""
        return [result for result in self if result.status == "failed"]

    @property
    def ok(self) -> bool:
        """Whether nothing failed that was not expected to."""
        return not self.failed

    def tally(self, status: Status) -> int:
        """How many checks came to this status."""
        return sum(result.status == status for result in self)

    def raise_on_failure(self) -> None:
        """Do nothing when all is well.

        Raises:
            CheckFailed: with every failure and what to do about it.
        """
        if self.failed:
            lines = [f"  {result.name}: {result.detail}\n    {result.check.mend}" for result in self.failed]
            raise CheckFailed(f"{self.norm} fails {len(self.failed)} of {len(self)} checks\n" + "\n".join(lines))

    def as_dict(self) -> dict[str, Any]:
        """The report in plain data: ``norm``, ``traits`` and ``checks``."""
        traits = self.subject.traits or self.inferred
        return {
            "norm": self.norm,
            "traits": {
                **{name: getattr(traits, name, None) for name in (field.name for field in fields(Traits))},
                "declared": self.subject.traits is not None,
                "shares": self.inferred.shares,
            },
            "checks": [{"name": r.name, "status": r.status, "detail": r.detail} for r in self],
        }

    def __str__(self) -> str:
        counts = [(self.tally(status), status.replace("_", " ")) for status in get_args(Status)]
        return f"{self.norm}: " + " · ".join(f"{n} {status}" for n, status in counts if n)


def check_norm(
    norm: Spec,
    *,
    only: str | Collection[str] | None = None,
    fail_fast: bool = False,
    expected_failures: Mapping[str, str] | None = None,
    slow: bool = True,
) -> CheckReport:
    """Run the conformance checks on a norm: the project's, torch's, or any callable that makes a module from a width.

    Args:
        norm: as for :func:`normzoo.create`.
        only: names of checks, or an expression as for :func:`list_checks`.
        fail_fast: stop at the first failure.
        expected_failures: for a check's name, the reason why it fails, beside those that the norm's own attribute
            ``expected_failures`` names. One that passes is a failure.
        slow: include the checks that compile, export and start processes.

    Returns:
        A list of :class:`CheckResult`, with ``ok`` and ``raise_on_failure()``.

    Raises:
        NormzooError: for an unknown norm or an unknown check.

    Example:
        >>> report = check_norm("rms_norm", only=["shapes", "gradcheck"])
        >>> [(result.name, result.status) for result in report]
        [('shapes', 'passed'), ('gradcheck', 'passed')]
    """
    if pair.inside():
        raise NormzooError(
            "check_norm was called while another process imported the norm's file; put the call under "
            "if __name__ == '__main__':"
        )
    checks = list_checks(only, slow=slow)
    subject = Subject(norm)
    expected = {**subject.expected_failures, **(expected_failures or {})}
    for name in expected:
        if name not in _checks:
            raise unknown("check", name, _checks)
    if any(c.slow for c in checks):
        pair.start()
    report = CheckReport(subject)
    for c in checks:
        report.append(_result(c, subject, expected.get(c.name)))
        if fail_fast and not report.ok:
            break
    return report


def _result(c: Check, subject: Subject, expected: str | None) -> CheckResult:
    start = time.perf_counter()
    status: Status
    try:
        status, detail = "passed", c(subject)
        if expected is not None:
            status = "failed"
            detail = f"passed, though a failure was expected ({expected}); take it off the expected failures"
    except NotApplicable as reason:
        status, detail = "not_applicable", str(reason)
    except CheckFailed as failure:
        status, detail = ("failed", str(failure)) if expected is None else ("expected_failure", expected)
    return CheckResult(c.name, status, detail, time.perf_counter() - start)
