"""What was measured, as rows for a table, a CSV or a JSON file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields


@dataclass
class Row:
    """One contender in one direction of one case.

    Attributes:
        norm: its label.
        contender: how it is computed, as ``"normzoo"`` or ``"torch.nn"``.
        shape: sizes joined by ``x``.
        layout: as of the case.
        dtype: of the input.
        device: ``"cpu"`` or ``"cuda"``.
        direction: ``"forward"``, ``"backward"`` or ``"both"``.
        seconds: median over the rounds, of one call.
        low: a quarter of the rounds was faster.
        high: a quarter was slower.
        gb_per_s: bytes that must be moved over the time.
        floors: how many times the floor's time (the base's, for a recurrent layer); median over the rounds.
        to_best: time over that of the best other contender of the norm; median over the rounds.
        saved_bytes: what is kept for the backward pass, the input included, parameters not.
        rounds: in which it took part.
        calls: in one burst.
        way: what served a norm of ours, one of :data:`normzoo.ops.CHOICES`.
        reason: why there is no time.
    """

    norm: str
    contender: str
    shape: str
    layout: str
    dtype: str
    device: str
    direction: str
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    gb_per_s: float | None = None
    floors: float | None = None
    to_best: float | None = None
    saved_bytes: int | None = None
    rounds: int = 0
    calls: int = 0
    way: str = ""
    reason: str = ""


FLOOR = "floor"
"""The contender that only copies and adds."""


def as_csv(rows: Sequence[Row]) -> str:
    """A header and a line for each row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return text.getvalue()
