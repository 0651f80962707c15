"""Who runs: a norm of ours by each of its backends, the formula, torch's own layer, compiled code, other packages."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normzoo import ops, registry
from normzoo.bench.case import Case, Inputs
from normzoo.bench.timing import Job
from normzoo.errors import NormzooError, unknown
from normzoo.layers.base import Norm
from normzoo.layers.batch import BatchNorm
from normzoo.layers.sample import GroupNorm, InstanceNorm, LayerNorm, LayerNormJoint, RMSNorm

OURS = "normzoo"
FORMULA = "formula"
TORCH = "torch.nn"
COMPILED = ("compiled formula", "compiled torch.nn")
PACKAGES = ("liger", "quack")
BACKENDS = tuple(choice.name for choice in ops.CHOICES if choice.name != "reference")
ALTERNATIVES = (FORMULA, TORCH, "compile", *PACKAGES)
REFUSALS = (NormzooError, RuntimeError, ValueError, NotImplementedError)
"""What a module raises that cannot serve an input; anything else is a mistake in it, and is not hidden."""


def alternatives() -> tuple[str, ...]:
    """What ``--against`` takes: backends by their names, and what is not ours."""
    return (*BACKENDS, *ALTERNATIVES)


@dataclass
class Contender:
    """A module that takes part.

    Attributes:
        norm: the norm's label.
        name: how it is computed.
        module: called with the input, and with the mask if it is ``masked``.
        context: what is entered to run it.
        masked: whether it gets the mask.
    """

    norm: str
    name: str
    module: nn.Module
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    masked: bool = False

    @property
    def compiled(self) -> bool:
        """Whether it goes through ``torch.compile``."""
        return self.name in COMPILED

    def call(self, inputs: Inputs) -> Tensor:
        """The output."""
        return self.module(inputs.x, inputs.mask) if self.masked else self.module(inputs.x)

    def job(self, inputs: Inputs, backward: bool = True) -> Job:
        """What is timed."""
        x, dy, mask = inputs
        wanted = [x, *self.module.parameters()]
        forward = partial(self.module, x, mask) if self.masked else partial(self.module, x)

        def gradients(y: Tensor) -> object:
            return torch.autograd.grad(y, wanted, dy, allow_unused=True)

        return Job(forward, gradients if backward else None, self.context)


@dataclass(frozen=True)
class Absent:
    """Something that does not take part, and why."""

    norm: str
    name: str
    reason: str


def checked(norm: str) -> str:
    """A norm's spec if there is such a norm with such options.

    Raises:
        NormzooError: with the closest names.
    """
    registry.canonical(norm)
    return norm


def line_up(
    norm: str, case: Case, against: Sequence[str], masked: bool = False, label: str = ""
) -> list[Contender | Absent]:
    """A norm, then what it is compared with.

    Args:
        norm: its spec.
        case: the tensor.
        against: some of :func:`alternatives`.
        masked: give it the mask; others than ours take none, and no part.
        label: the norm's in the results.

    Raises:
        NormzooError: for an alternative that is none.
    """
    for name in against:
        if name not in alternatives():
            raise unknown("alternative", name, alternatives())
    label = (label or registry.label(norm)) + (" masked" if masked else "")
    return list(_contenders(norm, case, against, masked, label))


def make(spec: str, case: Case, dtype: torch.dtype | None = None) -> Norm:
    """A norm with gains around 1 and shifts around 0, the same ones every time."""
    norm = registry.create(spec, case.channels, channel_dim=case.channel_dim)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    # through the parameters' own dtype, so that a norm in float64 has the same values
    return norm.to(case.parameter_dtype).to(device=case.device, dtype=dtype or case.parameter_dtype)


def _contenders(
    spec: str, case: Case, against: Sequence[str], masked: bool, label: str
) -> Iterator[Contender | Absent]:
    try:
        ours = make(spec, case)
    except REFUSALS as refusal:
        yield Absent(label, OURS, first_line(refusal))
        return
    yield Contender(label, OURS, ours, masked=masked)
    for name in against:
        if name in BACKENDS:
            yield Contender(label, f"{OURS} {name}", make(spec, case), partial(ops.backend, name), masked)
    reference = partial(ops.backend, "reference")
    if FORMULA in against:
        yield Contender(label, FORMULA, make(spec, case), reference, masked)
    theirs = None if masked else torch_layer(ours, case)
    if theirs is not None and TORCH in against:
        yield Contender(label, TORCH, theirs)
    if "compile" in against:
        yield Contender(label, COMPILED[0], _compiled(make(spec, case)), reference, masked)
        if theirs is not None:
            again = torch_layer(ours, case)
            assert again is not None
            yield Contender(label, COMPILED[1], _compiled(again))
    if not masked:
        for name in PACKAGES:
            if name in against and (layer := packaged(name, ours, case)) is not None:
                yield layer if isinstance(layer, Absent) else Contender(label, name, layer)


def _compiled(module: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(module)
    return compiled


def first_line(error: BaseException) -> str:
    """The gist of an error for a table."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


