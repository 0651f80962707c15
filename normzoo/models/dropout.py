"""Dropout whose masks depend on a seed, the place in the model and the step, and on nothing else."""

from __future__ import annotations

import hashlib
from collections import deque

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normzoo.errors import NormzooError
from normzoo.layers.base import in_backward


class Dropout(nn.Module):
    r"""Dropout with random numbers of its own.

    .. math:: y = \frac{m \odot x}{1 - p}, \qquad m \sim \mathrm{Bernoulli}(1 - p)

    With a key (:func:`seed_dropout`), the mask of the k-th forward pass in training is a function of the key and k
    alone: it is the same whatever else draws random numbers, so two models that differ in their norm drop the same
    units. A forward pass that activation checkpointing repeats inside the backward pass gets the mask of the pass it
    repeats. Without a key it is :class:`torch.nn.Dropout`.

    Key and step are part of the state dict, so that a resumed training goes on with the masks it would have had.

    Args:
        p: probability of zero.

    Raises:
        NormzooError: for a ``p`` outside of :math:`[0, 1)`.

    Source:
        Srivastava et al. 2014, Dropout: A Simple Way to Prevent Neural Networks from Overfitting, JMLR 15.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p < 1:
            raise NormzooError(f"dropout={p!r}; expected a probability from 0 to below 1")
        self.p = float(p)
        self.key: int | None = None
        self.step = 0
        self._passes: deque[tuple[int, Tensor]] = deque(maxlen=64)
        self._repeated: tuple[int, set[int]] = (-1, set())

    def seed(self, key: int) -> None:
        """Take a key of 63 bits, and start again from the first mask."""
        self.key, self.step = key, 0
        self._passes.clear()

    def forward(self, x: Tensor) -> Tensor:
        """Drop in training, pass on in evaluation; any shape."""
        if not self.training or self.p == 0:
            return x
        if self.key is None:
            return F.dropout(x, self.p, training=True)
        seed = hashlib.blake2b(f"{self.key}/{self._step_of(x)}".encode(), digest_size=8).digest()
        generator = torch.Generator(x.device).manual_seed(int.from_bytes(seed, "little") >> 1)
        # the values are drawn in the order of the shape, not of x's strides
        keep = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - self.p, generator=generator)
        return x * keep.div_(1 - self.p)

    def _step_of(self, x: Tensor) -> int:
        """The number of this pass, or of the pass that it repeats."""
        trace = x.detach()[:4].flatten(1)[:, :16].clone() if x.ndim > 1 else x.detach()[:16].clone()
        if not in_backward():
            self.step += 1
            self._passes.append((self.step, trace))
            return self.step
        # Several passes may precede one backward pass: the one repeated here had the same input. Equal inputs are told
        # apart by order: a backward pass repeats the latest first.
        task = torch._C._current_graph_task_id()
        if self._repeated[0] != task:
            self._repeated = (task, set())
        done = self._repeated[1]
        left = [(step, seen) for step, seen in reversed(self._passes) if step not in done]
        same = [step for step, seen in left if seen.shape == trace.shape and torch.equal(seen, trace)]
        step = (same or [step for step, _ in left] or [self.step])[0]
        done.add(step)
        return step

    def get_extra_state(self) -> Tensor:
        """Key and step, as a tensor so that every format of checkpoints can hold them."""
        return torch.tensor([-1 if self.key is None else self.key, self.step])

    def set_extra_state(self, state: Tensor) -> None:
        """Go on where ``state`` was taken."""
        key, self.step = state.tolist()
        self.key = None if key < 0 else key
        self._passes.clear()

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p:g}"


def seed_dropout(model: nn.Module, seed: int) -> None:
    """Key every :class:`Dropout` of a model by the seed and the module's name, and start again from the first mask.

    >>> layer = nn.ModuleDict({"drop": Dropout(0.5)})
    >>> seed_dropout(layer, 1)
    >>> first = layer["drop"](torch.ones(8))
    >>> seed_dropout(layer, 1)
    >>> torch.equal(first, layer["drop"](torch.ones(8)))
    True
    """
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            module.seed(int.from_bytes(digest, "little") >> 1)
