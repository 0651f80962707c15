"""The layer that fully connected and convolutional networks are made of, and the activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

from torch import Tensor, nn

from normzoo.layers.base import Norm
from normzoo.models.base import one_of
from normzoo.models.dropout import Dropout

NormPosition = Literal["before", "after"]

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
    "leaky_relu": partial(nn.LeakyReLU, 0.01),
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
"""Activations by name."""


def activation_beside(norm: nn.Module | None, name: str) -> nn.Module:
    """The activation called ``name``, or the identity beside a norm that includes one.

    Raises:
        NormzooError: for an unknown name, with the closest ones.
    """
    one_of("activation", name, ACTIVATIONS)
    if isinstance(norm, Norm) and norm.traits is not None and norm.traits.includes_activation:
        return nn.Identity()
    return ACTIVATIONS[name]()


class Layer(nn.Module):
    """A linear map, a norm before or after the activation, dropout.

    Args:
        linear: the linear map or convolution.
        norm: the norm of its output, or ``None``.
        activation: a name in :data:`ACTIVATIONS`.
        norm_position: the norm comes ``"before"`` or ``"after"`` the activation.
        dropout: probability of zero.
    """

    def __init__(
        self, linear: nn.Module, norm: nn.Module | None, *, activation: str, norm_position: str, dropout: float
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = norm
        self.activation = activation_beside(norm, activation)
        self.norm_first = one_of("norm_position", norm_position, ("before", "after")) == "before"
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as the linear map takes it."""
        x = self.linear(x)
        if self.norm is None:
            x = self.activation(x)
        elif self.norm_first:
            x = self.activation(self.norm(x))
        else:
            x = self.norm(self.activation(x))
        return self.dropout(x)
