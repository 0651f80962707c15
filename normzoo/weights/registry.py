"""Names to weight norms: register, find, describe. Specs are read as those of norms are."""

from __future__ import annotations

import fnmatch
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from normzoo import registry
from normzoo.errors import NormzooError, unknown
from normzoo.layers.base import Paper
from normzoo.weights.base import Filters, Reparametrization

Factory = Callable[..., Reparametrization]
Spec = str | Factory
F = TypeVar("F", bound=Factory)

_weight_norms: dict[str, Factory] = {}  # canonical name -> weight norm
_contrib: set[str] = set()
_names: dict[str, str] = {}  # folded name or alias -> canonical name


@overload
def register_weight_norm(
    name: str, norm: None = None, *, aliases: tuple[str, ...] = (), contrib: bool = False
) -> Callable[[F], F]: ...
@overload
def register_weight_norm(name: str, norm: F, *, aliases: tuple[str, ...] = (), contrib: bool = False) -> F: ...
def register_weight_norm(name: str, norm: Any = None, *, aliases: tuple[str, ...] = (), contrib: bool = False) -> Any:
    """Give a weight norm a name, as a decorator or as a call.

    Args:
        name: snake_case; look-up ignores case, ``-`` and ``_``. Norms have names of their own: one may be in both.
        norm: a :class:`Reparametrization`, or whatever makes one from :class:`Filters`; left out, this is a decorator.
        aliases: other names people use.
        contrib: it is tested, but no number or formula of its paper has been reproduced.

    Raises:
        NormzooError: when a name is taken or is none.

    Example:
        >>> @register_weight_norm("peak_weight_norm_example")
        ... class PeakWeightNorm(Reparametrization):
        ...     "Divide each filter by its largest weight."
        ...     def formula(self, rows):
        ...         return rows / rows.abs().amax(-1, keepdim=True)
        >>> import torch
        >>> from normzoo.weights import apply_weight_norm
        >>> apply_weight_norm(torch.nn.Linear(4, 2), "peak_weight_norm_example").weight.abs().amax(1)
        tensor([1., 1.], grad_fn=<AmaxBackward0>)
    """
    if norm is None:
        return functools.partial(_add, name, aliases, contrib)
    return _add(name, aliases, contrib, norm)


def _add(name: str, aliases: tuple[str, ...], contrib: bool, norm: F) -> F:
    for alias in (name, *aliases):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", alias):
            raise NormzooError(
                f"{alias!r} is no name for a weight norm; expected letters, digits and '_', as in 'spectral_norm'"
            )
        taken = _names.get(registry.fold(alias))
        if taken is not None and not registry.same_source(_weight_norms[taken], norm):  # pyright: ignore[reportArgumentType]
            raise NormzooError(f"the name {alias!r} is taken by the weight norm {taken!r}; choose another")
    _weight_norms[name] = norm
    (_contrib.add if contrib else _contrib.discard)(name)
    _names.update({registry.fold(alias): name for alias in (name, *aliases)})
    return norm


def list_weight_norms(pattern: str = "*") -> list[str]:
    """The registered names that match a wildcard pattern, sorted.

    >>> list_weight_norms("*spectral*")
    ['mean_spectral_norm', 'spectral_norm']
    """
    return sorted(name for name in _weight_norms if fnmatch.fnmatch(name, pattern))


def resolve_weight_norm(spec: Spec) -> tuple[Factory, dict[str, Any]]:
    """The callable that a spec names, and the options that it carries.

    Args:
        spec: a name (``"spectral_norm"``), with options (``"spectral_norm(iterations=3)"``), ``"module:Name"``,
            ``"path/file.py:Name"``, or a callable that makes a :class:`Reparametrization` from :class:`Filters`.

    Raises:
        NormzooError: for an unknown name, a file or module without it, or options that are not literals.
    """
    if not isinstance(spec, str):
        if not callable(spec):
            raise NormzooError(f"{spec!r} is no weight norm; expected a name, or a class of weight norms")
        return spec, {}
    target, options = registry.parse_spec(spec, "weight norm", "spectral_norm(iterations=3)")
    if registry.fold(target) in _names:
        return _weight_norms[_names[registry.fold(target)]], options
    if ":" not in target:
        raise unknown("weight norm", target, _weight_norms)
    factory, _ = registry.resolve(target)
    return factory, options  # pyright: ignore[reportReturnType]


def create_weight_norm(spec: Spec, filters: Filters) -> Reparametrization:
    """Make a weight norm for weights of one shape.

    Raises:
        NormzooError: for an unknown weight norm, or a class that is none.
        OptionError: for an option that the weight norm does not have (a ``TypeError`` as well).

    Example:
        >>> create_weight_norm("spectral_norm(iterations=3)", Filters((8, 4)))
        SpectralNorm(8 x 4, iterations=3)
    """
    factory, options = resolve_weight_norm(spec)
    registry.check_options(factory, spec, options)  # pyright: ignore[reportArgumentType]
    norm = factory(filters, **options)
    if not isinstance(norm, Reparametrization):
        raise NormzooError(
            f"{registry.label(spec)} made {type(norm).__name__}; expected a normzoo.weights.Reparametrization"  # pyright: ignore[reportArgumentType]
        )
    return norm


@dataclass(frozen=True)
class WeightNormInfo:
    """What the registry knows of a weight norm."""

    name: str
    norm: Factory
    aliases: tuple[str, ...]
    contrib: bool
    summary: str
    formula: str
    paper: Paper | None
    options: dict[str, Any]
    source: str


def weight_norm_info(name: str) -> WeightNormInfo:
    """All that the registry knows of a weight norm, or of a user's class by its spec.

    Raises:
        NormzooError: for an unknown name.

    Example:
        >>> weight_norm_info("spectral_norm").paper.arxiv
        '1802.05957'
    """
    norm, _ = resolve_weight_norm(name)
    target, _ = registry.parse_spec(name, "weight norm", "spectral_norm(iterations=3)")
    own = _names.get(registry.fold(target), target)
    doc = inspect.cleandoc(norm.__doc__ or "")
    file = inspect.getsourcefile(norm) if isinstance(norm, type) else None
    return WeightNormInfo(
        name=own,
        norm=norm,
        aliases=tuple(sorted(a for a, n in _names.items() if n == own and a != registry.fold(own))),
        contrib=own in _contrib,
        summary=doc.split("\n\n")[0].replace("\n", " "),
        formula=registry.formula_in(doc),
        paper=norm.paper if isinstance(norm, type) and issubclass(norm, Reparametrization) else None,
        options={
            key: parameter.default
            for key, parameter in list(inspect.signature(norm).parameters.items())[1:]
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        },
        source=f"{file}:{inspect.getsourcelines(norm)[1]}" if file else "",
    )
