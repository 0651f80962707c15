"""English text that ships with Python, character by character."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from normzoo.data.base import DataInputs, DataSet, Family, Kind, Parts
from normzoo.errors import NormzooError

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
_UNKNOWN = ALPHABET.index("?")
_EVAL_SHARE = 20  # one twentieth of the text for validation, one for testing


@dataclass(frozen=True)
class Text(DataSet):
    """Predict the next character of Python's own reference manual, which every Python ships for ``help()``.

    About 450 000 characters of English with some code. The first 90 % are for training, the next 5 % for validation,
    the last 5 % for testing: contiguous, so no sentence is in two parts. Symbols are the 95 printable ASCII characters
    and the newline; typographic quotes and dashes become their plain forms, anything else a question mark.

    Training windows start anywhere; an epoch draws ``train_samples`` of them. Validation and test windows follow each
    other without overlap, at most ``eval_samples`` of them. Uniform guessing costs log2(96) = 6.58 bits a character.

    Shapes: ``x (N, length)`` symbols, ``y (N, length)``: the symbols one place further on.

    Args:
        length: Characters in a window.
        train_samples: Windows in an epoch.
        eval_samples: Most windows for validation, and for testing.
        text_hash: First 16 hex digits of the text's SHA-256. The text differs between versions of Python, so a result
            is filed under it; asking for a text that this Python does not have is refused.

    Raises:
        NormzooError: if this Python ships another text than ``text_hash`` names, or none.

    Source: The Python Language Reference, as in ``pydoc_data.topics``.

    Example:
        >>> parts = Text(length=16, train_samples=8).parts("transformer")
        >>> bool((parts.val["x"][0, 1:] == parts.val["y"][0, :-1]).all())
        True
    """

    name: ClassVar[str] = "text"
    kind: ClassVar[Kind] = "language_modelling"
    families: ClassVar[tuple[Family, ...]] = ("transformer", "rnn")
    source: ClassVar[str] = "The Python Language Reference, shipped with Python as pydoc_data.topics"

    length: int = 64
    train_samples: int = 4096
    eval_samples: int = 256
    text_hash: str | None = None

    def __post_init__(self) -> None:
        self.at_least(length=2, train_samples=1, eval_samples=1)

    def concrete(self) -> Self:
        """With the hash of the text of this Python."""
        return replace(self, text_hash=_hash(corpus()))

    def parts(self, family: Family) -> Parts:
        """The three parts; both families see the same windows."""
        del family
        text = corpus()
        found = _hash(text)
        if self.text_hash not in (None, found):
            raise NormzooError(
                f"data 'text': text_hash={self.text_hash!r} is another text than the one of Python "
                f"{platform.python_version()} ({found!r}); use the Python it came from, or leave text_hash out"
            )
        symbols = encode(text)
        held_out = len(symbols) // _EVAL_SHARE
        train, val, test = symbols.split([len(symbols) - 2 * held_out, held_out, held_out])
        if held_out <= self.length:
            raise NormzooError(
                f"data 'text': length={self.length} does not fit into the {held_out} characters held out"
            )
        return Parts(
            _windows(train, self.length, step=1),
            *(_windows(part, self.length, step=self.length, most=self.eval_samples) for part in (val, test)),
            inputs=DataInputs((self.length,), vocabulary=len(ALPHABET), per_position=True),
            outputs=len(ALPHABET),
            train_samples=self.train_samples,
            facts={"text_sha256": found, "text_characters": len(symbols), "python": platform.python_version()},
        )


def corpus() -> str:
    """The text, the same for every run of one version of Python.

    Raises:
        NormzooError: if this Python was built without its manual.
    """
    try:
        from pydoc_data.topics import topics  # half a megabyte: only when it is asked for
    except ImportError as error:
        raise NormzooError(
            "data 'text' is the manual that ships with Python (pydoc_data.topics), and this Python has none; "
            "install the full standard library"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def encode(text: str) -> Tensor:
    """Symbols (n,) of a text, as indices into :data:`ALPHABET`."""
    plain = text.translate(str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "–": "-", "—": "-", "…": "..."}))
    table = np.full(256, _UNKNOWN, dtype=np.int64)
    table[[ord(character) for character in ALPHABET]] = np.arange(len(ALPHABET))
    return torch.from_numpy(table[np.frombuffer(plain.encode("latin-1", "replace"), dtype=np.uint8)])


def decode(symbols: Tensor) -> str:
    """The text of symbols (n,)."""
    return "".join(ALPHABET[symbol] for symbol in symbols.tolist())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _windows(symbols: Tensor, length: int, *, step: int, most: int | None = None) -> dict[str, Tensor]:
    """Views, not copies: overlapping windows cost nothing until they are indexed."""
    window = symbols.unfold(0, length + 1, step)[:most]
    return {"x": window[:, :-1], "y": window[:, 1:]}
