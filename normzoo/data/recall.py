"""Associative recall: say which value belonged to a key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from normzoo.data.base import IGNORED, DataInputs, DataSet, Family, Kind, Parts
from normzoo.errors import NormzooError


@dataclass(frozen=True)
class Recall(DataSet):
    r"""Pairs of keys and values, then keys alone; at each of these the answer is the key's value.

    .. math::

        k_1\, v_1\, k_2\, v_2 \dots k_P\, v_P\; k_{\pi(1)}\, k_{\pi(2)} \dots k_{\pi(Q)}
        \;\longrightarrow\; v_{\pi(1)}\, v_{\pi(2)} \dots v_{\pi(Q)}

    Keys of one sequence differ from each other and are drawn from the first half of the vocabulary; values are drawn,
    with repetition, from the second half. No answer appears in the input after it is asked for, so the task is the same
    for models that look both ways. Guessing one of the values that are present gives an accuracy near ``1 / pairs``.

    Shapes: ``x (N, 2 * pairs + queries)`` symbols, ``y`` of the same shape with the value at the queries and ``-100``
    (ignored) elsewhere.

    Args:
        pairs: Key-value pairs in a sequence.
        queries: Keys asked for, at most ``pairs``; all of them by default.
        vocabulary: Number of symbols, even; at least twice the number of pairs.
        train_samples: Sequences for training.
        eval_samples: Sequences for validation, and as many for testing.
        data_seed: Decides the sequences; a run's seed does not.

    Raises:
        NormzooError: if there are fewer keys than pairs, or more queries than pairs.

    Source: multi-query associative recall of S. Arora et al., Zoology, 2023, arXiv 2312.04927; after J. Ba et al.,
    Using Fast Weights to Attend to the Recent Past, 2016, arXiv 1610.06258.
    Queries follow each other without filler tokens.

    Example:
        >>> parts = Recall(pairs=2, vocabulary=8, train_samples=1, eval_samples=1).parts("transformer")
        >>> parts.train["x"].shape, int((parts.train["y"] >= 0).sum())
        (torch.Size([1, 6]), 2)
    """

    name: ClassVar[str] = "recall"
    kind: ClassVar[Kind] = "classification"
    families: ClassVar[tuple[Family, ...]] = ("transformer", "rnn")
    source: ClassVar[str] = "Arora et al. 2023, arXiv 2312.04927; Ba et al. 2016, arXiv 1610.06258"

    pairs: int = 4
    queries: int | None = None
    vocabulary: int = 16
    train_samples: int = 8000
    eval_samples: int = 1000
    data_seed: int = 0

    def __post_init__(self) -> None:
        self.at_least(pairs=1, vocabulary=2, train_samples=1, eval_samples=1, data_seed=0)
        if self.vocabulary % 2 or self.vocabulary // 2 < self.pairs:
            raise NormzooError(
                f"data 'recall': {self.pairs} pairs need an even vocabulary of at least {2 * self.pairs}; "
                f"got {self.vocabulary}"
            )
        if self.queries is not None:
            self.at_least(queries=1)
            if self.queries > self.pairs:
                raise NormzooError(f"data 'recall': queries={self.queries} is more than pairs={self.pairs}")

    def parts(self, family: Family) -> Parts:
        """The three parts; both families see the same sequence."""
        del family
        generator = torch.Generator().manual_seed(self.data_seed)
        counts = (self.train_samples, self.eval_samples, self.eval_samples)
        return Parts(
            *(self._draw(count, generator) for count in counts),
            inputs=DataInputs((2 * self.pairs + self._asked,), vocabulary=self.vocabulary, per_position=True),
            outputs=self.vocabulary,
        )

    @property
    def _asked(self) -> int:
        return self.pairs if self.queries is None else self.queries

    def _draw(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        half = self.vocabulary // 2
        key = torch.rand(count, half, generator=generator).argsort(1)[:, : self.pairs]
        value = torch.randint(half, self.vocabulary, (count, self.pairs), generator=generator)
        asked = torch.rand(count, self.pairs, generator=generator).argsort(1)[:, : self._asked]
        told = rearrange([key, value], "two n p -> n (p two)")
        silence = torch.full_like(told, IGNORED)
        return {
            "x": torch.cat([told, key.gather(1, asked)], 1),
            "y": torch.cat([silence, value.gather(1, asked)], 1),
        }
