"""Recurrent layers with a norm inside, against torch's own layer without any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from normzoo import ops
from normzoo.bench.case import Case, one_of
from normzoo.bench.contenders import FORMULA, OURS, REFUSALS, Contender, first_line
from normzoo.bench.measure import empty_row, refusal, timed_rows
from normzoo.bench.result import Row
from normzoo.bench.timing import STANDARD, Effort, measure, threads
from normzoo.models import Inputs, create_model

PLAIN = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}


@dataclass(frozen=True)
class Recurrent:
    """A sequence for a recurrent layer.

    Args:
        model: ``"lstm"``, ``"gru"`` or ``"rnn_tanh"``.
        steps: length of the sequences.
        batch: how many.
        hidden: units, and features of the input.
        dtype: of the input and the parameters.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        NormzooError: for a model that is not recurrent.
    """

    model: str = "lstm"
    steps: int = 64
    batch: int = 64
    hidden: int = 128
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        one_of("recurrent model", self.model, PLAIN)

    @property
    def case(self) -> Case:
        """Its input."""
        return Case((self.batch, self.steps, self.hidden), "tokens", self.dtype, self.device)

    @property
    def plain(self) -> str:
        """The name of torch's layer."""
        return f"torch.nn.{PLAIN[self.model].__name__}"


class _Outputs(nn.Module):
    """The outputs at every step, of our layer or of torch's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0] if isinstance(self.layer, nn.RNNBase) else self.layer(x, None, None)


def measure_recurrent(
    recurrent: Recurrent,
    norms: Sequence[str],
    against: Sequence[str] = (FORMULA,),
    direction: str = "both",
    effort: Effort = STANDARD,
) -> list[Row]:
    """Time a layer with each norm at every point of its cell, and torch's layer without any, in the same rounds.

    Args:
        recurrent: the layer and its input.
        norms: specs.
        against: ``"formula"`` for the loop in Python with plain formulas, or nothing.
        direction: ``"forward"``, ``"backward"`` or ``"both"``, which gives all three.
        effort: how long.

    Returns:
        A row for each norm and direction; ``floors`` are multiples of the time of torch's layer.
    """
    case, hidden = recurrent.case, recurrent.hidden
    inputs = case.inputs()
    layer = PLAIN[recurrent.model](hidden, hidden, batch_first=True)
    lined_up = [Contender("none", recurrent.plain, _Outputs(layer))]
    refused = []
    for norm in norms:
        try:
            layers = [_layer(recurrent, norm) for _ in range(2)]
        except REFUSALS as error:
            refused.append(empty_row(case, norm, OURS, direction, first_line(error)))
            continue
        lined_up.append(Contender(norm, OURS, layers[0]))
        if FORMULA in against:
            lined_up.append(Contender(norm, FORMULA, layers[1], partial(ops.backend, "reference")))
    jobs = {}
    with threads(effort.threads):
        for contender in lined_up:
            contender.module.to(device=case.device, dtype=case.parameter_dtype)
            if reason := refusal(contender, inputs):
                refused.append(empty_row(case, contender.norm, contender.name, direction, reason))
            else:
                jobs[contender.norm, contender.name] = contender.job(inputs, direction != "forward")
    measure(list(jobs.values()), device=case.device, effort=effort)
    rows = timed_rows(case, jobs, ("none", recurrent.plain), direction)
    for row in (rows := rows + refused):
        row.layout = recurrent.model
    return rows


def _layer(recurrent: Recurrent, norm: str) -> nn.Module:
    """The first layer of the model, the same weights every time."""
    sample = Inputs((recurrent.steps, recurrent.hidden))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = create_model(recurrent.model, norm=norm, inputs=sample, outputs=1, width=recurrent.hidden)
    return _Outputs(model.get_submodule("layers.0"))
