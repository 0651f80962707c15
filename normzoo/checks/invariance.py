"""What leaves the output as it is, and what is only said to."""

from __future__ import annotations

from normzoo.checks.inference import moved_by_scale, moved_by_shift
from normzoo.checks.kit import check
from normzoo.checks.subject import NotApplicable, Subject, call, require, same, twin


@check
def scale_invariance(subject: Subject) -> str | None:
    """Multiplying the input by a positive number changes nothing in training, if scale_invariant is declared.

    Divide by something that grows with the input, and keep eps small beside it, or do not declare it.
    """
    return _holds(subject.declared().scale_invariant, moved_by_scale(subject), "4 x the input")


@check
def shift_invariance(subject: Subject) -> str | None:
    """Adding a number to all of the input changes nothing in training, if shift_invariant is declared.

    Subtract the mean, or do not declare it.
    """
    return _holds(subject.declared().shift_invariant, moved_by_shift(subject), "the input + 10")


def _holds(declared: bool, difference: float, what: str) -> str | None:
    if declared:
        require(not difference, f"{what} moves the output by {difference:.2g} of its size")
        return None
    if difference:
        raise NotApplicable("not declared")
    return "holds, though it is not declared"


@check
def determinism(subject: Subject) -> str | None:
    """In evaluation, and in training unless stochastic is declared, the same input gives the same output.

    Declare stochastic, or draw nothing.
    """
    norm, x = subject.make(training=False), subject.data()
    same(norm(x), norm(x), "the same input in evaluation: the output", 0)
    if subject.traits is not None and subject.traits.stochastic:
        return None if subject.inferred.stochastic else "declared stochastic, though nothing random was seen"
    norm.train()
    require(not subject.inferred.stochastic, "the same input in training gives another output")
    same(call(twin(norm), x), call(twin(norm), x), "the same input in training: the output", 0)
    return None