# ---- torch's own layers ----------------------------------------------------------------------------------------------


class ChannelsEnd(nn.Module):
    """A layer for ``(N, *S, C)`` on ``(N, C, *S)``, the way everyone writes it: there and back."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer between two permutations."""
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


class ChannelsFirst(nn.Module):
    """A layer for ``(N, C, *S)`` on ``(N, *S, C)``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer between two permutations."""
        return self.layer(x.movedim(-1, 1)).movedim(1, -1)


class Rows(nn.Module):
    """A layer for ``(N, C)`` on ``(N, *S, C)`` whose positions are as good as samples."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer on all positions of all samples as rows."""
        return self.layer(x.flatten(0, -2)).view(x.shape)


def torch_layer(ours: Norm, case: Case) -> nn.Module | None:
    """The layer of torch that computes the same, with the same parameters; ``None`` where there is none."""
    kind = type(ours)  # not isinstance: what is derived from a norm computes something else
    dims, c = len(case.shape) - 2, case.channels
    tokens = case.layout == "tokens"
    layer: nn.Module
    if isinstance(ours, BatchNorm) and kind is BatchNorm:
        flat = tokens or dims == 0
        of_rank = nn.BatchNorm1d if flat or dims == 1 else nn.BatchNorm2d if dims == 2 else nn.BatchNorm3d
        layer = of_rank(c, eps=ours.eps, momentum=ours.momentum, track_running_stats=ours.track_running_stats)
        arranged = Rows(layer) if flat and dims else layer
    elif isinstance(ours, LayerNorm | RMSNorm) and kind in (LayerNorm, RMSNorm):
        layer = (nn.LayerNorm if kind is LayerNorm else nn.RMSNorm)(c, eps=ours.eps)
        arranged = layer if tokens or dims == 0 else ChannelsEnd(layer)
    elif isinstance(ours, GroupNorm | LayerNormJoint) and kind in (GroupNorm, LayerNormJoint):
        layer = nn.GroupNorm(ours.sizes["g"] if kind is GroupNorm else 1, c, eps=ours.eps)
        arranged = ChannelsFirst(layer) if tokens and dims else layer
    elif isinstance(ours, InstanceNorm) and kind is InstanceNorm and dims > 0:
        of_rank = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[min(dims, 3) - 1]
        layer = of_rank(c, eps=ours.eps, affine=True)
        arranged = ChannelsFirst(layer) if tokens else layer
    else:
        return None
    _share(layer, ours)
    return arranged.to(case.device, case.parameter_dtype)  # running statistics too, as model.bfloat16() does


def _share(layer: nn.Module, ours: Norm) -> None:
    """Give a layer its own copy of our parameters."""
    for name in ("weight", "bias"):
        value: Tensor | None = getattr(ours, name, None)
        if value is not None or hasattr(layer, name):
            setattr(layer, name, None if value is None else nn.Parameter(value.detach().clone()))


# ---- other packages --------------------------------------------------------------------------------------------------


def packaged(name: str, ours: Norm, case: Case) -> nn.Module | Absent | None:
    """The layer of another package for the cases that it has; ``None`` for the others."""
    kind = type(ours)
    rows = case.layout == "tokens" or len(case.shape) == 2
    served = (kind in (LayerNorm, RMSNorm) and rows) or (kind is GroupNorm and not rows and name == "liger")
    if case.device != "cuda" or not served or (name == "quack" and kind is not RMSNorm):
        return None
    if importlib.util.find_spec("liger_kernel" if name == "liger" else "quack") is None:
        return Absent(registry.label(kind), name, "not installed")
    return _liger(ours, case) if name == "liger" else _Quack(ours)


def _liger(ours: Norm, case: Case) -> nn.Module:
    layers = importlib.import_module("liger_kernel.transformers")
    eps: Any = ours.eps
    if isinstance(ours, RMSNorm):
        layer = layers.LigerRMSNorm(case.channels, eps=eps, in_place=False)  # in place it overwrites dy
    elif isinstance(ours, LayerNorm):
        layer = layers.LigerLayerNorm(case.channels, eps=eps, bias=True)
    else:
        group_norm = importlib.import_module("liger_kernel.transformers.group_norm")
        groups: Any = ours.sizes
        layer = group_norm.LigerGroupNorm(case.channels, groups["g"], eps=eps, bias=True)
    _share(layer, ours)
    return layer.to(case.device)


class _Quack(nn.Module):
    def __init__(self, ours: Norm) -> None:
        super().__init__()
        assert isinstance(ours.weight, Tensor)
        self.weight = nn.Parameter(ours.weight.detach().clone())
        self.eps = ours.eps
        self.rmsnorm: Callable[..., Tensor] = importlib.import_module("quack").rmsnorm

    def forward(self, x: Tensor) -> Tensor:
        """Quack's RMS norm of the last dimension."""
        return self.rmsnorm(x, self.weight, eps=self.eps)
