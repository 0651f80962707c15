"""Recurrent networks with the norm inside the recurrence, at named points, or on the way up between layers."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from normzoo.errors import NormzooError
from normzoo.layers.base import MomentNorm, parameter_roles, world_size
from normzoo.layers.batch import BatchNorm
from normzoo.layers.none import NoNorm
from normzoo.layers.sample import LayerNorm, RMSNorm
from normzoo.models.base import Inputs, Network, NormChoice, Sites, one_of, register_model, whole_number
from normzoo.models.dropout import Dropout
from normzoo.ops.recurrence import CellNorm, Kind, count, recurrence, usable

State = tuple[Tensor, ...]
Normalize = Callable[[str, Tensor], Tensor]


# ---- the cells -------------------------------------------------------------------------------------------------------


class Cell(nn.Module):
    """One step of a recurrence: abstract; a subclass says how many gates it has, where norms may be, and the step.

    Parameters have the names, shapes and order of gates of :class:`torch.nn.LSTMCell` and its sisters, so their state
    dicts load. Input weights start as Xavier's, recurrent weights orthogonal or as the identity, for each gate.

    Args:
        features: number of channels that come in.
        width: number of units.
        recurrent_init: ``"orthogonal"`` or ``"identity"``.
    """

    gates: ClassVar[int]
    points: ClassVar[tuple[str, ...]]
    """Names of the places where a norm may be."""

    def __init__(self, features: int, width: int, recurrent_init: str) -> None:
        super().__init__()
        one_of("recurrent_init", recurrent_init, ("orthogonal", "identity"))
        rows = self.gates * width
        self.width = width
        self.weight_ih = nn.Parameter(torch.empty(rows, features))
        self.weight_hh = nn.Parameter(torch.empty(rows, width))
        self.bias_ih = nn.Parameter(torch.zeros(rows))
        self.bias_hh = nn.Parameter(torch.zeros(rows))
        with torch.no_grad():
            for gate_ih, gate_hh in zip(
                self.weight_ih.chunk(self.gates), self.weight_hh.chunk(self.gates), strict=True
            ):
                nn.init.xavier_uniform_(gate_ih)
                nn.init.orthogonal_(gate_hh) if recurrent_init == "orthogonal" else nn.init.eye_(gate_hh)

    def start(self, like: Tensor) -> State:
        """The state before the first step, for a batch like ``(N, …)``."""
        return (like.new_zeros(like.shape[0], self.width),)

    @abstractmethod
    def forward(self, wx: Tensor, state: State, norm: Normalize) -> State:
        """The next state; its first tensor is the output.

        Args:
            wx: ``(N, gates * width)``, the input-to-hidden product without its bias.
            state: the state before.
            norm: ``norm(point, x)`` is the norm at that point, or ``x`` where there is none.
        """

    def channels(self, point: str) -> int:
        """Number of channels at a point."""
        return self.width if point == "cell" else self.gates * self.width


class LSTMCell(Cell):
    r"""Long short-term memory (Hochreiter and Schmidhuber 1997), with the norms of Cooijmans et al. 2016.

    .. math::
        (i, f, g, o) &= \mathrm{norm_{input}}(W_{ih} x_t) + \mathrm{norm_{hidden}}(W_{hh} h_{t-1}) + b \\
        c_t &= \sigma(f) \odot c_{t-1} + \sigma(i) \odot \tanh(g) \\
        h_t &= \sigma(o) \odot \tanh(\mathrm{norm_{cell}}(c_t))

    The bias of the forget gate starts at 1.
    """

    gates = 4
    points = ("input", "hidden", "cell")

    def __init__(self, features: int, width: int, recurrent_init: str) -> None:
        super().__init__(features, width, recurrent_init)
        with torch.no_grad():
            self.bias_ih[width : 2 * width] = 1

    def start(self, like: Tensor) -> State:
        """Hidden and cell state before the first step."""
        return super().start(like) + super().start(like)

    def forward(self, wx: Tensor, state: State, norm: Normalize) -> State:
        """See :class:`Cell`."""
        h, c = state
        wh = norm("hidden", h @ self.weight_hh.T)
        i, f, g, o = (norm("input", wx) + self.bias_ih + wh + self.bias_hh).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * norm("cell", c).tanh(), c


class GRUCell(Cell):
    r"""Gated recurrent unit (Cho et al. 2014, in the form of torch), with a norm on each of the two products.

    .. math::
        u &= \mathrm{norm_{input}}(W_{ih} x_t) + b_{ih}, \qquad v = \mathrm{norm_{hidden}}(W_{hh} h_{t-1}) + b_{hh} \\
        r &= \sigma(u_r + v_r), \qquad z = \sigma(u_z + v_z), \qquad n = \tanh(u_n + r \odot v_n) \\
        h_t &= (1 - z) \odot n + z \odot h_{t-1}
    """

    gates = 3
    points = ("input", "hidden")

    def forward(self, wx: Tensor, state: State, norm: Normalize) -> State:
        """See :class:`Cell`."""
        (h,) = state
        ur, uz, un = (norm("input", wx) + self.bias_ih).chunk(3, -1)
        vr, vz, vn = (norm("hidden", h @ self.weight_hh.T) + self.bias_hh).chunk(3, -1)
        z = (uz + vz).sigmoid()
        n = (un + (ur + vr).sigmoid() * vn).tanh()
        return ((1 - z) * n + z * h,)


class TanhCell(Cell):
    r"""The plain recurrence, with a norm on each of the two products.

    .. math:: h_t = \tanh(\mathrm{norm_{input}}(W_{ih} x_t) + \mathrm{norm_{hidden}}(W_{hh} h_{t-1}) + b)
    """

    gates = 1
    points = ("input", "hidden")

    def forward(self, wx: Tensor, state: State, norm: Normalize) -> State:
        """See :class:`Cell`."""
        (h,) = state
        wh = norm("hidden", h @ self.weight_hh.T)
        return ((norm("input", wx) + self.bias_ih + wh + self.bias_hh).tanh(),)


CELLS: dict[str, type[Cell]] = {"gru": GRUCell, "lstm": LSTMCell, "tanh": TanhCell}

_CELL_NAMES = {cell: name for name, cell in CELLS.items()}
_KINDS: dict[type[nn.Module], Kind] = {NoNorm: "none", LayerNorm: "layer", RMSNorm: "rms", BatchNorm: "batch"}
"""The norms that a whole recurrence can have as one operation."""


# ---- norms in time ---------------------------------------------------------------------------------------------------


class PerStep(nn.Module):
    """A norm inside a recurrence: the same parameters at every step, running statistics of its own at each.

    A norm that keeps no state is one module for all steps. Of one that does, there is a copy for each step which
    shares its parameters. Beyond the longest sequence that it was trained on, evaluation uses the statistics of the
    last trained step.

    Args:
        norm: the norm, called as ``norm(x, mask)``.
        max_steps: number of steps with statistics of their own; later steps share those of the last.

    Source:
        Cooijmans et al. 2016, Recurrent Batch Normalization, arXiv 1603.09025, section 3.
    """

    trained_steps: Tensor

    def __init__(self, norm: nn.Module, max_steps: int) -> None:
        super().__init__()
        stateful = any(True for _ in norm.buffers())
        parameters = {id(parameter): parameter for parameter in norm.parameters()}
        copies = [copy.deepcopy(norm, parameters.copy()) for _ in range(max_steps - 1)] if stateful else []
        self.steps = nn.ModuleList([norm, *copies])
        self.register_buffer("trained_steps", torch.tensor(0) if stateful else None)

    def last(self, length: int) -> int:
        """The last step with statistics to use, for sequences of ``length`` steps; counts them when in training."""
        if self.trained_steps is None:
            return 0
        if not self.training:
            return max(int(self.trained_steps), 1) - 1
        reached = min(length, len(self.steps))
        self.trained_steps.clamp_(min=reached)
        return reached - 1

    def forward(self, x: Tensor, mask: Tensor | None, step: int, *, lonely: bool) -> Tensor:
        """The norm of ``(N, C)`` at a step.

        Args:
            x: ``(N, C)``.
            mask: ``(N,)``, true where the sequence has not ended.
            step: which statistics to use.
            lonely: all other sequences of the batch have ended: one value has no variance to learn from, so a norm
                with running statistics uses these.
        """
        norm = self.steps[step]
        if not (lonely and self.training and self.trained_steps is not None):
            return norm(x, mask)
        norm.eval()
        try:
            return norm(x, mask)
        finally:
            norm.train()

    def kind(self, samples: int) -> Kind | None:
        """What this norm is to an operation over all steps; ``None`` where it takes one step at a time."""
        norms = self._norms()
        first = norms[0]
        kind = _KINDS.get(type(first))
        if kind is None or _watched(self) or any(_watched(norm) for norm in norms):
            return None
        if kind == "none":
            return kind
        settings = _settings(first)
        if any(type(norm) is not type(first) or _settings(norm) != settings for norm in norms):
            return None
        if first.training != self.training:
            return None
        if first.evaluates:
            return "running"
        averages = first.sync or (first.track_running_stats and first.momentum is None)
        alone = (samples if kind == "batch" else first.num_features) < 2  # what centred norms refuse
        return None if averages or (alone and first.centred) else kind

    def whole(self, kind: Kind, last: int) -> CellNorm:
        """This norm for all steps at once, with the statistics of the steps up to ``last``."""
        if kind == "none":
            return CellNorm()
        first = self._norms()[0]
        running = torch.cat(self._statistics(last)).view(last + 1, 2, -1) if first.track_running_stats else None
        momentum = first.momentum if first.counts and first.momentum is not None else 0.0
        return CellNorm(kind, first.eps, first.weight, first.bias, running, momentum)

    def count(self, moved: Tensor, last: int, steps: Iterable[int]) -> None:
        """Take in what the running statistics became, over these steps."""
        norms = self._norms()[: last + 1]
        if not norms[0].counts:
            return
        times = [0] * len(norms)
        for t in steps:
            times[min(t, last)] += 1
        counters = [norm._buffers["num_batches_tracked"] for norm in norms]
        count(self._statistics(last), counters, moved, times)  # pyright: ignore[reportArgumentType]

    def _norms(self) -> list[MomentNorm]:
        return list(self.steps._modules.values())  # pyright: ignore[reportReturnType]

    def _statistics(self, last: int) -> list[Tensor]:
        # the attribute of a module is ten times as slow to get as its entry, and there are hundreds
        names = ("running_mean", "running_var")
        return [norm._buffers[name] for norm in self._norms()[: last + 1] for name in names]  # pyright: ignore[reportReturnType]


def _watched(module: nn.Module) -> bool:
    """Whether hooks wait for calls of a module."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def _settings(norm: MomentNorm) -> tuple[object, ...]:
    """All that can differ between the copies of a norm for each step, but for its statistics."""
    affine = map(id, norm._parameters.values())
    return norm.training, norm.hold, norm.eps, norm.momentum, norm.sync, norm.track_running_stats, *affine


