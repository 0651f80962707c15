"""Names to norms: register, create, find."""

from __future__ import annotations

import ast
import fnmatch
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast, overload

import torch
from torch import nn

from normzoo.errors import NormzooError, OptionError, unknown, unknown_option
from normzoo.layers.base import MomentNorm, Norm, Paper, Traits
from normzoo.layers.foreign import ForeignNorm

Factory = Callable[..., nn.Module]
Spec = str | Factory
F = TypeVar("F", bound=Factory)

ENTRY_POINTS = "normzoo.norms"

_norms: dict[str, Factory] = {}  # canonical name -> norm
_contrib: set[str] = set()
_names: dict[str, str] = {}  # folded name or alias -> canonical name
_files: dict[Path, ModuleType] = {}
_loaded = False


def fold(name: str) -> str:
    """The form in which names are compared: case, ``-`` and ``_`` do not matter."""
    return name.replace("-", "").replace("_", "").lower()


@overload
def register(
    name: str, norm: None = None, *, aliases: tuple[str, ...] = (), contrib: bool = False
) -> Callable[[F], F]: ...
@overload
def register(name: str, norm: F, *, aliases: tuple[str, ...] = (), contrib: bool = False) -> F: ...
def register(name: str, norm: Any = None, *, aliases: tuple[str, ...] = (), contrib: bool = False) -> Any:
    """Give a norm a name, as a decorator or as a call.

    Args:
        name: snake_case; look-up ignores case, ``-`` and ``_``.
        norm: anything that makes a module from a width; left out, ``register`` is a decorator.
        aliases: other names people use.
        contrib: it passes the checks, but no number of its paper has been reproduced.

    Raises:
        NormzooError: when a name is taken or is none.

    Example:
        >>> @register("halo_norm_example")
        ... class HaloNorm(MomentNorm):
        ...     "Groups of channels share a statistic over the whole batch."
        ...     moments = "b (g c) s -> g"
        >>> create("halo_norm_example(groups=2)", 8)
        HaloNorm(8, eps=1e-05, groups=2, momentum=0.1)
    """
    if norm is None:
        return functools.partial(_add, name, aliases, contrib)
    return _add(name, aliases, contrib, norm)


def _add(name: str, aliases: tuple[str, ...], contrib: bool, norm: F) -> F:
    for alias in (name, *aliases):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", alias):
            raise NormzooError(f"{alias!r} is no name for a norm; expected letters, digits and '_', as in 'group_norm'")
        taken = _names.get(fold(alias))
        if taken is not None and not same_source(_norms[taken], norm):
            home = inspect.getmodule(_norms[taken])
            raise NormzooError(
                f"the name {alias!r} is taken by {taken!r} of {home.__name__ if home else 'another module'}; "
                "choose another"
            )
    _norms[name] = norm
    (_contrib.add if contrib else _contrib.discard)(name)
    _names.update({fold(alias): name for alias in (name, *aliases)})
    return norm


def same_source(old: Factory, new: Factory) -> bool:
    """Whether ``new`` is ``old`` once more: its module was reloaded, or its notebook cell run again."""
    of = lambda norm: (getattr(norm, "__module__", None), getattr(norm, "__qualname__", None))  # noqa: E731
    return old is new or (of(old) == of(new) and None not in of(new))


