"""No normalization, the control of every comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from normzoo.layers.base import Norm, Traits
from normzoo.registry import register


@register("none", aliases=("identity", "no_norm"))
class NoNorm(Norm):
    r"""The identity: no statistics, no parameters.

    .. math:: y = x

    Args:
        num_features: number of channels ``C``.
        channel_dim: ``1`` for ``(N, C, *S)``, ``-1`` for ``(N, *S, C)``.

    Shape:
        ``(N, C)``, ``(N, C, *S)`` or ``(N, *S, C)`` to the same; masked positions come out as zero.

    Example:
        >>> NoNorm(8)(torch.ones(1, 8)).sum()
        tensor(8.)
    """

    @property
    def traits(self) -> Traits:
        """Nothing is shared, nothing is invariant."""
        return Traits(batch_dependent=False, causal=True, causal_in_training=True)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return ``x``."""
        self.check_input(x, mask)
        if mask is None:
            return x
        return torch.where(mask.unsqueeze(1 if self.channel_dim == 1 else -1), x, 0)

    def extra_repr(self) -> str:
        """The number of channels."""
        return str(self.num_features)
