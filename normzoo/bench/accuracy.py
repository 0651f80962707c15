"""How far results are from the formula in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from normzoo import ops
from normzoo.bench.case import Case, Inputs
from normzoo.bench.contenders import OURS, REFUSALS, TORCH, Absent, Contender, first_line, line_up, make
from normzoo.bench.measure import Subject


@dataclass
class Errors:
    r"""Relative errors :math:`\lVert a - b \rVert / \lVert b \rVert`, with b from the formula in float64.

    Attributes:
        norm: its label.
        contender: how it is computed.
        shape: sizes joined by ``x``.
        layout: as of the case.
        dtype: of the input.
        output: of the output.
        input: of the gradient of the input.
        weight: of the gradient of the gain, if there is one.
        bias: of the gradient of the shift, if there is one.
        reason: why there are none.
    """

    norm: str
    contender: str
    shape: str
    layout: str
    dtype: str
    output: float | None = None
    input: float | None = None
    weight: float | None = None
    bias: float | None = None
    reason: str = ""


def measure_accuracy(case: Case, subjects: Sequence[Subject], against: Sequence[str] = (TORCH,)) -> list[Errors]:
    """The errors of every contender, for the same numbers: what float64 gets is what they got, rounded as theirs is."""
    shape = "x".join(map(str, case.shape))
    inputs = case.inputs()
    found = []
    for norm, masked in subjects:
        contenders = [one for one in line_up(norm, case, against, masked) if not one.name.startswith("compiled")]
        try:
            exact = _exact(norm, case, masked, inputs)
        except REFUSALS as error:
            reason = first_line(error)
            found += [Errors(c.norm, c.name, shape, case.layout, case.dtype, reason=reason) for c in contenders]
            continue
        for contender in contenders:
            errors = Errors(contender.norm, contender.name, shape, case.layout, case.dtype)
            found.append(errors)
            if isinstance(contender, Absent):
                errors.reason = contender.reason
                continue
            try:
                results = _results(contender, inputs)
            except REFUSALS as error:
                errors.reason = first_line(error)
                continue
            for name in exact.keys() & results.keys():
                setattr(errors, name, relative_error(results[name], exact[name]))
    return found


def relative_error(value: Tensor, exact: Tensor) -> float:
    """The norm of the difference over the norm of what is right.

    >>> relative_error(torch.tensor([3.0, 4.4]), torch.tensor([3.0, 4.0], dtype=torch.float64))
    0.08...
    """
    return float(torch.linalg.vector_norm(value.double() - exact) / torch.linalg.vector_norm(exact))


def _exact(norm: str, case: Case, masked: bool, inputs: Inputs) -> dict[str, Tensor]:
    x = inputs.x.detach().double().requires_grad_()
    contender = Contender("", OURS, make(norm, case, torch.float64), partial(ops.backend, "reference"), masked)
    return _results(contender, Inputs(x, inputs.dy.double(), inputs.mask))


def _results(contender: Contender, inputs: Inputs) -> dict[str, Tensor]:
    """Output, gradient of the input, and those of what is called weight and bias."""
    wanted = {"input": inputs.x}
    for name, parameter in contender.module.named_parameters():
        if (last := name.rpartition(".")[2]) in ("weight", "bias"):
            wanted[last] = parameter
    with contender.context():
        y = contender.call(inputs)
        gradients = torch.autograd.grad(y, list(wanted.values()), inputs.dy)
    return {"output": y.detach()} | dict(zip(wanted, gradients, strict=True))
