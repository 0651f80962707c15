"""Data that needs no network: digits, the adding problem, associative recall, and English text.

A data set is a frozen dataclass whose fields are its options; :func:`create_data` puts it into a LightningDataModule in
the layout that a family of models expects.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from normzoo.errors import unknown, unknown_option

if TYPE_CHECKING:
    from normzoo.data.base import DataSet
    from normzoo.data.module import TensorDataModule

_HOME = {"adding": "adding:Adding", "digits": "digits:Digits", "recall": "recall:Recall", "text": "text:Text"}


@dataclass(frozen=True)
class DataInfo:
    """What is known of a data set before it is built.

    Attributes:
        name: Its name.
        summary: One sentence.
        kind: ``"classification"``, ``"regression"`` or ``"language_modelling"``.
        families: Families of models that it has a view for.
        options: Its options and their defaults.
        source: Where it is from.
    """

    name: str
    summary: str
    kind: str
    families: tuple[str, ...]
    options: Mapping[str, Any]
    source: str


def list_data() -> list[str]:
    """Names of all data sets.

    >>> list_data()
    ['adding', 'digits', 'recall', 'text']
    """
    return sorted(_HOME)


def data_info(name: str) -> DataInfo:
    """What is known of a data set; costs no Lightning import.

    Raises:
        NormzooError: for an unknown name, with the closest ones.
    """
    found = _find(name)
    return DataInfo(
        name=name,
        summary=(found.__doc__ or "").split("\n")[0],
        kind=found.kind,
        families=found.families,
        options={option.name: option.default for option in fields(found)},
        source=found.source,
    )


def configure_data(name: str, **options: Any) -> DataSet:
    """A data set with its options checked, its tensors not yet made; costs no Lightning import.

    Raises:
        NormzooError: for an unknown name or option, or a value that the data set refuses.

    Example:
        >>> configure_data("adding", length=30).length
        30
    """
    found = _find(name)
    known = [option.name for option in fields(found)]
    for option in options:
        if option not in known:
            raise unknown_option(f"data {name!r}", option, known)
    return found(**options)


def create_data(
    name: str, *, family: str, batch_size: int, seed: int = 0, eval_batch_size: int = 256, **options: Any
) -> TensorDataModule:
    """A LightningDataModule of a named data set in the layout of a family of models.

    Args:
        name: One of :func:`list_data`.
        family: ``"mlp"``, ``"cnn"``, ``"rnn"`` or ``"transformer"``.
        batch_size: Training samples in a batch.
        seed: Decides the order of the training samples, and nothing else.
        eval_batch_size: Samples in a validation or test batch.
        options: The options of the data set, see :func:`data_info`.

    Raises:
        NormzooError: for an unknown name or option, or a family that the data has no view for.
    """
    from normzoo.data.module import TensorDataModule  # imports Lightning

    data = configure_data(name, **options)
    return TensorDataModule(data, family=family, batch_size=batch_size, seed=seed, eval_batch_size=eval_batch_size)  # pyright: ignore[reportArgumentType]


def _find(name: str) -> type[DataSet]:
    if name not in _HOME:
        raise unknown("data", name, _HOME)
    module, cls = _HOME[name].split(":")
    return getattr(importlib.import_module(f"normzoo.data.{module}"), cls)


__all__ = ["DataInfo", "configure_data", "create_data", "data_info", "list_data"]
