"""What the models share: what goes in, which norm goes where, and the list of their names."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from normzoo.errors import NormzooError, unknown, unknown_option
from normzoo.layers.none import NoNorm
from normzoo.registry import create, label, resolve

Family = Literal["mlp", "cnn", "rnn", "transformer"]
Spec = str | Callable[[int], nn.Module]
NormChoice = Spec | Mapping[str, Spec]
"""One norm for the whole model, or one for each pattern of sites; see :class:`Sites`."""


@dataclass(frozen=True)
class Inputs:
    """What one sample looks like to a model.

    Attributes:
        shape: Shape of one sample without the batch: any shape for ``mlp``, ``(C, H, W)`` for ``cnn``, ``(T, F)`` for
            ``rnn`` and ``transformer``, or ``(T,)`` for symbols.
        vocabulary: Number of symbols; 0 when the values are continuous.
        per_position: The model answers at every position, not once per sample.

    Raises:
        NormzooError: for sizes that are not positive, and for symbols that are not a sequence ``(T,)``.
    """

    shape: tuple[int, ...]
    vocabulary: int = 0
    per_position: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if not self.shape or any(not _is_whole(size, 1) for size in self.shape):
            raise NormzooError(f"inputs of shape {self.shape!r}; expected positive whole numbers, without the batch")
        if not _is_whole(self.vocabulary, 0):
            raise NormzooError(
                f"vocabulary={self.vocabulary!r}; expected the number of symbols, or 0 for continuous values"
            )
        if self.vocabulary and len(self.shape) != 1:
            raise NormzooError(f"symbols of shape {self.shape}; expected (T,), one symbol at each position")


class Sites:
    """The norm of each named site of a model.

    A choice is one spec for all sites, or a mapping from patterns to specs. A pattern is matched, as in
    :mod:`fnmatch`, against the site's whole name (``"blocks.0.attention"``) and against its last part
    (``"attention"``); the first pattern in the mapping that matches wins, and ``"*"`` is always tried last. Every
    site needs a norm (``"none"`` is one) and every pattern a site.

    Used as a context while a model is built: the patterns are checked when it ends.

    Args:
        norm: a spec, or a mapping from patterns to specs.
        channel_dim: where the model keeps its channels, 1 or -1.
        momentum: weight of the new value in the running averages, for the norms that have this option and whose spec
            does not give it.

    Raises:
        NormzooError: for a site without a norm, or a pattern without a site.

    Example:
        >>> with Sites({"final": "rms_norm", "*": "layer_norm"}, channel_dim=-1) as norm_at:
        ...     first, final = norm_at("blocks.0.attention", 8), norm_at("final", 8)
        >>> type(first).__name__, type(final).__name__
        ('LayerNorm', 'RMSNorm')
    """

    def __init__(self, norm: NormChoice, *, channel_dim: int, momentum: float | None = None) -> None:
        choices = dict(norm) if isinstance(norm, Mapping) else {"*": norm}
        if not choices:
            raise NormzooError("the mapping from sites to norms is empty; give {'*': norm} for one norm everywhere")
        self.choices = {p: choices[p] for p in sorted(choices, key=lambda pattern: pattern == "*")}
        self.channel_dim = channel_dim
        self.momentum = momentum
        self.known: list[str] = []

    def __call__(self, site: str, num_features: int) -> nn.Module:
        """The norm of a site, over ``num_features`` channels."""
        self.known.append(site)
        for pattern, spec in self.choices.items():
            if _matches(site, pattern):
                return self._create(spec, num_features)
        raise NormzooError(f"no norm is given for the site {site!r}; add it, or '*' for every site that is not named")

    def _create(self, spec: Spec, num_features: int) -> nn.Module:
        factory, given = resolve(spec)
        given = given | getattr(factory, "keywords", {})  # a partial binds options too
        options = {}
        if self.momentum is not None and "momentum" not in given and _has_option(factory, "momentum"):
            options["momentum"] = self.momentum
        return create(spec, num_features, channel_dim=self.channel_dim, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            return
        for pattern in self.choices:
            if pattern != "*" and not any(_matches(site, pattern) for site in self.known):
                parts = {site.rpartition(".")[2] for site in self.known}
                raise unknown("site of a norm", pattern, parts | set(self.known))


def refuse_norm(owner: str, norm: NormChoice) -> None:
    """Take ``"none"`` alone, for a network that has no place for a norm.

    Raises:
        NormzooError: for any other norm.
    """
    for spec in norm.values() if isinstance(norm, Mapping) else (norm,):
        if resolve(spec)[0] is not NoNorm:
            raise NormzooError(f"{owner} has no norms, and got norm={label(spec)!r}; give norm='none'")


def _matches(site: str, pattern: str) -> bool:
    return fnmatchcase(site, pattern) or fnmatchcase(site.rpartition(".")[2], pattern)


def _has_option(factory: Callable[..., nn.Module], option: str) -> bool:
    try:
        return option in inspect.signature(factory).parameters
    except ValueError:  # a builtin without a signature
        return False


class Network(nn.Module):
    """A model: what it takes, what it gives, and the check that what it gets is what it was built for.

    Args:
        inputs: what one sample looks like.
        outputs: width of the answer.

    Raises:
        NormzooError: for inputs that this family of models does not take.
    """

    family: ClassVar[Family]
    norm_free: ClassVar[bool] = False
    """Whether it does without norms, and takes ``norm="none"`` alone."""

    def __init__(self, inputs: Inputs, outputs: int) -> None:
        super().__init__()
        whole_number("outputs", outputs)
        sequence = self.family in ("rnn", "transformer")
        if sequence and len(inputs.shape) != (1 if inputs.vocabulary else 2):
            raise self._refusal(inputs, "sequences: shape (T, F), or (T,) with a vocabulary")
        if not sequence and (inputs.vocabulary or inputs.per_position):
            raise self._refusal(inputs, "continuous values, and answers once per sample; rnn and transformer take more")
        if self.family == "cnn" and len(inputs.shape) != 3:
            raise self._refusal(inputs, "images: shape (C, H, W)")
        self.inputs = inputs
        self.outputs = outputs

    def _refusal(self, inputs: Inputs, expected: str) -> NormzooError:
        return NormzooError(f"a model of the family {self.family} got {inputs}; it takes {expected}")

    @property
    def features(self) -> int:
        """Number of values in one sample."""
        return math.prod(self.inputs.shape)

    def admit(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Check a batch, and set whatever is in its padding to zero.

        Raises:
            NormzooError: when the batch is not what the model was built for.
        """
        shape = self.inputs.shape
        sequence = self.family in ("rnn", "transformer")
        fits = x.ndim == len(shape) + 1 and (x.shape[2:] == shape[1:] if sequence else x.shape[1:] == shape)
        if not fits or x.is_floating_point() == bool(self.inputs.vocabulary):
            raise NormzooError(
                f"{type(self).__name__} got x of shape {tuple(x.shape)} and dtype {x.dtype}; it was built for "
                f"(N, {', '.join(map(str, shape))}) {'integers' if self.inputs.vocabulary else 'floats'}"
            )
        if mask is None:
            return x
        if not sequence:
            raise NormzooError(f"{type(self).__name__} got a mask; only sequences have positions to mask")
        if mask.shape != x.shape[:2] or mask.dtype != torch.bool:
            raise NormzooError(
                f"{type(self).__name__} got a mask of shape {tuple(mask.shape)} and dtype {mask.dtype}; expected "
                f"{tuple(x.shape[:2])} and torch.bool, true where a position is real"
            )
        return torch.where(mask if x.ndim == 2 else mask.unsqueeze(-1), x, 0)


