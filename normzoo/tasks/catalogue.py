"""The tasks by name, their default settings, and how overrides find their place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from normzoo.data import configure_data, data_info
from normzoo.errors import NormzooError, did_you_mean
from normzoo.tasks.setting import FIELDS, Setting

ALIASES = {"rnn": "lstm"}

METRICS = {
    "classification": ("accuracy", "max"),
    "regression": ("mse", "min"),
    "language_modelling": ("bits_per_char", "min"),
}

_DEFAULTS: dict[str, dict[str, Any]] = {
    "adding/rnn": {"epochs": 8, "lr": 0.01, "warmup": 0.1, "clip": 1.0},
    "adding/transformer": {"epochs": 8, "warmup": 0.1, "clip": 1.0},
    "digits/cnn": {"epochs": 8, "warmup": 0.1},
    "digits/mlp": {"epochs": 12, "warmup": 0.1},
    "digits/rnn": {"epochs": 16, "lr": 0.01, "warmup": 0.1, "clip": 1.0},
    "digits/transformer": {"epochs": 12, "warmup": 0.1, "clip": 1.0, "model": {"width": 48}},
    "recall/rnn": {"epochs": 8, "lr": 0.01, "warmup": 0.1, "clip": 1.0},
    "recall/transformer": {"epochs": 4, "warmup": 0.1, "clip": 1.0},
    "text/rnn": {"epochs": 4, "lr": 0.01, "warmup": 0.1, "clip": 1.0},
    "text/transformer": {"epochs": 4, "warmup": 0.1, "clip": 1.0},
}
"""By data and family, for all models of the family: seconds on one core, and well above chance."""

_MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits/cnn_28": {"epochs": 2, "warmup": 0.1, "data": {"size": 28}},
    "digits/cnn_32": {"epochs": 2, "warmup": 0.1, "data": {"size": 32}},
    "digits/mlp_784": {"epochs": 12, "warmup": 0.1, "data": {"size": 28}},
}
"""By data and model: what differs from the family."""

_OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 3e-3, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0},
    "adamw": {"lr": 3e-3, "momentum": 0.9, "nesterov": False, "weight_decay": 0.01},
    "muon": {"lr": 3e-3, "momentum": 0.95, "nesterov": True, "weight_decay": 0.01},
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4},
}
"""Where an override names another optimizer than the task's, its usual values take the place of the task's."""

_UNUSED = {"adam": {"nesterov"}, "adamw": {"nesterov"}, "muon": set(), "sgd": {"beta2"}}


@dataclass(frozen=True)
class Task:
    """A pair of data and model, ``"digits/cnn"``.

    Attributes:
        data: Name of the data.
        model: Name of the model, aliases resolved.
        family: Family of the model, which decides the view of the data.
        kind: ``"classification"``, ``"regression"`` or ``"language_modelling"``.
    """

    data: str
    model: str
    family: str
    kind: str

    @property
    def name(self) -> str:
        """``"data/model"``."""
        return f"{self.data}/{self.model}"


def list_tasks() -> list[str]:
    """Names of the tasks that have defaults of their own; any other pair of data and model that fit is a task too.

    >>> "digits/cnn" in list_tasks()
    True
    """
    return sorted(_DEFAULTS | _MODEL_DEFAULTS)


def find_task(name: str) -> Task:
    """The task of a name.

    Args:
        name: ``"data/model"``. ``"rnn"`` is short for ``"lstm"``.

    Raises:
        NormzooError: for a name without a slash, unknown data or models, or data that has no view for the model.

    Example:
        >>> find_task("adding/rnn")
        Task(data='adding', model='lstm', family='rnn', kind='regression')
    """
    from normzoo.models import model_info  # imports torch

    data, slash, model = name.partition("/") if isinstance(name, str) else ("", "", "")
    if not slash or not data or not model:
        hint = did_you_mean(str(name), list_tasks()) or f", such as {', '.join(list_tasks())}"
        raise NormzooError(f"{name!r} is no task; a task is 'data/model'{hint}")
    known, info = data_info(data), model_info(ALIASES.get(model, model))
    if info.family not in known.families:
        raise NormzooError(
            f"task {name!r}: data {data!r} has no view for {model!r}, a model of the family {info.family}; "
            f"it serves {', '.join(known.families)}"
        )
    return Task(data, info.name, info.family, known.kind)


def primary_metric(task: str) -> tuple[str, str]:
    """The metric by which a task is judged, and whether it should be large (``"max"``) or small (``"min"``).

    It is logged as ``val/<metric>`` and ``test/<metric>``.

    >>> primary_metric("digits/cnn")
    ('accuracy', 'max')
    """
    return METRICS[find_task(task).kind]


def resolve(task: str, overrides: Mapping[str, Any] | None = None) -> Setting:
    """The setting of a task: its defaults, and the overrides in their place.

    Args:
        task: Name of the task.
        overrides: Fields of :class:`Setting`; options of the model or the data in the mappings ``model`` and ``data``,
            with a dot (``"model.depth"``), or by their bare name where only one of the two has it.

    Returns:
        A setting in which everything is concrete, also the options of model and data that nobody mentioned.

    Raises:
        NormzooError: for an unknown task or name, with the closest ones, and for values that cannot be meant.

    Example:
        >>> setting = resolve("adding/rnn", {"lr": 0.01, "length": 30})
        >>> setting.lr, setting.data["length"]
        (0.01, 30)
    """
    found = find_task(task)
    own = _defaults(found)
    given = _route(found, overrides or {})
    optimizer = given["setting"].get("optimizer", own["setting"].get("optimizer", Setting.optimizer))
    other = {}
    if optimizer != own["setting"].get("optimizer", Setting.optimizer):
        other = _OPTIMIZER_DEFAULTS.get(optimizer, {})
    for name in sorted(_UNUSED.get(optimizer, set()) & set(given["setting"])):
        if given["setting"][name] is not False:
            raise NormzooError(f"task {task!r}: optimizer {optimizer!r} has no {name}; leave it out")
    setting = Setting(
        **own["setting"] | other | given["setting"],
        model=_model_options(found, own["model"] | given["model"]),
        data=_data_options(found, own["data"] | given["data"]),
    )
    if found.kind == "language_modelling" and setting.model.get("causal") is False:
        raise NormzooError(
            f"task {task!r} predicts the next symbol, and with causal=False the model would see it; leave causal out"
        )
    return setting


def _defaults(task: Task) -> dict[str, dict[str, Any]]:
    chosen = _DEFAULTS.get(f"{task.data}/{task.family}", {}) | _MODEL_DEFAULTS.get(task.name, {})
    own = {"setting": {k: v for k, v in chosen.items() if k not in ("model", "data")}}
    own |= {place: dict(chosen.get(place, {})) for place in ("model", "data")}
    if task.kind == "language_modelling" and "causal" in _known(task)["model"]:
        own["model"]["causal"] = True
    return own


def _known(task: Task) -> dict[str, dict[str, Any]]:
    from normzoo.models import model_info

    return {"model": dict(model_info(task.model).options), "data": dict(data_info(task.data).options)}


def _route(task: Task, overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sort overrides into those of the setting, the model and the data."""
    known = _known(task)
    routed: dict[str, dict[str, Any]] = {"setting": {}, "model": {}, "data": {}}
    for name, value in _dotted(overrides).items():
        place, _, option = name.rpartition(".")
        if not place:
            places = ["setting"] if name in FIELDS else [p for p in ("model", "data") if name in known[p]]
            if len(places) > 1:
                raise NormzooError(f"task {task.name!r}: both model and data have {name!r}; write 'model.{name}'")
            place = places[0] if places else ""
        if place not in routed or (place != "setting" and option not in known[place]):
            candidates = [
                *FIELDS[:-2],
                *(p + "." + o for p in known for o in known[p]),
                *known["model"],
                *known["data"],
            ]
            hint = did_you_mean(name, candidates) or f"; it has: {', '.join(FIELDS[:-2])} and " + ", ".join(
                f"{p}.{o}" for p in known for o in known[p]
            )
            raise NormzooError(f"task {task.name!r} has no option {name!r}{hint}")
        if option in routed[place]:
            raise NormzooError(f"task {task.name!r}: {option!r} is given twice")
        routed[place][option] = value
    return routed


def _dotted(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The mappings ``model`` and ``data`` taken apart."""
    flat: dict[str, Any] = {}
    for name, value in overrides.items():
        if name in ("model", "data"):
            if not isinstance(value, Mapping):
                raise NormzooError(f"{name} must be a mapping of options; got {value!r}")
            flat |= {f"{name}.{option}": inner for option, inner in value.items()}
        else:
            flat[name] = value
    return flat


def _model_options(task: Task, options: dict[str, Any]) -> dict[str, Any]:
    return _known(task)["model"] | options


def _data_options(task: Task, options: dict[str, Any]) -> dict[str, Any]:
    return asdict(configure_data(task.data, **options).concrete())
