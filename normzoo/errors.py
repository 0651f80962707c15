"""The one error that a user's mistake raises, and the hints it carries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NormzooError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error message: the closest known names, or nothing.

    >>> did_you_mean("bach_norm", ["batch_norm", "rms_norm"])
    "; did you mean 'batch_norm'?"
    >>> did_you_mean("zzz", ["batch_norm"])
    ''
    """
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> NormzooError:
    """An error for a name that nobody registered: the closest ones, or the known ones when none is close."""
    known = sorted(known)
    few = ", ".join(known) if len(known) <= 20 else f"{', '.join(known[:20])}, … ({len(known)} in all)"
    hint = did_you_mean(name, known) or f"; known: {few}"
    return NormzooError(f"unknown {kind} {name!r}{hint}")


class OptionError(NormzooError, TypeError):
    """An option that the thing does not have: a ``TypeError`` as Python would raise it, with a hint."""


def unknown_option(owner: str, name: str, known: Iterable[str]) -> OptionError:
    """An error for an option that ``owner`` does not take."""
    known = list(known)
    return OptionError(
        f"{owner} has no option {name!r}{did_you_mean(name, known)}; it takes: {', '.join(known) or 'no options'}"
    )