def _load() -> None:
    """Import the project's own norms and those that installed packages offer as entry points."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    importlib.import_module("normzoo.layers.members")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if fold(entry.name) not in _names:
            register(entry.name, entry.load())


def list_norms(pattern: str = "*") -> list[str]:
    """The registered names that match a wildcard pattern, sorted.

    >>> list_norms("layer_norm*")
    ['layer_norm', 'layer_norm_joint']
    """
    _load()
    return sorted(name for name in _norms if fnmatch.fnmatch(name, pattern))


def resolve(spec: Spec) -> tuple[Factory, dict[str, Any]]:
    """The callable that a spec names, and the options that it carries.

    Raises:
        NormzooError: for an unknown name, a file or module without it, or options that are not literals.
    """
    if not isinstance(spec, str):
        if not callable(spec):
            raise NormzooError(f"{spec!r} is no norm; expected a name, or a callable that makes a module from a width")
        return spec, {}
    target, options = parse_spec(spec)
    _load()
    if fold(target) in _names:
        return _norms[_names[fold(target)]], options
    if target.endswith(".py"):
        raise NormzooError(f"{target!r} names a file alone; name the class in it too, as in '{target}:MyNorm'")
    if ":" not in target:
        raise unknown("norm", target, _norms)
    home, _, attribute = target.rpartition(":")
    module = load_file(home) if home.endswith(".py") else _import(home)
    found = getattr(module, attribute, None)
    if not callable(found):
        known = [
            name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, nn.Module)
        ]
        raise unknown(f"norm in {home}", attribute, known)
    return cast(Factory, found), options


def parse_spec(spec: str, kind: str = "norm", example: str = "group_norm(groups=8)") -> tuple[str, dict[str, Any]]:
    """Take ``name(option=literal, …)`` apart; nothing is ever evaluated.

    Args:
        spec: what a user wrote.
        kind: what it names, for the messages.
        example: a good one, for the messages.

    Raises:
        NormzooError: when it is empty, or its options are no literals.
    """
    match = re.fullmatch(r"\s*(?P<target>[^\s].*?)\s*(?:\((?P<arguments>.*)\))?\s*", spec, re.DOTALL)
    if match is None:
        raise NormzooError(f"the {kind} spec {spec!r} is empty; expected a name, as in '{example}'")
    if not match["arguments"]:
        return match["target"], {}
    wrong = NormzooError(
        f"cannot read the options of the {kind} spec {spec!r}; expected name=literal pairs, as in '{example}'"
    )
    try:
        call = ast.parse(f"f({match['arguments']})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise wrong
        return match["target"], {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise wrong from error


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise NormzooError(
                f"there is no module {name!r}; expected an importable module or a file, as in 'my_file.py:MyNorm'"
            ) from error
        raise _raised(f"the module {name!r}", error) from error
    except (Exception, SystemExit) as error:  # a user's code, which may raise anything
        raise _raised(f"the module {name!r}", error) from error


def _raised(what: str, error: BaseException) -> NormzooError:
    """Where and why somebody's code raised when it was imported: its own lines alone, none of who imported it."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        marked = "".join(traceback.format_exception_only(error)[1:-1])  # the line, and a mark under the place
        return NormzooError(f"{error.filename}, line {error.lineno} raised SyntaxError: {error.msg}\n{marked}".rstrip())
    frames = own_frames(error)
    where = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else what
    if isinstance(error, NormzooError):
        return NormzooError(f"{where}: {error}")
    lines = "".join(traceback.format_list(frames))
    return NormzooError(f"{where} raised {type(error).__name__}: {error}\n{lines}".rstrip())


def own_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """The frames of an error that are in a user's code: in the first file that is not ours, and in its neighbours."""
    ours = (f"{Path(__file__).parent}{os.sep}", f"{Path(importlib.__file__).parent}{os.sep}", "<frozen importlib")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    home = Path(frames[0].filename).parent if frames else None
    return [frame for frame in frames if Path(frame.filename).parent == home]


def load_file(path: str | Path) -> ModuleType:
    """Import a Python file by its path, once in a process.

    Raises:
        NormzooError: when there is no such file, or it raises, with the lines that did.
    """
    path = Path(path).expanduser().resolve()
    if path not in _files:
        for module in list(sys.modules.values()):  # the script that runs, or a module imported by name
            file = getattr(module, "__file__", None) or ""
            if file.endswith(path.name) and Path(file).resolve() == path:  # resolving thousands of files is slow
                _files[path] = module
                return module
        if not path.is_file():
            raise NormzooError(f"there is no file {path}; expected a Python file, as in 'my_file.py:MyNorm'")
        name = f"normzoo_file_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        found = importlib.util.spec_from_file_location(name, path)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module  # dataclasses and pickle look their module up by name
        sys.path.insert(0, str(path.parent))  # a file's neighbours are importable, as when it is run
        try:
            found.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, Exception | SystemExit):  # a user's code, which may raise anything
                raise _raised(str(path), error) from error
            raise
        finally:
            sys.path.remove(str(path.parent))
        _files[path] = module
    return _files[path]