Placement = Literal["inside", "between"]


class RecurrentLayer(nn.Module):
    """A cell over time, and its norms.

    Without norms inside, or with batch, layer or RMS norm, it is one operation over the whole sequence
    (:func:`normzoo.ops.recurrence.recurrence`): in float32 on a CPU, and on a GPU for sizes that its kernels hold, as
    long as no hook waits for a norm or the cell. Otherwise, and with ``normzoo.ops.backend("reference")``, it is a loop
    over the steps with the same result.

    Args:
        cell: the step.
        norm_at: which norm goes where.
        site: name of the layer.
        placement: ``"inside"`` or ``"between"``.
        points: the cell's points that have a norm when they are inside.
        gain: where gains start inside the recurrence; ``None`` leaves them.
        max_steps: number of steps with statistics of their own.
    """

    def __init__(
        self,
        cell: Cell,
        norm_at: Sites,
        site: str,
        *,
        placement: str,
        points: Sequence[str],
        gain: float | None,
        max_steps: int,
    ) -> None:
        super().__init__()
        self.cell = cell
        self.between = norm_at(f"{site}.between", cell.channels("input")) if placement == "between" else None
        self.norms = nn.ModuleDict()
        for point in points:
            norm = norm_at(f"{site}.{point}", cell.channels(point))
            if gain is not None:
                _set_gain(norm, gain)
            self.norms[point] = PerStep(norm, max_steps)

    def forward(self, x: Tensor, mask: Tensor | None, counts: list[int] | None) -> Tensor:
        """``(N, T, F)`` to ``(N, T, width)``; where ``mask`` is false the state stays what it was.

        Args:
            x: the input; padding must be finite.
            mask: ``(N, T)``.
            counts: number of sequences that are real at each step, or ``None`` when all of them are.
        """
        if self.between is not None:
            x = self.between(x @ self.cell.weight_ih.T, mask)
        steps = x.shape[1]
        enough = min(2, len(x))  # sequences that a batch statistic needs; a batch of one is the norm's own affair
        reached = [t for t in range(steps) if counts is None or counts[t] >= enough]
        learned = max(reached, default=0) + 1
        last = {point: norm.last(learned) for point, norm in self._norms()}
        kinds = self.kinds(x, mask, counts)
        if kinds is None:
            return self.step_by_step(x, mask, counts, last)
        cell = self.cell
        out, moved = recurrence(
            _CELL_NAMES[type(cell)],
            x,
            None if self.between is not None else cell.weight_ih,
            cell.weight_hh,
            cell.bias_ih,
            cell.bias_hh,
            {point: norm.whole(kinds[point], last[point]) for point, norm in self._norms()},
            mask,
        )
        for point, norm in self._norms():
            if point in moved:
                norm.count(moved[point], last[point], reached)
        return out

    def kinds(self, x: Tensor, mask: Tensor | None, counts: list[int] | None) -> dict[str, Kind] | None:
        """What each norm is to the operation over the whole sequence; ``None`` to go step by step."""
        watched = _watched(self.cell) or _has_any_global_hook()
        if type(self.cell) not in _CELL_NAMES or watched or x.numel() == 0:
            return None
        kinds: dict[str, Kind] = {}
        for point, norm in self._norms():
            kind = norm.kind(len(x))
            if kind is None or (kind == "batch" and mask is not None and counts is None):
                return None
            kinds[point] = kind
        first = [norm.steps[0] for _, norm in self._norms()]
        floats = [t for norm in first for t in (*norm.parameters(), *norm.buffers()) if t.is_floating_point()]
        tensors = [x, *self.cell.parameters(), *floats]
        cell = _CELL_NAMES[type(self.cell)]
        return kinds if usable(cell, list(kinds.values()), len(x), self.cell.width, tensors) else None

    def step_by_step(self, x: Tensor, mask: Tensor | None, counts: list[int] | None, last: Mapping[str, int]) -> Tensor:
        """The recurrence as a loop, for any norm."""
        wx = x if self.between is not None else x @ self.cell.weight_ih.T
        enough = min(2, len(wx))
        state = self.cell.start(wx)
        outputs = []
        for t, wx_t in enumerate(wx.unbind(1)):
            here = None if mask is None else mask[:, t]
            lonely = counts is not None and counts[t] < enough

            def norm(
                point: str, value: Tensor, here: Tensor | None = here, t: int = t, lonely: bool = lonely
            ) -> Tensor:
                if point not in last:
                    return value
                return self.norms[point](value, here, min(t, last[point]), lonely=lonely)

            new = self.cell(wx_t, state, norm)
            if here is not None:
                new = tuple(torch.where(here.unsqueeze(-1), a, b) for a, b in zip(new, state, strict=True))
            state = new
            outputs.append(state[0])
        return torch.stack(outputs, 1)

    def _norms(self) -> list[tuple[str, PerStep]]:
        return list(self.norms.items())  # pyright: ignore[reportReturnType]


