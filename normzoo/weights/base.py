"""The contract of a weight norm: what it computes from the filters of a layer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from normzoo.errors import OptionError
from normzoo.layers.base import Paper, wide_buffers
from normzoo.ops import full_precision, wide


@dataclass(frozen=True)
class Filters:
    """How the weights of a layer are its filters.

    Attributes:
        shape: that of the weights: ``(O, I / groups, *K)``, or ``(I, O / groups, *K)`` when ``transposed``.
        groups: as in :class:`torch.nn.Conv2d`.
        transposed: the layer is a transposed convolution.
        device: where the weights live.
        dtype: their dtype.

    Example:
        >>> Filters((8, 2, 3, 3), groups=4).rows(torch.ones(8, 2, 3, 3)).shape
        torch.Size([4, 2, 18])
    """

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    @property
    def outputs(self) -> int:
        """Number of channels that come out."""
        return self.shape[1] * self.groups if self.transposed else self.shape[0]

    @property
    def fan_in(self) -> int:
        """Number of weights of one filter."""
        return math.prod(self.shape) // self.outputs

    def rows(self, weight: Tensor) -> Tensor:
        """The filters as the rows of a matrix for each group, ``(groups, outputs / groups, fan_in)``."""
        if self.transposed:
            return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(2)
        return weight.reshape(self.groups, -1, self.fan_in)

    def weight(self, rows: Tensor) -> Tensor:
        """The weights whose filters are ``rows``."""
        if self.transposed:
            inputs = self.shape[0] // self.groups
            return rows.unflatten(2, (inputs, *self.shape[2:])).transpose(1, 2).flatten(0, 1)
        return rows.reshape(self.shape)


class Reparametrization(nn.Module, ABC):
    """A weight norm: abstract; a subclass gives the formula from filters to filters.

    The formula gets float32 or wider whatever the dtype of the weights. What it returns is the layer's ``weight``; the
    weights that are learned are its argument.

    Args:
        filters: the shape of the weights. Options of a subclass follow as keywords.

    Example:
        >>> class UnitRows(Reparametrization):
        ...     "Divide each filter by its largest weight."
        ...     def formula(self, rows):
        ...         return rows / rows.abs().amax(-1, keepdim=True)
        >>> UnitRows(Filters((2, 2)))(torch.tensor([[1.0, 2.0], [4.0, 1.0]]))
        tensor([[0.5000, 1.0000],
                [1.0000, 0.2500]])
    """

    roles: ClassVar[Mapping[str, str]] = {"gain": "gain"}
    """What each parameter is to the optimizer."""

    paper: ClassVar[Paper | None] = None

    per_output: ClassVar[bool] = True
    """Each filter is normalised by itself: one that comes out as zero would never learn."""

    def __init__(self, filters: Filters) -> None:
        super().__init__()
        self.filters = filters

    @abstractmethod
    def formula(self, rows: Tensor) -> Tensor:
        """The filters that are used, from those that are learned, both ``(groups, outputs / groups, fan_in)``."""

    def start(self, rows: Tensor) -> None:
        """Take parameters and buffers from the weights: when applied, and when ``layer.weight`` is assigned."""

    def forward(self, weight: Tensor) -> Tensor:
        """The weights that are used, in shape, dtype and memory format of those that are learned."""
        with full_precision(weight):
            rows = self.formula(self.filters.rows(wide(weight)))
        return _laid_out(self.filters.weight(rows).to(weight.dtype), weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is learned when ``weight`` is assigned: ``weight`` itself, with a gain that fits it if there is one."""
        self.start(self.filters.rows(wide(weight)))
        return weight

    # ---- for the few that change more than the weights -------------------------------------------------------------

    removable: ClassVar[bool] = True
    """Whether it can be baked into the weights."""

    changes_output: ClassVar[bool] = False
    """Whether :meth:`output` does anything; then it needs a layer whose forward pass is called."""

    def attach(self, layer: nn.Module) -> None:
        """Called once with the layer that it was applied to."""

    def output(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output, from what it computed out of ``x`` with the new weights."""
        return y

    def bake(self, layer: nn.Module) -> None:
        """Leave in the layer what is not in its weights; called after these were baked in."""

    # ---- parts for subclasses ----------------------------------------------------------------------------------------

    def per_filter(self, value: float = 1.0) -> nn.Parameter:
        """A parameter for each output, in the dtype of the weights."""
        return nn.Parameter(
            torch.full((self.filters.outputs,), value, device=self.filters.device, dtype=self.filters.dtype)
        )

    def column(self, parameter: Tensor, rows: Tensor) -> Tensor:
        """A value for each output, as it meets the rows."""
        return parameter.to(rows.dtype).view(self.filters.groups, -1, 1)

    def buffer(self, *shape: int) -> Tensor:
        """Zeros that are at least float32."""
        dtype = torch.promote_types(self.filters.dtype or torch.get_default_dtype(), torch.float32)
        return torch.zeros(shape, device=self.filters.device, dtype=dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # a vector in half precision would stop following the weights
        with wide_buffers(self):
            super()._apply(fn, recurse)
        return self


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if like.ndim in formats and not like.is_contiguous() and like.is_contiguous(memory_format=formats[like.ndim]):
        return x.contiguous(memory_format=formats[like.ndim])
    return x.contiguous()


def squares(rows: Tensor) -> Tensor:
    """The sum of squares of each row, never quite zero, so that it can be divided by: ``(…, 1)``."""
    return rows.square().sum(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)


def centred(rows: Tensor) -> Tensor:
    """Each row without its mean."""
    return rows - rows.mean(-1, keepdim=True)


def checked_iterations(iterations: int) -> int:
    """``iterations`` if it is a positive whole number.

    Raises:
        OptionError: when it is not.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise OptionError(f"iterations={iterations!r}; expected a positive whole number")
    return iterations


def checked_positive(name: str, value: float, *, zero: bool = False) -> float:
    """``value`` if it is a finite number above zero, or zero where that is allowed.

    Raises:
        OptionError: when it is not.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 < value < math.inf or (zero and value == 0)):
        raise OptionError(
            f"{name}={value!r}; expected a {'number that is not negative' if zero else 'positive number'}"
        )
    return value