def create(spec: Spec, num_features: int, channel_dim: int = 1, **options: Any) -> Norm:
    """Make a norm for ``num_features`` channels.

    Args:
        spec: a name (``"group_norm"``), a name with options (``"group_norm(groups=8)"``), ``"module:Name"``,
            ``"path/file.py:Name"``, or any callable that makes a module from a width.
        num_features: number of channels ``C``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.
        options: options of the norm, by name.

    Returns:
        A module that is called as ``norm(x, mask=None)``. A module that knows nothing of this contract is wrapped.

    Raises:
        NormzooError: for an unknown norm or an option given twice.
        OptionError: for an option that the norm does not have (a ``TypeError`` as well).

    Example:
        >>> create("rms_norm", 8, channel_dim=-1)
        RMSNorm(8, eps=1e-06, channel_dim=-1)
        >>> create(nn.LayerNorm, 8)(torch.ones(2, 8, 3)).shape
        torch.Size([2, 8, 3])
    """
    norm, given = resolve(spec)
    if twice := set(given) & set(options):
        raise NormzooError(f"the option {twice.pop()!r} is given both in {spec!r} and to create()")
    options = given | options
    layout = _takes(norm, "channel_dim")
    if layout:
        options["channel_dim"] = channel_dim
    check_options(norm, spec, options)
    with torch.random.fork_rng(devices=[]):  # the weights of the rest of a model must not depend on its norms
        module = norm(num_features, **options)
    if isinstance(module, Norm):
        return module
    if not isinstance(module, nn.Module):
        raise NormzooError(
            f"{label(spec)} made {type(module).__name__} for {num_features} channels; expected an nn.Module"
        )
    return ForeignNorm(module, num_features, channel_dim=channel_dim, takes_layout=layout)


def _signature(norm: Factory) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(norm).parameters
    except (TypeError, ValueError):  # builtins have none
        return {}


def _takes(norm: Factory, option: str) -> bool:
    return option in _signature(norm)


def check_options(norm: Factory, spec: Spec, options: Mapping[str, Any]) -> None:
    """Refuse a norm that takes no width, an option that it does not take, or the lack of one that it needs.

    Raises:
        OptionError: with the options that there are.
    """
    try:
        signature = inspect.signature(norm)
    except (TypeError, ValueError):  # builtins have none
        return
    try:
        signature.bind_partial(_WIDTH)
    except TypeError as error:
        raise OptionError(
            f"{label(spec)} cannot be made from a width alone, as norm(num_features): {error}; it takes {signature}. "
            "Let its first argument be the number of channels"
        ) from error
    parameters = signature.parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [name for name in list(parameters)[1:]]
    for name in options:
        if name not in known:
            raise unknown_option(label(spec).partition("(")[0], name, known)
    needed = [n for n in known if parameters[n].default is inspect.Parameter.empty and n not in options]
    needed = [
        n for n in needed if parameters[n].kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    if needed:
        raise OptionError(
            f"{label(spec)} needs the option {needed[0]!r}; a norm is made from its width alone, as "
            f"norm(num_features): give it in the spec, as in '{label(spec)}({needed[0]}=…)', or by functools.partial"
        )


# ---- what a spec is called -------------------------------------------------------------------------------------------


def canonical(spec: Spec) -> str:
    """The one string that names a norm, with its options, in any process.

    >>> canonical("Group-Norm( groups = 8 )")
    'group_norm(groups=8)'

    Raises:
        NormzooError: for what no other process could find: a lambda, a class made inside a function.
    """
    options: dict[str, Any] = {}
    while isinstance(spec, functools.partial):
        if spec.args:
            raise NormzooError(f"{spec!r} binds positional arguments; bind options by name")
        options = spec.keywords | options
        spec = spec.func
    if isinstance(spec, str):
        target, own = parse_spec(spec)
        norm, _ = resolve(spec)
        options = own | options
        if fold(target) in _names:
            name = _names[fold(target)]
        else:
            home, _, attribute = target.rpartition(":")
            name = f"{Path(home).expanduser().resolve() if home.endswith('.py') else home}:{attribute}"
        check_options(norm, name, options)
    else:
        name = _name_of(spec)
    for key, value in options.items():
        if not _is_literal(value):
            raise NormzooError(
                f"the option {key}={value!r} of {name} is no literal; expected numbers, strings, tuples, lists, …"
            )
    listed = ", ".join(f"{key}={value!r}" for key, value in sorted(options.items()))
    return f"{name}({listed})" if listed else name


def _is_literal(value: Any) -> bool:
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError):
        return False


def _name_of(norm: Factory) -> str:
    _load()
    for name, registered in _norms.items():
        if registered is norm:
            return name
    module, qualname = getattr(norm, "__module__", None), getattr(norm, "__qualname__", "<unknown>")
    home = sys.modules.get(module) if module else None
    if home is None or "<" in qualname or "." in qualname or getattr(home, qualname, None) is not norm:
        raise NormzooError(
            f"{norm!r} cannot be named: another process could not find it. Define it at the top level of a file, "
            "or register it there with a name"
        )
    by_file = home.__name__ == "__main__" or home in _files.values()
    return f"{Path(str(home.__file__)).resolve()}:{qualname}" if by_file and home.__file__ else f"{module}:{qualname}"