# ---- options ---------------------------------------------------------------------------------------------------------


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def whole_number(name: str, value: object, least: int = 1) -> int:
    """``value`` when it is a whole number of at least ``least``.

    Raises:
        NormzooError: otherwise.
    """
    if not isinstance(value, int) or not _is_whole(value, least):
        raise NormzooError(f"{name}={value!r}; expected a whole number of at least {least}")
    return value


def whole_numbers(name: str, values: object) -> tuple[int, ...]:
    """``values`` as a tuple when they are positive whole numbers.

    Raises:
        NormzooError: otherwise.
    """
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise NormzooError(f"{name}={values!r}; expected several whole numbers, (64, 64) say")
    return tuple(whole_number(name, value) for value in values)


def one_of(name: str, value: str, known: Iterable[str]) -> str:
    """``value`` when it is known.

    Raises:
        NormzooError: otherwise, with the closest known name.
    """
    if value not in (known := list(known)):
        raise unknown(name, str(value), known)
    return value


# ---- the list of models ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelInfo:
    """A model by its name.

    Attributes:
        name: the name.
        family: ``"mlp"``, ``"cnn"``, ``"rnn"`` or ``"transformer"``; which layout of the data it takes.
        cls: the class.
        options: the options that the name leaves open, with their defaults.
        fixed: the options that the name decides.
        summary: one sentence.
    """

    name: str
    family: Family
    cls: type[Network]
    options: Mapping[str, Any]
    fixed: Mapping[str, Any]
    summary: str


