"""Layers with parametrizations that can be copied and pickled.

``torch.nn.utils.parametrize`` gives a layer a class of its own, and the property ``weight`` sits in that class. Its
copies share the class, so that removing the parametrization from one takes ``weight`` from all, and pickling is
refused. Here each copy gets a class of its own, made by the same public function.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize


def make_copyable(layer: nn.Module) -> None:
    """Let a parametrized layer be deep-copied into one that lives for itself, and pickled."""
    own = type(layer)  # the class that parametrize made for this layer alone
    own.__reduce_ex__ = _reduce
    own.__deepcopy__ = _deepcopy  # pyright: ignore[reportAttributeAccessIssue]


def _reduce(layer: nn.Module, protocol: Any) -> tuple[Any, ...]:
    return _rebuild, (type(layer).__bases__[0], dict(layer.__dict__))


def _deepcopy(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new = _rebuild(type(layer).__bases__[0], copy.deepcopy(layer.__dict__, memo))
    memo[id(layer)] = new
    return new


def _rebuild(cls: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    layer = cls.__new__(cls)
    layer.__dict__.update(state)
    layer._parameters = dict(layer._parameters)
    layer._modules = dict(layer._modules)
    for name, parametrizations in layer._modules.pop("parametrizations").named_children():  # pyright: ignore[reportOptionalMemberAccess]
        layer.register_parameter(name, nn.Parameter(torch.empty(0)))  # its place is taken by what is in the state
        parametrize.register_parametrization(layer, name, nn.Identity(), unsafe=True)
        layer.get_submodule("parametrizations").add_module(name, parametrizations)
    make_copyable(layer)
    return layer
