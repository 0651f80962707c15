"""What a data set is: options as fields, and three parts of tensors per family of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from normzoo.errors import NormzooError

Kind = Literal["classification", "regression", "language_modelling"]
Family = Literal["mlp", "cnn", "rnn", "transformer"]

IGNORED = -100  # torch's ignore_index: a target position that asks nothing


@dataclass(frozen=True)
class DataInputs:
    """What one sample looks like to a model.

    Attributes:
        shape: Shape of one sample without the batch: ``(F,)``, ``(C, H, W)``, ``(T, F)``, or ``(T,)`` for symbols.
        vocabulary: Number of symbols; 0 when the values are continuous.
        per_position: There is an answer at every position, not one per sample.
    """

    shape: tuple[int, ...]
    vocabulary: int = 0
    per_position: bool = False


@dataclass(frozen=True)
class Parts:
    """The tensors of a data set in the layout of one family.

    Attributes:
        train: Tensors for training: ``x``, ``y`` and, where samples differ in length, ``mask``.
        val: Tensors on which choices are made.
        test: Tensors that are looked at once.
        inputs: What one sample looks like.
        outputs: Width of the model's answer.
        train_samples: Samples drawn per epoch, where ``train`` holds more than one epoch should see.
        facts: What a result should say about the data: sizes, hashes, versions.
    """

    train: Mapping[str, Tensor]
    val: Mapping[str, Tensor]
    test: Mapping[str, Tensor]
    inputs: DataInputs
    outputs: int
    train_samples: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSet(ABC):
    """A data set is a frozen dataclass whose fields are its options; ``parts`` makes the tensors.

    Nothing in it depends on the seed of a run: what is trained, validated and tested on is the same for all seeds and
    all norms.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind]
    families: ClassVar[tuple[Family, ...]]
    source: ClassVar[str]

    @abstractmethod
    def parts(self, family: Family) -> Parts:
        """The three parts in the layout of a family."""

    def concrete(self) -> Self:
        """The same data with every option that is left open filled in; what a result is filed under."""
        return self

    def at_least(self, **bounds: int) -> None:
        """Refuse options below their bounds.

        Raises:
            NormzooError: naming the data set, the option, its value and its bound.
        """
        for option, bound in bounds.items():
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < bound:
                raise NormzooError(
                    f"data {self.name!r}: {option} must be a whole number of at least {bound}; got {value!r}"
                )