def label(spec: Spec) -> str:
    """A short text for tables: the name without the path of its file.

    >>> label("somewhere/my_file.py:PeakNorm(eps=0.1)")
    'PeakNorm(eps=0.1)'
    """
    if isinstance(spec, functools.partial):
        listed = ", ".join(f"{key}={value!r}" for key, value in sorted(spec.keywords.items()))
        return f"{label(spec.func)}({listed})"
    if not isinstance(spec, str):
        return getattr(spec, "__name__", type(spec).__name__)
    target, options = parse_spec(spec)
    listed = ", ".join(f"{key}={value!r}" for key, value in options.items())
    name = target.rpartition(":")[2]
    return f"{name}({listed})" if listed else name


def source_hash(spec: Spec) -> str | None:
    """A hash of the file that defines a norm which is not the project's own, so that results know its version.

    Comments, layout and the definition of a study in the same file do not count.
    """
    norm, _ = resolve(spec)
    while isinstance(norm, functools.partial):
        norm = norm.func
    home = inspect.getmodule(norm)
    if home is None or home.__name__.split(".")[0] in ("normzoo", "torch") or not getattr(home, "__file__", None):
        return None
    path = Path(str(home.__file__))
    if path.suffix != ".py":
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    body = [
        statement for statement in ast.parse(path.read_text(encoding="utf-8")).body if not _defines_study(statement)
    ]
    return hashlib.sha256("\n".join(ast.dump(statement) for statement in body).encode()).hexdigest()[:16]


def _defines_study(statement: ast.stmt) -> bool:
    value = getattr(statement, "value", None)
    function = value.func if isinstance(value, ast.Call) else None
    return "Study" in (getattr(function, "attr", None), getattr(function, "id", None))


# ---- what is known of a norm -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormInfo:
    """What the registry knows of a norm."""

    name: str
    norm: Factory
    aliases: tuple[str, ...]
    family: str
    contrib: bool
    summary: str
    formula: str
    pattern: str | None
    traits: Traits | None
    paper: Paper | None
    options: dict[str, Any]
    parameters_per_channel: int | None
    source: str


def info(name: str) -> NormInfo:
    """All that the registry knows of a norm, or of a user's class by its spec.

    Raises:
        NormzooError: for an unknown name.

    Example:
        >>> info("batch_norm").pattern
        'b c s -> c'
    """
    norm, _ = resolve(name)
    target, _ = parse_spec(name)
    canonical_name = _names.get(fold(target), target)
    doc = inspect.cleandoc(norm.__doc__ or "")
    example = _example(norm)
    options = {
        key: parameter.default
        for key, parameter in list(_signature(norm).items())[1:]
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    file = inspect.getsourcefile(norm) if isinstance(norm, type) else None
    return NormInfo(
        name=canonical_name,
        norm=norm,
        aliases=tuple(sorted(a for a, n in _names.items() if n == canonical_name and a != fold(canonical_name))),
        family=norm.__module__.rpartition(".")[2].partition("_")[0],  # long families have several files
        contrib=canonical_name in _contrib,
        summary=doc.split("\n\n")[0].replace("\n", " "),
        formula=formula_in(doc),
        pattern=norm.moments if isinstance(norm, type) and issubclass(norm, MomentNorm) else None,
        traits=example.traits if isinstance(example, Norm) else None,
        paper=norm.paper if isinstance(norm, type) and issubclass(norm, Norm) else None,
        options=options,
        parameters_per_channel=None if example is None else sum(p.numel() for p in example.parameters()) // _WIDTH,
        source=f"{file}:{inspect.getsourcelines(norm)[1]}" if file else "",
    )


_WIDTH = 64


def _example(norm: Factory) -> nn.Module | None:
    """The norm as it is made from a width alone; ``None`` where that needs options."""
    try:
        with torch.random.fork_rng(devices=[]):
            return norm(_WIDTH)
    except (TypeError, NormzooError):
        return None


def formula_in(doc: str) -> str:
    """The first ``.. math::`` block of a docstring."""
    match = re.search(r"\.\. math::(?P<body>.*?)(?:\n\n(?!\s)|\Z)", doc, re.DOTALL)
    return textwrap.dedent("\n".join(line.strip() for line in match["body"].strip().splitlines())) if match else ""
