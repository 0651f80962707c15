"""What is measured: a tensor of some shape, layout and dtype, and how much memory a norm must move for it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from normzoo.errors import NormzooError, unknown

LAYOUTS = ("channels-first", "channels-last", "tokens")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
DEVICES = ("cpu", "cuda")
DIRECTIONS = ("forward", "backward", "both")
PASSES = {"forward": 2, "backward": 3, "both": 5}
"""How often each direction must at least go through memory: read x and write y; read x and dy and write dx."""


class Inputs(NamedTuple):
    """The tensors that every contender gets."""

    x: Tensor
    dy: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Case:
    """One shape in one layout and dtype.

    Args:
        shape: ``(N, C)``, ``(N, C, *S)`` or, as ``tokens``, ``(N, *S, C)``.
        layout: ``"channels-first"``, ``"channels-last"`` (torch's memory format of images), or ``"tokens"``.
        dtype: of the input.
        device: ``"cpu"`` or ``"cuda"``.
        parameters: dtype of gains and shifts; that of the input when left out.

    Raises:
        NormzooError: for a layout, dtype or device that is none, or a shape that does not fit the layout.

    Example:
        >>> case = Case((64, 64, 32, 32), dtype="bfloat16")
        >>> case.channels, case.bytes("both") == 5 * 2 * 64 * 64 * 32 * 32
        (64, True)
    """

    shape: tuple[int, ...]
    layout: str = "channels-first"
    dtype: str = "float32"
    device: str = "cpu"
    parameters: str = ""

    def __post_init__(self) -> None:
        one_of("layout", self.layout, LAYOUTS)
        one_of("dtype", self.dtype, DTYPES)
        one_of("device", self.device, DEVICES)
        if self.parameters:
            one_of("dtype of the parameters", self.parameters, DTYPES)
        if len(self.shape) < 2 or any(size < 1 for size in self.shape):
            raise NormzooError(f"the shape {self.shape} has no batch and channels; expected sizes as in 64,64,32,32")
        if self.layout == "channels-last" and len(self.shape) not in (4, 5):
            raise NormzooError(
                f"layout channels-last with the shape {self.shape}; it is a memory format of images and volumes, "
                "(N, C, H, W) and (N, C, D, H, W): give such a shape, or --layout tokens for (N, *S, C)"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise NormzooError("device cuda: torch finds no CUDA device here; leave --device out to measure on the CPU")

    @property
    def channel_dim(self) -> int:
        """1 or, for tokens, -1."""
        return -1 if self.layout == "tokens" else 1

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[self.channel_dim]

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        """What one tensor of this shape and dtype takes."""
        return self.elements * DTYPES[self.dtype].itemsize

    def bytes(self, direction: str) -> int:
        """What has to be moved at least: 2, 3 or 5 times the tensor."""
        return PASSES[direction] * self.tensor_bytes

    @property
    def parameter_dtype(self) -> torch.dtype:
        """Of gains and shifts."""
        return DTYPES[self.parameters or self.dtype]

    def inputs(self) -> Inputs:
        """Random numbers, the same every time; the mask leaves about 70 % of the positions, as padding at the end."""
        generator = torch.Generator().manual_seed(0)
        made = []
        for scale, shift in ((1.5, 0.5), (1.0, 0.0)):
            tensor = torch.randn(self.shape, generator=generator).mul_(scale).add_(shift).to(DTYPES[self.dtype])
            if self.layout == "channels-last":
                last = torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d
                tensor = tensor.to(memory_format=last)
            made.append(tensor.to(self.device))
        n, *positions = self.shape[:-1] if self.layout == "tokens" else (self.shape[0], *self.shape[2:])
        length = math.prod(positions)
        if positions:
            real = (torch.linspace(0.4, 1.0, n) * length).round().clamp(min=1)
            mask = (torch.arange(length) < real.unsqueeze(1)).view(n, *positions)
        else:
            mask = torch.arange(n) < max(round(0.7 * n), 1)
        return Inputs(made[0].requires_grad_(), made[1], mask.to(self.device))

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.shape)), self.layout, self.dtype]
        return " ".join(parts + ([self.device] if self.device != "cpu" else []))


def one_of(kind: str, value: str, known: Iterable[str]) -> str:
    """``value`` when it is known.

    Raises:
        NormzooError: otherwise, with the closest known one.
    """
    if value not in (known := list(known)):
        raise unknown(kind, value, known)
    return value


def parse_shape(text: str) -> tuple[int, ...]:
    """Sizes separated by commas or ``x``.

    >>> parse_shape("64,64,32,32"), parse_shape("16384x512")
    ((64, 64, 32, 32), (16384, 512))

    Raises:
        NormzooError: for anything else.
    """
    try:
        return tuple(int(size) for size in text.replace("x", ",").strip("() ").split(","))
    except ValueError:
        raise NormzooError(
            f"cannot read the shape {text!r}; expected sizes with commas and without spaces, as in 64,64,32,32"
        ) from None
