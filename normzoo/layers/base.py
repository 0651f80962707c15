"""The contract of a norm, and the norm that is a sentence."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from normzoo import ops
from normzoo.errors import NormzooError, OptionError, unknown_option
from normzoo.ops import Moments, Pattern, Running
from normzoo.ops.pattern import divisors

# bound here: a small norm asks both; by the id of the running backward pass torch.utils.checkpoint tells it, too
_compiling = torch.compiler.is_compiling
_graph_task = torch._C._current_graph_task_id


@dataclass(frozen=True)
class Traits:
    """What a norm promises. Declared here, proven by the checks.

    Attributes:
        batch_dependent: in training, the output of a sample depends on the other samples of the batch.
        causal: in evaluation, the output at position t does not depend on later positions.
        causal_in_training: the same in training.
        stateful: it keeps running statistics, so that training and evaluation differ.
        scale_invariant: in training, multiplying the input by a positive number changes nothing (up to eps).
        shift_invariant: in training, adding a number to all of the input changes nothing.
        includes_activation: the output has passed a non-linearity.
        stochastic: in training, it draws random numbers.
    """

    batch_dependent: bool
    causal: bool
    causal_in_training: bool
    stateful: bool = False
    scale_invariant: bool = False
    shift_invariant: bool = False
    includes_activation: bool = False
    stochastic: bool = False


@dataclass(frozen=True)
class Paper:
    """Where a norm comes from."""

    authors: str
    year: int
    title: str
    arxiv: str | None = None
    venue: str | None = None

    def __str__(self) -> str:
        where = f"arXiv {self.arxiv}" if self.arxiv else self.venue
        return f"{self.authors} {self.year}, {self.title}" + (f", {where}" if where else "")


class Norm(nn.Module, ABC):
    """A normalization layer: abstract; a subclass states its traits and its forward pass.

    Args:
        num_features: number of channels ``C``.
        channel_dim: ``1`` for input ``(N, C, *S)``, ``-1`` for input ``(N, *S, C)``; ``(N, C)`` is both.

    Raises:
        NormzooError: when ``num_features`` is not positive or ``channel_dim`` is neither 1 nor -1.
    """

    roles: ClassVar[Mapping[str, str]] = {"weight": "gain", "bias": "shift"}
    """What each parameter is to the optimizer; parameters not named are ``"other"``."""

    paper: ClassVar[Paper | None] = None

    expected_failures: ClassVar[Mapping[str, str]] = {}
    """Checks that this norm fails by design, and why."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, num_features: int, *, channel_dim: int = 1) -> None:
        super().__init__()
        if not isinstance(num_features, int) or num_features < 1:
            raise NormzooError(f"num_features is {num_features!r}; expected a positive number of channels")
        if channel_dim not in (1, -1):
            raise NormzooError(
                f"channel_dim is {channel_dim!r}; expected 1 for (N, C, *S), as images, or -1 for (N, *S, C), as tokens"
            )
        self.num_features = num_features
        self.channel_dim = channel_dim

    @property
    @abstractmethod
    def traits(self) -> Traits | None:
        """What this instance promises; ``None`` for a module that promises nothing."""

    @abstractmethod
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise ``x``; ``mask`` is ``(N, *S)``, true where a position is real.

        Masked positions take part in no statistic and come out as zero.
        """

    def check_input(self, x: Tensor, mask: Tensor | None) -> None:
        """Refuse what this norm was not built for.

        Raises:
            NormzooError: for a wrong number of channels, an integer tensor, or a mask that does not fit.
        """
        if x.ndim < 2 or x.size(self.channel_dim) != self.num_features:
            layout = f"(N, {self.num_features}, *S)" if self.channel_dim == 1 else f"(N, *S, {self.num_features})"
            raise NormzooError(
                f"{type(self).__name__} got input of shape {tuple(x.shape)}; expected {layout} with channel_dim="
                f"{self.channel_dim}. Channels elsewhere? channel_dim=1 is for images, channel_dim=-1 for tokens"
            )
        if not x.is_floating_point():
            raise NormzooError(f"{type(self).__name__} got input of dtype {x.dtype}; expected a floating-point tensor")
        if mask is not None:
            positions = x.shape[:1] + (x.shape[2:] if self.channel_dim == 1 else x.shape[1:-1])
            if mask.shape != positions or mask.dtype != torch.bool:
                raise NormzooError(
                    f"{type(self).__name__} got a mask of shape {tuple(mask.shape)} and dtype {mask.dtype} for input "
                    f"of shape {tuple(x.shape)}; expected shape {tuple(positions)} and torch.bool, true where a "
                    "position is real"
                )


class CanonicalNorm(Norm):
    """A norm that sees every input as ``(b, c, s)`` or ``(b, s, c)``: batch, channel, flattened positions."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise; see the class."""
        self.check_input(x, mask)
        if x.ndim == 2:
            canonical, channels_last = x.unsqueeze(1), True
        elif self.channel_dim == 1:
            canonical, channels_last = x.flatten(2), False
        else:
            canonical, channels_last = x.flatten(1, -2), True
        if mask is not None:
            mask = mask.flatten(1) if x.ndim > 2 else mask.unsqueeze(1)
        return self.normalize(canonical, mask, channels_last).view(x.shape)

    @abstractmethod
    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """The norm on ``(b, c, s)``, or ``(b, s, c)`` when ``channels_last``, with a mask of shape ``(b, s)``."""