_models: dict[str, ModelInfo] = {}
_Model = TypeVar("_Model", bound=type[Network])


def register_model(name: str, summary: str = "", **fixed: Any) -> Callable[[_Model], _Model]:
    """Give a class of models a name; ``fixed`` are the options that the name decides.

    Args:
        name: the name.
        summary: one sentence; the first line of the class's docstring when left out.
        **fixed: options of the class that this name stands for.

    Raises:
        NormzooError: for a name that is taken, or an option that the class does not have.
    """

    def add(cls: _Model) -> _Model:
        if name in _models:
            raise NormzooError(f"the model {name!r} is registered already, as {_models[name].cls.__qualname__}")
        parameters = inspect.signature(cls).parameters
        options = {key: p.default for key, p in parameters.items() if key not in ("norm", "inputs", "outputs")}
        if extra := [key for key in fixed if key not in options]:
            raise unknown_option(cls.__name__, extra[0], options)
        left = {key: value for key, value in options.items() if key not in fixed}
        text = summary or (inspect.getdoc(cls) or "").partition("\n")[0]
        _models[name] = ModelInfo(name, cls.family, cls, left, fixed, text)
        return cls

    return add


def list_models(*, norm_free: bool = False) -> list[str]:
    """The names of the models that take a norm, or of those that do without.

    >>> "selu_mlp" in list_models(norm_free=True)
    True
    """
    return sorted(name for name, info in _models.items() if info.cls.norm_free == norm_free)


def model_info(name: str) -> ModelInfo:
    """What is known about a model.

    Raises:
        NormzooError: for an unknown name, with the closest ones.
    """
    if name not in _models:
        raise unknown("model", name, _models)
    return _models[name]


def create_model(name: str, *, norm: NormChoice, inputs: Inputs, outputs: int, **options: Any) -> Network:
    """Build a model with a norm.

    The initial weights of everything that is not a norm depend on torch's global random numbers and on the options,
    never on the norm.

    Args:
        name: one of :func:`list_models`, norm-free or not.
        norm: the norm of all its sites, or a mapping from patterns of sites to norms; see :class:`Sites`.
        inputs: what one sample looks like.
        outputs: width of the answer.
        **options: the model's own; see ``model_info(name).options``.

    Returns:
        A module called as ``model(x, mask=None)`` with ``x`` of shape ``(N, *inputs.shape)`` and ``mask`` of shape
        ``(N, T)``, true where a position is real; it gives ``(N, outputs)``, or ``(N, T, outputs)`` per position.

    Raises:
        NormzooError: for an unknown model, option, norm or site, and for inputs that the model does not take.

    Example:
        >>> model = create_model("mlp_784", norm="layer_norm", inputs=Inputs((784,)), outputs=10)
        >>> model(torch.zeros(2, 784)).shape
        torch.Size([2, 10])
    """
    info = model_info(name)
    for option in options:
        if option not in info.options:
            raise unknown_option(f"the model {name!r}", option, info.options)
    return info.cls(norm=norm, inputs=inputs, outputs=outputs, **info.fixed, **options)  # pyright: ignore[reportCallIssue]
