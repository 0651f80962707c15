"""How numbers and other people's words are written: significant digits, and escapes for Markdown, CSV and terminals."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

# C0 and C1 control characters (terminal escapes among them), and the marks that turn the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]")
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+!|~&$])")


@dataclass(frozen=True)
class Numbers:
    """One way of writing all values of one metric, so that they can be compared down a column.

    Attributes:
        decimals: digits after the point, or None for three significant digits each.
    """

    decimals: int | None

    @classmethod
    def fitting(cls, values: Iterable[float], spreads: Iterable[float]) -> Numbers:
        """So many decimals that the typical spread is 3 to 30 units of the last one.

        Values that span more than two decades get three significant digits each instead.

        >>> Numbers.fitting([0.91, 0.97], [0.012, 0.02])
        Numbers(decimals=3)
        >>> Numbers.fitting([0.91, 0.97], [0.004, 0.005])
        Numbers(decimals=3)
        >>> Numbers.fitting([1e-5, 0.2], [1e-6, 0.01])
        Numbers(decimals=None)
        """
        sizes = sorted(abs(v) for v in values if math.isfinite(v) and v != 0)
        if not sizes or sizes[-1] > 100 * sizes[0]:
            return cls(None)
        widths = sorted(abs(s) for s in spreads if math.isfinite(s) and s != 0) or [sizes[-1] / 100]
        decimals = math.ceil(math.log10(3 / widths[len(widths) // 2]))
        return cls(max(decimals, 1)) if decimals <= 6 else cls(None)

    def value(self, x: float, sign: bool = False) -> str:
        """The number as text, ``–`` for NaN, with its sign when ``sign``.

        >>> Numbers(3).value(0.98765), Numbers(3).value(0.0123, sign=True), Numbers(3).value(float("nan"))
        ('0.988', '+0.012', '–')
        """
        if not math.isfinite(x):
            return "–"
        form = "+" if sign else ""
        short = self.decimals is None or abs(x) >= 1e6
        text = f"{x:{form}.3g}" if short else f"{x:{form}.{self.decimals}f}"
        if float(text) == 0:
            text = text.lstrip("+-")
        return text.replace("-", "−") if "e" not in text else text

    def interval(self, low: float, high: float) -> str:
        """``[low, high]``, both with their sign."""
        return f"[{self.value(low, True)}, {self.value(high, True)}]"


def clean(text: object) -> str:
    """The text without control characters: a label or an error must not steer the terminal or break a row.

    >>> clean("a" + chr(27) + "[31mb" + chr(9) + "c")
    'a[31mb c'
    """
    return _CONTROL.sub("", str(text).replace("\t", " ").replace("\r", ""))


def one_line(text: object) -> str:
    """The text with every run of white space, line ends included, as one space."""
    return " ".join(clean(text).split())


def code(text: object) -> str:
    r"""The text as a Markdown code span that survives in a table, whatever it holds.

    >>> code("batch_norm"), code("a|b"), code("tick`")
    ('`batch_norm`', '`a\\|b`', '`` tick` ``')
    """
    line = one_line(text).replace("|", r"\|")
    longest = max((len(run) for run in re.findall(r"`+", line)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if "`" in line else ""
    return f"{fence}{pad}{line or ' '}{pad}{fence}"


def fenced(text: str, language: str = "") -> str:
    """The text as a Markdown code block whose fence it cannot close.

    >>> print(fenced("x = 1", "python"))
    ```python
    x = 1
    ```
    """
    body = "\n".join(clean(line) for line in text.split("\n"))
    longest = max((len(run) for run in re.findall(r"`+", body)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{body}\n{fence}"


def escape(text: object) -> str:
    r"""The text as plain Markdown prose: nothing in it is markup, a table cell or HTML.

    >>> escape("<b>|x|_y_")
    '\\<b\\>\\|x\\|\\_y\\_'
    """
    return _MARKDOWN.sub(r"\\\1", one_line(text))


def safe_cell(value: object) -> object:
    """A value for a CSV file: a text that a spreadsheet would take for a formula gets a quote in front.

    >>> safe_cell("=1+1"), safe_cell(-1.5), safe_cell("batch_norm")
    ("'=1+1", -1.5, 'batch_norm')
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("=", "+", "-", "@"):
        return f"'{value}"
    return value


def count(n: int, noun: str) -> str:
    """``1 run``, ``3 runs``.

    >>> count(1, "run"), count(0, "run")
    ('1 run', '0 runs')
    """
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def listing(words: Iterable[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``.

    >>> listing(["a", "b", "c"])
    'a, b and c'
    """
    words = list(words)
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def duration(seconds: float) -> str:
    """Seconds for people: ``4.2 s``, ``3 min 05 s``, ``2 h 10 min``.

    >>> duration(4.2), duration(185), duration(7800)
    ('4.2 s', '3 min 05 s', '2 h 10 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
