"""The adding problem: remember two numbers over a long distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normzoo.data.base import DataInputs, DataSet, Family, Kind, Parts


@dataclass(frozen=True)
class Adding(DataSet):
    r"""A sequence of pairs (value, marker); the answer is the sum of the two marked values.

    .. math::

        x_t = (u_t, m_t), \quad u_t \sim U[0, 1], \quad m_t = 1 \text{ at two positions } i < j,
        \quad y = u_i + u_j

    One marker lies in the first half of the sequence and one in the second. Always answering 1, the mean, has a mean
    squared error of :math:`\operatorname{var} y = 2 / 12 = 1/6 \approx 0.167`: below that, something was remembered.

    Shapes: ``x (N, length, 2)``, ``y (N, 1)`` and with ``variable`` lengths ``mask (N, length)``, true where the token
    is real. Padding is at the end and holds zeros.

    Args:
        length: Steps of the longest sequence.
        variable: Draw each length uniformly from ``length / 2`` to ``length``.
        train_samples: Sequences for training.
        eval_samples: Sequences for validation, and as many for testing.
        data_seed: Decides the sequences; a run's seed does not.

    Source: S. Hochreiter and J. Schmidhuber, Long Short-Term Memory, Neural Computation 9(8), 1997, section 5.4. As has
    become usual (Arjovsky, Shah and Bengio 2016, arXiv 1511.06464), values lie in [0, 1] instead of [-1, 1], markers
    are 0 and 1, one in each half, and the sum is the target itself.

    Example:
        >>> parts = Adding(length=6, train_samples=2, eval_samples=2).parts("rnn")
        >>> value, marker = parts.train["x"].unbind(-1)
        >>> bool(torch.allclose((value * marker).sum(1, keepdim=True), parts.train["y"]))
        True
    """

    name: ClassVar[str] = "adding"
    kind: ClassVar[Kind] = "regression"
    families: ClassVar[tuple[Family, ...]] = ("rnn", "transformer")
    source: ClassVar[str] = "Hochreiter and Schmidhuber 1997, Neural Computation 9(8), section 5.4"

    length: int = 40
    variable: bool = False
    train_samples: int = 4000
    eval_samples: int = 1000
    data_seed: int = 0

    def __post_init__(self) -> None:
        self.at_least(length=4, train_samples=1, eval_samples=1, data_seed=0)

    def parts(self, family: Family) -> Parts:
        """The three parts; both families see the same sequence."""
        del family
        generator = torch.Generator().manual_seed(self.data_seed)
        counts = (self.train_samples, self.eval_samples, self.eval_samples)
        return Parts(
            *(self._draw(count, generator) for count in counts), inputs=DataInputs((self.length, 2)), outputs=1
        )

    def _draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        if self.variable:
            length = torch.randint(self.length // 2, self.length + 1, (count,), generator=generator)
        else:
            length = torch.full((count,), self.length)
        half = length // 2
        first = (torch.rand(count, generator=generator) * half).long()
        second = half + (torch.rand(count, generator=generator) * (length - half)).long()
        mask = torch.arange(self.length) < length.unsqueeze(1)
        value = torch.rand(count, self.length, generator=generator) * mask
        marker = torch.zeros(count, self.length)
        marker.scatter_(1, torch.stack([first, second], 1), 1.0)
        batch = {"x": torch.stack([value, marker], -1), "y": (value * marker).sum(1, keepdim=True)}
        return batch | {"mask": mask} if self.variable else batch