@torch.no_grad()
def _set_gain(norm: nn.Module, gain: float) -> None:
    roles = parameter_roles(norm)
    for name, parameter in norm.named_parameters():
        if roles.get(name) == "gain":
            parameter.fill_(gain)


# ---- the network -----------------------------------------------------------------------------------------------------


@register_model("lstm", "LSTM with norms inside the recurrence or between layers.", cell="lstm")
@register_model(
    "lstm_between", "LSTM with norms on the way up alone, over batch and time.", cell="lstm", placement="between"
)
@register_model("gru", "GRU with norms inside the recurrence or between layers.", cell="gru")
@register_model("rnn_tanh", "Plain tanh recurrence with norms inside it or between layers.", cell="tanh")
class RNN(Network):
    r"""A recurrent network with norms, for sequences of any length.

    ``placement="inside"`` puts a norm into the recurrence at each of ``norm_points``: on the input-to-hidden product
    (``"input"``), on the hidden-to-hidden product (``"hidden"``), and on the cell state of an LSTM before its tanh
    (``"cell"``). It sees one time step at a time, ``(N, C)``: a norm with running statistics keeps them for each step.
    Gains start at 0.1 there, for all norms. A norm whose statistics stay within one channel of one sample (instance
    norm) has nothing to average over inside, and refuses.

    ``placement="between"`` normalises the input-to-hidden product alone, over the whole sequence at once,
    ``(N, T, C)``: statistics of a batch norm are over batch and time.

    .. math:: h^l_t = f(\mathrm{norm}(W^l h^{l-1}_t) + U^l h^l_{t-1} + b^l)

    The norm of all gates is taken together. Biases stay beside a norm with a shift of its own, as one of them is
    redundant then (Cooijmans et al. leave out the norm's): so all norms share the same other parameters. Where the mask
    is false the state is held, so the last state is that of the last real step. Dropout follows each layer.

    Sites: ``layers.0.input``, ``layers.0.hidden``, ``layers.0.cell``, or ``layers.0.between`` (patterns ``"input"``,
    ``"layers.1.*"``).

    Args:
        norm: a norm, or a mapping from sites to norms.
        inputs: ``(T, F)``, or ``(T,)`` with a vocabulary; sequences may be shorter or longer.
        outputs: width of the answer.
        cell: ``"lstm"``, ``"gru"`` or ``"tanh"``.
        width: number of units.
        depth: number of layers.
        placement: ``"inside"`` or ``"between"``.
        norm_points: where the norms are inside; ``None`` is every point of the cell.
        gain: where gains start inside; ``None`` leaves them at the norm's own.
        max_steps: number of steps with statistics of their own; ``None`` is the T of ``inputs``.
        recurrent_init: ``"orthogonal"`` or ``"identity"``.
        dropout: probability of zero.

    Shape:
        ``(N, T, F)`` or ``(N, T)`` to ``(N, outputs)``, or ``(N, T, outputs)`` per position.

    Source:
        Cooijmans et al. 2016, Recurrent Batch Normalization, arXiv 1603.09025; between layers, Amodei et al. 2015, Deep
        Speech 2, arXiv 1512.02595, section 3.2.
    """

    family = "rnn"

    def __init__(
        self,
        *,
        norm: NormChoice,
        inputs: Inputs,
        outputs: int,
        cell: str = "lstm",
        width: int = 64,
        depth: int = 1,
        placement: Placement = "inside",
        norm_points: Sequence[str] | None = None,
        gain: float | None = 0.1,
        max_steps: int | None = None,
        recurrent_init: str = "orthogonal",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(inputs, outputs)
        make = CELLS[one_of("cell", cell, CELLS)]
        one_of("placement", placement, ("inside", "between"))
        whole_number("width", width)
        if placement == "between" and norm_points is not None:
            raise NormzooError(
                f"norm_points={norm_points!r} with placement='between'; points are inside the recurrence: leave them "
                "out, or give placement='inside'"
            )
        points = () if placement == "between" else make.points if norm_points is None else tuple(norm_points)
        for point in points:
            one_of(f"norm point of the cell {cell!r}", point, make.points)
        max_steps = inputs.shape[0] if max_steps is None else whole_number("max_steps", max_steps)

        self.embedding = nn.Embedding(inputs.vocabulary, width) if inputs.vocabulary else nn.Identity()
        features = width if inputs.vocabulary else inputs.shape[1]
        self.layers = nn.ModuleList()
        self.dropouts = nn.ModuleList()
        with Sites(norm, channel_dim=-1) as norm_at:
            for i in range(whole_number("depth", depth)):
                layer = RecurrentLayer(
                    make(features if i == 0 else width, width, recurrent_init),
                    norm_at,
                    f"layers.{i}",
                    placement=placement,
                    points=points,
                    gain=gain,
                    max_steps=max_steps,
                )
                self.layers.append(layer)
                self.dropouts.append(Dropout(dropout))
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See the class."""
        x = self.embedding(self.admit(x, mask))
        counts = None
        # with several processes every one takes every step, whoever is left: their statistics may be shared
        if mask is not None and world_size(None) == 1:
            counts = mask.sum(0).tolist()
        for layer, dropout in zip(self.layers, self.dropouts, strict=True):
            x = dropout(layer(x, mask, counts))
        return self.head(x if self.inputs.per_position else x[:, -1])