class FormulaNorm(CanonicalNorm):
    r"""A norm that its author writes as a formula on ``(b, c, s)``; the rest of the contract is done here.

    The formula gets float32 or wider whatever the input, with zeros at masked positions; its result is scaled by
    :math:`\gamma` and shifted by :math:`\beta` for each channel, zeroed where masked, and returned in the layout
    and dtype of the input.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon` of the formula.
        affine: learn :math:`\gamma` (``weight``) and, where the norm has one, :math:`\beta` (``bias``).
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype.

    Example:
        >>> class MaxNorm(FormulaNorm):
        ...     "Divide each position by its largest channel."
        ...     traits = Traits(batch_dependent=False, causal=True, causal_in_training=True, scale_invariant=True)
        ...     def formula(self, x, mask):
        ...         return x / (x.abs().amax(1, keepdim=True) + self.eps)
        >>> MaxNorm(8, channel_dim=-1)(torch.ones(2, 5, 8)).max().round(decimals=3)
        tensor(1., grad_fn=<RoundBackward1>)
    """

    has_bias: ClassVar[bool] = True
    """Whether ``affine`` includes a shift."""

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, channel_dim=channel_dim)
        self.eps = checked_eps(eps)
        add_affine(self, affine, affine and self.has_bias, device, dtype)

    @abstractmethod
    def formula(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The norm without its affine part: ``x`` is ``(b, c, s)``, ``mask`` is ``(b, 1, s)`` or ``None``."""

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """Bring the input to the formula and its result back."""
        return through_formula(x, mask, channels_last, lambda z, real: self.rescale(self.formula(z, real)))

    def rescale(self, z: Tensor) -> Tensor:
        """Gain and shift of the formula's result; a formula that holds its own parameters returns it as it is."""
        return ops.affine(z, self.weight, self.bias, channels_last=False)

    def extra_repr(self) -> str:
        """The number of channels, eps and the layout."""
        layout = "" if self.channel_dim == 1 else ", channel_dim=-1"
        return f"{self.num_features}, eps={self.eps}{layout}"


def through_formula(
    x: Tensor, mask: Tensor | None, channels_last: bool, formula: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """Show canonical ``x`` to a formula as ``(b, c, s)``, in float32 or wider, zero where masked, and bring it back.

    The formula's second argument is the mask as ``(b, 1, s)``, or ``None``.
    """
    z = x.mT if channels_last else x
    real = None if mask is None else mask.unsqueeze(1)
    z = z if real is None else torch.where(real, z, 0)
    with ops.full_precision(x):
        z = formula(ops.wide(z), real)
    z = (z if real is None else torch.where(real, z, 0)).to(x.dtype)
    return z.mT if channels_last else z


def checked_eps(eps: float) -> float:
    """``eps`` if it can be added to a variance.

    Raises:
        NormzooError: when it is negative or not a number.
    """
    if not eps >= 0:
        raise NormzooError(f"eps is {eps!r}; expected a number that is not negative")
    return eps


def add_affine(
    norm: Norm, gain: bool, shift: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> None:
    """Give ``norm`` a ``weight`` of ones and a ``bias`` of zeros, or ``None`` in their place."""
    shape = (norm.num_features,)
    weight = nn.Parameter(torch.ones(shape, device=device, dtype=dtype)) if gain else None
    bias = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)) if shift else None
    norm.register_parameter("weight", weight)
    norm.register_parameter("bias", bias)


class MomentNorm(CanonicalNorm):
    r"""A norm stated as an einops pattern: which axes of ``b c s`` share a statistic.

    .. math:: y = \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}} + \beta

    with :math:`\mu` and :math:`\sigma^2` (biased) over all axes that the right side of the pattern does not name. A
    subclass gives the pattern; its options follow from it: ``groups`` and ``group_size`` for an axis ``g``, the axis's
    own name for any other, ``momentum``, ``track_running_stats`` and ``sync`` where samples share a statistic.

    Args:
        num_features: number of channels ``C``.
        eps: :math:`\varepsilon`, added to the variance.
        affine: learn :math:`\gamma` (``weight``) and :math:`\beta` (``bias``) for each channel.
        bias: learn :math:`\beta`; ``False`` leaves :math:`\gamma` alone.
        groups: number of groups, or ``"auto"``: the largest divisor of ``C`` up to 32 that leaves at least four
            channels a group.
        group_size: channels a group, in place of ``groups``.
        momentum: weight of the new value in the running averages, as in torch; ``None`` is the cumulative average.
        track_running_stats: keep running averages and use them in evaluation; otherwise the statistics are always
            those of the batch.
        sync: take the statistics over all processes of ``torch.distributed`` in training.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        device: where the parameters live.
        dtype: their dtype; running statistics are at least float32.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same; the mask is ``(N, *S)``.

    Raises:
        NormzooError: for options that do not fit the number of channels; in ``forward`` for one value per statistic.

    Example:
        >>> class HaloNorm(MomentNorm):
        ...     "Groups of channels share a statistic over the whole batch."
        ...     moments = "b (g c) s -> g"
        >>> HaloNorm(64, groups=8)
        HaloNorm(64, eps=1e-05, groups=8, momentum=0.1)
    """

    moments: ClassVar[str]
    """The pattern."""

    centred: ClassVar[bool] = True
    """Whether the mean is subtracted; otherwise the second moment takes the place of the variance."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of this norm's options where they differ from the usual ones."""

    min_count: ClassVar[int] = 2
    """How many values a statistic needs for an output that depends on the input."""

    pattern: ClassVar[Pattern]

    _own_steps: ClassVar[bool]  # whether it normalises in another way than by the one operation
    _own_update: ClassVar[bool]  # whether a batch is counted in another way than by moving the averages

    eps: float
    momentum: float | None
    sync: bool
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not isinstance(getattr(cls, "moments", None), str):
            raise NormzooError(f"{cls.__name__} is a MomentNorm without a pattern; state it: moments = 'b c s -> c'")
        cls.pattern = Pattern.parse(cls.moments)
        steps = ((cls.normalize, MomentNorm.normalize), (cls.standardize, MomentNorm.standardize))
        cls._own_steps = any(own is not plain for own, plain in steps)
        cls._own_update = cls.update is not MomentNorm.update or cls.pattern.kept != cls.pattern.population.kept
        if cls.__init__ is MomentNorm.__init__:
            keyword = inspect.Parameter.KEYWORD_ONLY
            cls.__signature__ = inspect.Signature(
                [inspect.Parameter("num_features", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=int)]
                + [inspect.Parameter(name, keyword, default=value) for name, value in cls._options().items()]
            )
        elif "__init__" in vars(cls):  # the parent's would hide it
            own = list(inspect.signature(cls.__init__).parameters.values())[1:]
            cls.__signature__ = inspect.Signature(own)

    @classmethod
    def _options(cls) -> dict[str, Any]:
        """Every option this pattern has, with its default."""
        options: dict[str, Any] = {"eps": 1e-5, "affine": True}
        if cls.centred:
            options["bias"] = True
        for axis in cls.pattern.free:
            options |= {"groups": "auto", "group_size": None} if axis == "g" else {axis: inspect.Parameter.empty}
        if cls.pattern.batch_dependent:
            options |= {"momentum": 0.1, "track_running_stats": True}
            if cls.pattern.synchronizable:
                options["sync"] = False
        return options | dict(cls.defaults) | {"channel_dim": 1, "device": None, "dtype": None}

    def __init__(
        self,
        num_features: int,
        *,
        channel_dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, channel_dim=channel_dim)
        known = self._options()
        if extra := [name for name in options if name not in known]:
            raise unknown_option(type(self).__name__, extra[0], known)
        options = known | options
        if missing := [name for name, value in options.items() if value is inspect.Parameter.empty]:
            raise OptionError(
                f"{type(self).__name__} with the pattern {self.moments!r} needs the option {missing[0]!r}"
            )
        self.eps = checked_eps(options["eps"])
        self.sizes = self._sizes(num_features, options)
        self.enough = self._enough()
        # the repr shows what was chosen: eps, sizes and momentum always, the rest where it is not the default
        self._shown = {"eps": self.eps, **{"groups" if axis == "g" else axis: n for axis, n in self.sizes.items()}}
        quiet = ("channel_dim", "device", "dtype", "group_size", *self._shown)
        self._shown |= {name: value for name, value in options.items() if value != known[name] and name not in quiet}

        add_affine(self, options["affine"], options["affine"] and options.get("bias", False), device, dtype)
        self.momentum = options.get("momentum")
        if self.momentum is not None and not 0 <= self.momentum <= 1:
            raise NormzooError(
                f"momentum is {self.momentum!r}; expected a number from 0 to 1, the weight of the new value as in "
                "torch, or None for the cumulative average"
            )
        self.sync = options.get("sync", False)
        self.process_group: ProcessGroup | None = None
        self.hold = False
        self.remembered: tuple[str, ...] = ()
        self.track_running_stats = options.get("track_running_stats", False)
        if self.track_running_stats:
            self._shown["momentum"] = self.momentum
            shape = self._population_shape()
            dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
            if self.centred:
                self.register_buffer("running_mean", torch.zeros(shape, device=device, dtype=dtype))
            else:
                self.running_mean = None
            self.register_buffer("running_var", torch.ones(shape, device=device, dtype=dtype))
            self.register_buffer("num_batches_tracked", torch.zeros((), device=device, dtype=torch.long))
        else:
            self.running_mean = self.running_var = self.num_batches_tracked = None

    # ---- what the pattern says ---------------------------------------------------------------------------------

    def _sizes(self, channels: int, options: Mapping[str, Any]) -> dict[str, int]:
        sizes = {axis: options[axis] for axis in self.pattern.free if axis != "g"}
        if "g" in self.pattern.free:
            sizes["g"] = choose_groups(channels, options["groups"], options["group_size"])
        for axis, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise OptionError(f"{type(self).__name__}: {axis}={size!r}; expected a positive whole number")
        self.pattern.population.sizes((1, channels, 1), sizes)  # refuses what does not divide
        return sizes

    def _enough(self) -> float:
        """So many values in an input, whatever its shape, are enough for each statistic."""
        kept, population = self.pattern.kept, self.pattern.population.kept
        sizes = self.pattern.population.sizes((1, self.num_features, 1), self.sizes)
        if not self.centred or math.prod(sizes[a] for a in self.pattern.factors[1] if a not in kept) >= self.min_count:
            return 0
        return self.min_count * math.prod(sizes[a] for a in kept) if kept == population else math.inf

    def _population_shape(self) -> tuple[int, ...]:
        if "s" in self.pattern.kept:
            raise OptionError(
                f"{type(self).__name__}: the pattern {self.moments!r} keeps positions apart, and running statistics "
                "would need their number; give track_running_stats=False, or one norm for each position"
            )
        sizes = self.pattern.population.sizes((1, self.num_features, 1), self.sizes)
        return tuple(sizes[axis] for axis in self.pattern.population.kept)

    @property
    def synchronizable(self) -> bool:
        """Whether the statistics can be taken over several processes."""
        return self.pattern.synchronizable

    @property
    def traits(self) -> Traits:
        """Derived from the pattern."""
        pattern = self.pattern
        return Traits(
            batch_dependent=pattern.batch_dependent,
            causal=self.track_running_stats or not pattern.position_dependent,
            causal_in_training=not pattern.position_dependent,
            stateful=self.track_running_stats,
            scale_invariant=True,
            shift_invariant=self.centred,
        )

    # ---- the computation -----------------------------------------------------------------------------------------

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise; see the class."""
        if self._own_steps:
            return super().forward(x, mask)  # they see the canonical form
        self.check_input(x, mask)
        return self.normalize(x, mask, self.channel_dim == -1)  # the operation takes any rank: no views to pay for

    def normalize(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> Tensor:
        """The norm on ``(b, c, *s)`` or ``(b, *s, c)``, with a mask of shape ``(b, *s)``."""
        if self.evaluates:
            return self.standardize(x, mask, channels_last, given=self.population())[0]
        self.check_count(x, mask, channels_last)
        running = self.running() if self.counts else None
        y, moments = self.standardize(x, mask, channels_last, running=running)
        if moments is not None:
            self.update(moments)
        return y

    def standardize(
        self,
        x: Tensor,
        mask: Tensor | None,
        channels_last: bool,
        *,
        given: Moments | None = None,
        affine: bool = True,
        rescale: Callable[[Moments], tuple[Tensor | None, Tensor | None]] | None = None,
        running: Running | None = None,
    ) -> tuple[Tensor, Moments | None]:
        """The one operation, with this norm's pattern, sizes and parameters."""
        group = self.process_group
        return ops.standardize(
            x,
            self.pattern if given is None else self.pattern.population,
            self.sizes,
            channels_last=channels_last,
            eps=self.eps,
            weight=self._parameter("weight") if affine else None,
            bias=self._parameter("bias") if affine else None,
            centred=self.centred,
            mask=mask,
            given=given,
            rescale=rescale,
            running=running,
            sync=self.sync and self.training and given is None and world_size(group) > 1,
            group=group,
        )

    def _parameter(self, name: str) -> Tensor | None:
        """The attribute, by the dictionary that the module would look into last."""
        known = self._parameters
        return known[name] if name in known else getattr(self, name)

    def check_count(self, x: Tensor, mask: Tensor | None, channels_last: bool) -> None:
        """Refuse statistics over one value: their output is the bias whatever the input.

        What a mask leaves is not looked at, nor what other processes have: reading it would wait for the device.
        """
        if x.numel() >= self.enough or self.sync or x.numel() == 0:
            return
        b, c = x.shape[0], self.num_features
        s = x.numel() // (b * c)
        sizes = self.pattern.sizes((b, c, s), self.sizes)
        count = x.numel()
        for axis in self.pattern.kept:
            count //= sizes[axis]
        if count < self.min_count:
            raise NormzooError(
                f"{type(self).__name__} ({self.moments}) got one value per statistic from input with {b} samples, {c} "
                f"channels and {s} positions: centred, it is zero whatever the input. Use larger batches or feature "
                "maps (drop_last=True for a last batch of one), or a norm whose statistics span more (layer_norm, "
                "group_norm with fewer groups)"
            )

    # ---- the running statistics -----------------------------------------------------------------------------------

    @property
    def evaluates(self) -> bool:
        """Whether this forward pass uses the running statistics."""
        return self.track_running_stats and not self.training

    @property
    def counts(self) -> bool:
        """Whether this forward pass counts: in training, not held, and not repeated inside a backward pass."""
        return self.track_running_stats and self.training and not self.hold and not in_backward()

    def population(self) -> Moments:
        """The running statistics, as they are used in evaluation."""
        var = self.recall("running_var")
        return Moments(torch.zeros_like(var) if self.running_mean is None else self.recall("running_mean"), var, 1.0)

    def running(self) -> Running | None:
        """The running averages, where counting a batch is nothing more than moving them."""
        if self.momentum is None or self.remembered or self._own_update:
            return None
        buffers = self._buffers
        var, batches = buffers["running_var"], buffers["num_batches_tracked"]
        if var is None or batches is None or var.dtype != torch.float32:
            return None
        return Running(buffers.get("running_mean"), var, batches, self.momentum)

    def remember(self, *names: str) -> None:
        """Keep these buffers as they were before the latest batch as well, for :meth:`recall`.

        For a norm whose training depends on its buffers: a forward pass that activation checkpointing repeats must
        see what the first one saw, which then has counted its batch.
        """
        self.remembered = names
        for name in names:
            self.register_buffer(f"before_{name}", self.get_buffer(name).clone(), persistent=False)

    def recall(self, name: str) -> Tensor:
        """A buffer as this forward pass has to see it: a copy, wherever a graph may need it after the next batch."""
        if not self.training and (
            not torch.is_grad_enabled() or torch.compiler.is_exporting() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        ):
            return getattr(self, name)
        before = self.training and name in self.remembered and not self.hold and in_backward()
        return snapshot(getattr(self, f"before_{name}" if before else name))

    @torch.no_grad()
    def update(self, moments: Moments) -> None:
        """Count a training batch into the running statistics: the mean, and the unbiased variance as torch does.

        A forward pass that activation checkpointing repeats inside the backward pass is not counted again.
        """
        if not self.counts:
            return
        running = self.running()
        if running is not None and ops.allowed("cpu") and ops.cpu.track(running, moments, self.centred):
            return
        assert self.running_var is not None
        mean, var, number = moments
        shape = self.running_var.shape
        if self.centred:
            var = unbiased(var, number)
        if var.shape != shape:  # virtual batches: each counts the same, one without a real position not at all
            numbers = torch.as_tensor(number, device=var.device).expand(var.shape).reshape(-1, *shape)
            share = (numbers > 0).to(var.dtype) / (numbers > 0).sum(0).clamp(min=1)
            mean, var = (mean.reshape(-1, *shape) * share).sum(0), (var.reshape(-1, *shape) * share).sum(0)
            number = numbers.amax(0) if isinstance(number, Tensor) else number
        self.track(number, {"running_var": var} | ({} if self.running_mean is None else {"running_mean": mean}))

    @torch.no_grad()
    def track(
        self, number: Tensor | float, averaged: Mapping[str, Tensor], written: Mapping[str, Tensor] | None = None
    ) -> None:
        """Count a batch of so many real elements, unless there are none or this forward pass does not count.

        Args:
            number: the elements of each statistic, or of all: a tensor where a mask or other processes decide.
            averaged: new values for running averages.
            written: new values of other buffers.
        """
        if not self.counts or (not isinstance(number, Tensor) and number == 0):
            return
        assert self.num_batches_tracked is not None
        for name in self.remembered:
            self.get_buffer(f"before_{name}").copy_(self.get_buffer(name))
        self.num_batches_tracked.add_((number > 0).any() if isinstance(number, Tensor) else 1)
        for name, value in averaged.items():
            running = self.get_buffer(name)
            weight = self.latest_weight(running.dtype)
            if isinstance(number, Tensor):
                weight = weight * (number > 0).to(running.dtype)  # no real position, no news
            running.lerp_(value.to(running.dtype), weight)
        for name, value in (written or {}).items():
            buffer = self.get_buffer(name)
            value = value.to(buffer.dtype).view(buffer.shape)
            buffer.copy_(torch.where((number > 0).any(), value, buffer) if isinstance(number, Tensor) else value)

    def latest_weight(self, dtype: torch.dtype) -> Tensor | float:
        """The weight of the latest batch, which is counted already, in the running averages."""
        if self.momentum is not None:
            return self.momentum
        assert self.num_batches_tracked is not None
        return self.num_batches_tracked.clamp(min=1).to(dtype).reciprocal()

    def reset_running_stats(self) -> None:
        """Forget the running statistics."""
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = getattr(self, name)
            if buffer is not None:
                buffer.fill_(1 if name == "running_var" else 0)
        for name in self.remembered:
            self.get_buffer(f"before_{name}").copy_(self.get_buffer(name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MomentNorm:
        # a running average in half precision would stop moving
        with wide_buffers(self):
            super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """The options that differ from their defaults, and the choices that were made."""
        layout = [] if self.channel_dim == 1 else ["channel_dim=-1"]
        return ", ".join([str(self.num_features), *(f"{k}={v!r}" for k, v in self._shown.items()), *layout])


@contextmanager
def wide_buffers(module: nn.Module) -> Iterator[None]:
    """Let a module's own buffers stay float32 or wider while it is cast: mixed precision casts whole modules."""
    before = {name: b for name, b in module._buffers.items() if b is not None and b.dtype.is_floating_point}
    yield
    for name, buffer in before.items():
        after = module._buffers[name]
        if after is not None and after.dtype in (torch.float16, torch.bfloat16):
            module._buffers[name] = buffer.to(after.device)


def choose_groups(channels: int, groups: int | Literal["auto"], group_size: int | None) -> int:
    """The number of groups that the options ask for.

    >>> choose_groups(64, "auto", None), choose_groups(256, "auto", None), choose_groups(64, "auto", 2)
    (16, 32, 32)

    Raises:
        OptionError: when both are given, or the choice does not divide ``channels``.
    """
    if group_size is not None:
        if groups != "auto":
            raise OptionError(f"groups={groups!r} and group_size={group_size!r} are both given; give one")
        if not isinstance(group_size, int) or group_size < 1 or channels % group_size:
            raise OptionError(
                f"group_size={group_size!r} does not divide {channels} channels; expected one of {divisors(channels)}"
            )
        return channels // group_size
    if groups == "auto":
        return max(d for d in divisors(channels) if d == 1 or (d <= 32 and channels // d >= 4))
    if not isinstance(groups, int) or groups < 1 or channels % groups:
        raise OptionError(
            f"groups={groups!r} does not divide {channels} channels; expected 'auto' or one of {divisors(channels)}"
        )
    return groups


def unbiased(var: Tensor, number: Tensor | float) -> Tensor:
    """The unbiased variance of so many elements from the biased one.

    >>> unbiased(torch.tensor([2.0]), 5.0)
    tensor([2.5000])
    """
    return var * (number / (number - 1).clamp(min=1) if isinstance(number, Tensor) else number / max(number - 1, 1))


def snapshot(buffer: Tensor) -> Tensor:
    """A copy of a buffer that is written to later, in the same forward pass or before the backward pass is over."""
    if torch.compiler.is_compiling():
        # A compiled backward pass makes plain copies anew instead of saving them, from what is in the buffer by then.
        # It saves the result of a scan, which over a single element is a copy.
        return buffer.unsqueeze(0).cumsum(0).squeeze(0)
    return buffer.clone()


def in_backward() -> bool:
    """Whether this forward pass is repeated inside a backward pass, as activation checkpointing does."""
    return not _compiling() and _graph_task() != -1


def world_size(group: ProcessGroup | None) -> int:
    """Number of processes that share statistics: one where ``torch.distributed`` is not set up."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(group)


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """The role of every parameter that belongs to a norm (``"gain"``, ``"shift"``, …), by its name in ``model``.

    >>> from normzoo import create
    >>> parameter_roles(nn.Sequential(nn.Linear(4, 8), create("layer_norm", 8)))
    {'1.weight': 'gain', '1.bias': 'shift'}
    """
    roles: dict[str, str] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, Norm):  # an inner norm comes later and speaks for its own parameters
            for name, _ in module.named_parameters():
                path = f"{prefix}.{name}" if prefix else name
                roles[path] = module.roles.get(name, "other")
    return roles


@contextmanager
def hold_statistics(model: nn.Module) -> Iterator[None]:
    """Let forward passes in training mode leave the running statistics alone.

    For a batch that is passed a second time: sharpness-aware minimisation, a line search, a probe.
    """
    norms = [module for module in model.modules() if isinstance(module, MomentNorm)]
    before = [norm.hold for norm in norms]
    for norm in norms:
        norm.hold = True
    try:
        yield
    finally:
        for norm, hold in zip(norms, before, strict=True):
            norm.hold = hold
