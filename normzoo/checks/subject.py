"""A norm under examination: how the checks make it, feed it and compare what it answers."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from normzoo.errors import NormzooError
from normzoo.layers.base import MomentNorm, Norm, Traits
from normzoo.layers.foreign import ForeignNorm
from normzoo.ops.pattern import Pattern
from normzoo.registry import Spec, create, label, own_frames, resolve

if TYPE_CHECKING:
    from normzoo.checks.inference import Inferred

ROWS = (6, 10)  # samples, then positions
IMAGES = (6, 4, 5)
HALVES = (torch.float16, torch.bfloat16)

_WIDTHS = (8, 12, 16, 32, 64, 96, 128, 256)


class CheckFailed(AssertionError):
    """A norm does not do what it should; the message says what it did."""


class NotApplicable(Exception):
    """There is nothing to check; the message says why."""


class Subject:
    """A norm as the checks see it.

    Args:
        spec: as for :func:`normzoo.create`.

    Attributes:
        spec: what was given.
        name: a short name for messages.
        channels: the smallest width of a short list that the norm can be made for.
        traits: what the norm declares; ``None`` for a plain module.

    Raises:
        NormzooError: when the norm cannot be made for any width, or is an instance.

    Example:
        >>> subject = Subject("group_norm")
        >>> subject.channels, subject.traits.batch_dependent, subject.takes("groups")
        (8, False, True)
    """

    def __init__(self, spec: Spec) -> None:
        if isinstance(spec, nn.Module):
            raise NormzooError(
                f"got a module, {type(spec).__name__}; expected what makes one from a width: the class, its name, or "
                f"functools.partial({type(spec).__name__}, …)"
            )
        self.spec = spec
        self.name = label(spec)
        resolve(spec)  # once: a file that raises is not tried again for each width
        self.channels, self._example = self._first()
        self.traits: Traits | None = self._example.traits

    def _first(self) -> tuple[int, Norm]:
        refusals: list[Exception] = []
        for width in _WIDTHS:
            try:
                return width, create(self.spec, width)
            except Exception as refusal:  # somebody else's code: it may raise anything
                refusals.append(refusal)
        if isinstance(refusals[0], NormzooError):
            raise refusals[0]
        where = "".join(f" ({frame.filename}, line {frame.lineno})" for frame in own_frames(refusals[0])[-1:])
        raise NormzooError(
            f"{self.name} cannot be made from a width alone: norm({_WIDTHS[0]}) raised "
            f"{type(refusals[0]).__name__}: {refusals[0]}{where}. Give other arguments defaults, or bind them by "
            "functools.partial"
        ) from refusals[0]

    # ---- what is known -------------------------------------------------------------------------------------------

    @cached_property
    def options(self) -> Mapping[str, Any]:
        """The options of the constructor and their defaults."""
        factory, _ = resolve(self.spec)
        try:
            parameters = list(inspect.signature(factory).parameters.values())
        except (TypeError, ValueError):
            return {}
        return {p.name: p.default for p in parameters[1:] if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}

    def takes(self, option: str) -> bool:
        """Whether the constructor has this option and the spec leaves it open."""
        return option in self.options and option not in resolve(self.spec)[1]

    def need(self, *options: str) -> None:
        """Go on only if the constructor has these options.

        Raises:
            NotApplicable: when it has not.
        """
        for option in options:
            if not self.takes(option):
                raise NotApplicable(f"has no open option {option!r}")

    def declared(self) -> Traits:
        """The declared traits.

        Raises:
            NotApplicable: for a plain module.
        """
        if self.traits is None:
            raise NotApplicable("undeclared")
        return self.traits

    @property
    def expected_failures(self) -> Mapping[str, str]:
        """The checks that the norm itself says it fails, and why: a paper that stops a gradient, for instance."""
        return self._example.expected_failures

    @property
    def foreign(self) -> bool:
        """Whether it is a plain module that knows nothing of the contract."""
        return isinstance(self._example, ForeignNorm)

    @cached_property
    def inferred(self) -> Inferred:
        """What the norm does, found out by trying."""
        from normzoo.checks.inference import examine

        return examine(self)

    @property
    def stateful(self) -> bool:
        """Whether it keeps statistics: as declared, or as found for a plain module."""
        return self.traits.stateful if self.traits is not None else bool(self.inferred.stateful)

    def need_state(self) -> None:
        """Go on only for a norm that keeps statistics.

        Raises:
            NotApplicable: for any other.
        """
        if not self.stateful:
            raise NotApplicable("keeps no statistics")

    @property
    def stated(self) -> tuple[Pattern, Mapping[str, int]] | None:
        """The moments pattern that the norm states, and the sizes of its own axes; ``None`` where it states none."""
        return (self._example.pattern, self._example.sizes) if isinstance(self._example, MomentNorm) else None

    @property
    def virtual_batches(self) -> bool:
        """Whether its pattern cuts the batch into parts, which follow the order and the number of the samples."""
        return isinstance(self._example, MomentNorm) and self._example.pattern.factors[0] != ("b",)

    @property
    def stochastic(self) -> bool:
        """Whether it is declared to draw random numbers in training."""
        return self.traits is not None and self.traits.stochastic

    @property
    def takes_mask(self) -> bool:
        """Whether ``forward`` takes a mask: every norm of the contract does, a plain module may."""
        return self._example.takes_mask if isinstance(self._example, ForeignNorm) else True

    def need_mask(self) -> None:
        """Go on only for a norm that takes masks.

        Raises:
            NotApplicable: for any other.
        """
        if not self.takes_mask:
            raise NotApplicable("takes no mask")

    # ---- norms and data ------------------------------------------------------------------------------------------

    def make(
        self,
        options: Mapping[str, Any] | None = None,
        *,
        channel_dim: int = 1,
        dtype: torch.dtype = torch.float64,
        fresh: bool = False,
        training: bool = True,
        channels: int | None = None,
    ) -> Norm:
        """A norm, with parameters away from their initial values unless ``fresh``; always the same ones."""
        norm = create(self.spec, self.channels if channels is None else channels, channel_dim, **(options or {}))
        if not fresh:
            randomize(norm)
        if isinstance(norm, ForeignNorm):
            _settle(norm)
        return norm.to(dtype).train(training)

    def data(
        self,
        shape: tuple[int, ...] = ROWS,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float64,
        channel_dim: int = 1,
        channels: int | None = None,
        peak: float | None = None,
    ) -> Tensor:
        """Deterministic input of ``shape`` (samples, then positions): samples and channels differ in mean and spread.

        With ``peak``, the largest magnitude is that.
        """
        channels = self.channels if channels is None else channels
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(*shape, channels, generator=generator, dtype=torch.float64)
        spread = torch.linspace(0.7, 1.8, channels, dtype=torch.float64)
        sample = torch.linspace(-0.6, 0.9, shape[0], dtype=torch.float64).view(-1, *[1] * (x.ndim - 1))
        x = x * spread + 1.2 * spread.flip(0) + sample
        if peak is not None:
            x = x * (peak / x.abs().max())
        x = x.to(dtype)
        return x if channel_dim == -1 else x.movedim(-1, 1).contiguous()


def _settle(norm: ForeignNorm) -> None:
    """Let a plain module find its layouts now, and not inside a compiler or a transformation."""
    before = copy.deepcopy(norm.state_dict())
    with torch.no_grad():
        for positions in ((), (3,), (3, 2)):
            shape = (2, norm.num_features, *positions) if norm.channel_dim == 1 else (2, *positions, norm.num_features)
            with contextlib.suppress(NormzooError):  # a layout that it refuses is for the checks to report
                norm.eval()(torch.ones(shape))
    norm.load_state_dict(before)


def randomize(norm: Norm) -> None:
    """Move parameters away from their initial values, which hide faults: gains to 0.5…1.5, shifts to -0.5…0.5."""
    generator = torch.Generator().manual_seed(7)
    roles = norm.roles
    with torch.no_grad():
        for name, parameter in norm.named_parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            role = (
                roles.get(name, "other") if parameter.ndim <= 1 or parameter.numel() == norm.num_features else "other"
            )
            if role == "gain":
                parameter.copy_(0.5 + noise)
            elif role == "shift":
                parameter.copy_(noise - 0.5)
            else:
                parameter.add_(0.1 * (noise - 0.5))


def call(norm: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The norm's output; random numbers, if it draws any, are the same in every call."""
    torch.manual_seed(0)
    return norm(x) if mask is None else norm(x, mask)


