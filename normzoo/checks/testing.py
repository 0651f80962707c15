"""The kit in somebody's own tests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from normzoo.checks.inference import Inferred
from normzoo.checks.kit import Check, isolated, list_checks
from normzoo.checks.subject import CheckFailed, NotApplicable, Subject
from normzoo.errors import NormzooError, unknown
from normzoo.registry import Spec, label

if TYPE_CHECKING:
    import pytest


def infer(norm: Spec) -> Inferred:
    """Say what a norm does, by trying: whether samples or positions depend on each other, what leaves the output alone.

    Args:
        norm: as for :func:`normzoo.create`; nothing needs to be declared.

    Example:
        >>> from torch import nn
        >>> found = infer(nn.BatchNorm2d)
        >>> found.shares, found.batch_dependent, found.batch_dependent_in_evaluation, found.causal
        ('b c s -> c', True, False, True)
    """
    with isolated():
        return Subject(norm).inferred


@dataclass(frozen=True)
class _Skipping:
    """A check for a test function: what does not apply is skipped, with the reason."""

    check: Check

    def __call__(self, norm: Spec) -> None:
        import pytest

        try:
            self.check(_subject(norm))
        except NotApplicable as reason:
            pytest.skip(str(reason))
        except CheckFailed as failure:
            raise CheckFailed(f"{label(norm)} fails {self.check.name}: {failure}\n{self.check.mend}") from failure


@lru_cache(maxsize=256)
def _subject(norm: Spec) -> Subject:
    return Subject(norm)


def parametrize_with_checks(
    norms: Iterable[Spec],
    *,
    expected_failures: Mapping[Any, Mapping[str, str]] | None = None,
    select: Callable[[Spec, Check], bool] | None = None,
) -> pytest.MarkDecorator:
    """Run every check on every norm, each as a test of its own.

    Args:
        norms: as for :func:`normzoo.create`.
        expected_failures: for a norm, or its short name, the checks that it fails and why. One that passes all the
            same is an error.
        select: which norms take which checks; left out, all of them.

    Returns:
        A decorator for a test function with the arguments ``norm`` and ``check``.

    Raises:
        NormzooError: for expected failures of a norm that is not among ``norms``, or of an unknown check.

    Example:
        >>> @parametrize_with_checks(["rms_norm", "group_norm(groups=2)"])
        ... def test_norm(norm, check):
        ...     check(norm)
    """
    import pytest

    norms, expected_failures, checks = list(norms), dict(expected_failures or {}), list_checks()
    names = [label(norm) for norm in norms]
    for key, reasons in expected_failures.items():
        if key not in norms and key not in names:
            raise unknown("norm among the expected failures", str(key), names)
        for name in reasons:
            if name not in {check.name for check in checks}:
                raise unknown("check", name, [check.name for check in checks])
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise NormzooError(f"two of the norms are called {twice!r}; give them names, or test them apart")
    parameters = []
    for norm, name in zip(norms, names, strict=True):
        expected = {**_subject(norm).expected_failures, **expected_failures.get(name, {})}
        expected |= expected_failures.get(norm, {})
        for check in checks:
            if select is None or select(norm, check):
                reason = expected.get(check.name)
                marks = () if reason is None else pytest.mark.xfail(raises=CheckFailed, reason=reason, strict=True)
                parameters.append(pytest.param(norm, _Skipping(check), id=f"{name}-{check.name}", marks=marks))
    return pytest.mark.parametrize(("norm", "check"), parameters)
