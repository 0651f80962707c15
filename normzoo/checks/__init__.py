"""The conformance kit: named checks that say whether a norm is right, the project's or anybody's.

>>> check_norm("none", only="shapes or dtypes").ok
True
"""

from __future__ import annotations

from normzoo.checks import contract as contract
from normzoo.checks import independence as independence
from normzoo.checks import invariance as invariance
from normzoo.checks import state as state
from normzoo.checks import systems as systems
from normzoo.checks import values as values
from normzoo.checks.command import run_check_command
from normzoo.checks.inference import Inferred
from normzoo.checks.kit import Check, CheckReport, CheckResult, check, check_norm, list_checks
from normzoo.checks.subject import CheckFailed, NotApplicable, Subject
from normzoo.checks.testing import infer, parametrize_with_checks

__all__ = [
    "Check",
    "CheckFailed",
    "CheckReport",
    "CheckResult",
    "Inferred",
    "NotApplicable",
    "Subject",
    "check",
    "check_norm",
    "infer",
    "list_checks",
    "parametrize_with_checks",
    "run_check_command",
]