def twin(norm: Norm) -> Norm:
    """An independent copy, statistics included."""
    return copy.deepcopy(norm)


def outside(like: Tensor) -> Tensor:
    """A fixed gradient from outside, for an output like ``like``."""
    return (
        torch.linspace(-9, 9, like.numel(), dtype=torch.float64, device=like.device)
        .sin()
        .view(like.shape)
        .to(like.dtype)
    )


def gradients(norm: Norm, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Output, and the gradients of a fixed functional of it for the input and every parameter."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = call(norm, x, mask)
    inputs = {"the input": x, **dict(norm.named_parameters())}
    grads: tuple[Tensor | None, ...] = tuple(
        torch.autograd.grad(y, list(inputs.values()), outside(y), allow_unused=True)
        if y.requires_grad
        else [None] * len(inputs)
    )
    found = {"the output": y.detach()}
    return found | {f"the gradient of {k}": g for k, g in zip(inputs, grads, strict=True) if g is not None}


def state(norm: nn.Module) -> dict[str, Tensor]:
    """A copy of all buffers."""
    return {name: buffer.detach().clone() for name, buffer in norm.named_buffers()}


def through_file(saved: Any) -> Any:
    """What ``torch.load`` reads where ``torch.save`` wrote."""
    stream = io.BytesIO()
    torch.save(saved, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


# ---- comparisons -----------------------------------------------------------------------------------------------------


def same(got: Tensor, expected: Tensor, what: str, tolerance: float = 1e-9) -> None:
    """Two tensors agree, up to ``tolerance`` times the largest magnitude expected.

    Raises:
        CheckFailed: when they do not.
    """
    if got.shape != expected.shape:
        raise CheckFailed(f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if not expected.numel():
        return
    got, expected = got.detach().double(), expected.detach().double()
    if not got.isfinite().all():
        raise CheckFailed(f"{what}: {_count(~got.isfinite())} values are not finite")
    scale = max(float(expected.abs().max()), 1e-5)  # differences of rounding errors mean nothing
    error = float((got - expected).abs().max())
    if not error <= tolerance * scale:
        zero = "; all of it is zero" if not got.any() else ""
        raise CheckFailed(
            f"{what}: off by up to {error:.2g} where values reach {scale:.2g} (allowed {tolerance:.0e} of it){zero}"
        )


def all_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str, tolerance: float = 1e-9) -> None:
    """Two collections of tensors agree.

    Raises:
        CheckFailed: with the first that does not.
    """
    if missing := [name for name in expected if name not in got]:
        raise CheckFailed(f"{where}: {missing[0]} is missing")
    for name, value in expected.items():
        same(got[name], value, f"{where}: {name}", tolerance)


def finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Nothing is NaN or infinite.

    Raises:
        CheckFailed: when something is.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            kind = "NaN" if tensor.isnan().any() else "infinite"
            raise CheckFailed(f"{where}: {name} is {kind} at {_count(~tensor.isfinite())} of {tensor.numel()} values")


def _count(wrong: Tensor) -> int:
    return int(wrong.sum())


def require(condition: bool, message: str) -> None:
    """Raise unless the condition holds.

    Raises:
        CheckFailed: with the message.
    """
    if not condition:
        raise CheckFailed(message)
