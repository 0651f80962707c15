"""The sentence that a norm is: which axes of ``b c s`` share a statistic."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from normzoo.errors import NormzooError

CANONICAL = ("b", "c", "s")
_AXIS = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Pattern:
    """A moments pattern such as ``b (g c) s -> b g``, taken apart.

    The left side names the canonical axes ``b`` (batch), ``c`` (channel) and ``s`` (position), each of which may be
    split into factors: ``(g c)`` are ``g`` groups of ``c`` channels. The right side names the axes along which
    statistics differ; every other axis is averaged over.

    Attributes:
        factors: the names of each canonical axis, in the order ``b``, ``c``, ``s``.
        kept: the axes of the right side, in their order on the left.
        population: the pattern of the running statistics: what is left of the right side when batch and position are
            gone.

    >>> str(Pattern.parse("(n b) c s -> n c").population)
    'b c s -> c'
    """

    factors: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    kept: tuple[str, ...]
    population: Pattern = field(init=False, repr=False, compare=False)
    _codes: dict[tuple[int, ...], list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # at once, not by cached_property: its lock (before Python 3.12) is nothing that torch.compile can trace
        factors, kept = (("b",), self.factors[1], ("s",)), tuple(a for a in self.kept if a in self.factors[1])
        same = (factors, kept) == (self.factors, self.kept)
        object.__setattr__(self, "population", self if same else replace(self, factors=factors, kept=kept))

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern.

        Raises:
            NormzooError: for anything that is not ``b c s -> …`` with factors in parentheses.

        >>> Pattern.parse("b (g c) s -> b g").kept
        ('b', 'g')
        """
        return _parse(text)

    @property
    def axes(self) -> tuple[str, ...]:
        """All elementary axes in the order ``b``, ``c``, ``s``."""
        return tuple(axis for group in self.factors for axis in group)

    @property
    def free(self) -> tuple[str, ...]:
        """The axes whose sizes are options of the norm (``g`` of ``(g c)``)."""
        return tuple(axis for axis in self.axes if axis not in CANONICAL)

    @property
    def batch_dependent(self) -> bool:
        """Whether samples share a statistic."""
        return "b" not in self.kept

    @property
    def synchronizable(self) -> bool:
        """Whether statistics can span processes: they span the batch, and virtual batches are local by definition."""
        return self.factors[0] == ("b",) and self.batch_dependent

    @property
    def position_dependent(self) -> bool:
        """Whether positions of one sample share a statistic."""
        return "s" not in self.kept

    def code(self, options: Mapping[str, int]) -> list[int]:
        """The pattern as numbers, as compiled kernels take it.

        The numbers of factors of ``b``, ``c`` and ``s``, then for each factor its size (-1 for what is left of the
        axis) and whether it is kept.

        >>> Pattern.parse("b (g c) s -> b g").code({"g": 8})
        [1, 2, 1, -1, 1, 8, 1, -1, 0, -1, 0]
        """
        key = tuple(options.values())
        if (known := self._codes.get(key)) is not None:
            return known
        code = [len(group) for group in self.factors]
        for name, group in zip(CANONICAL, self.factors, strict=True):
            for axis in group:
                code += [-1 if axis == name else options[axis], int(axis in self.kept)]
        self._codes[key] = code
        return code

    @classmethod
    def decode(cls, code: Sequence[int]) -> tuple[Pattern, dict[str, int]]:
        """The pattern and the options of a code; axes with a size of their own have other names.

        >>> pattern, options = Pattern.decode([1, 2, 1, -1, 1, 8, 1, -1, 0, -1, 0])
        >>> str(pattern), options
        ('b (c0 c) s -> b c0', {'c0': 8})
        """
        factors, kept, options, rest = [], [], {}, iter(code[3:])
        for name, many in zip(CANONICAL, code[:3], strict=True):
            group = []
            for i in range(many):
                size, is_kept = next(rest), next(rest)
                axis = name if size < 0 else f"{name}{i}"
                group.append(axis)
                kept += [axis] if is_kept else []
                options |= {} if size < 0 else {axis: size}
            factors.append(tuple(group))
        return cls((factors[0], factors[1], factors[2]), tuple(kept)), options

    def sizes(self, shape: tuple[int, int, int], options: Mapping[str, int]) -> dict[str, int]:
        """The size of every elementary axis for a tensor of canonical ``shape`` ``(b, c, s)``.

        Raises:
            NormzooError: when a factor does not divide its axis.
        """
        sizes = {}
        for name, group, total in zip(CANONICAL, self.factors, shape, strict=True):
            given = math.prod([options[axis] for axis in group if axis != name])  # a list, for torch.compile
            if given < 1 or total % given:
                raise NormzooError(
                    f"pattern {str(self)!r}: an axis {name!r} of size {total} cannot be split by "
                    f"{ {a: options[a] for a in group if a != name} }; expected a divisor of {total}: {divisors(total)}"
                )
            sizes |= {axis: options[axis] if axis != name else total // given for axis in group}
        return sizes

    def __str__(self) -> str:
        left = " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in self.factors)
        return f"{left} -> {' '.join(self.kept)}".rstrip()


@lru_cache
def _parse(text: str) -> Pattern:
    def wrong(why: str) -> NormzooError:
        return NormzooError(
            f"moments pattern {text!r}: {why}; expected the axes b (batch), c (channel) and s (position) in this "
            "order, each alone or as a product such as (g c), then '->' and the axes along which the statistics "
            "differ, as in 'b (g c) s -> b g'"
        )

    left, arrow, right = text.partition("->")
    if not arrow:
        raise wrong("there is no '->'")
    groups = [tuple((product or single).split()) for product, single in re.findall(r"\(([^()]*)\)|([^\s()]+)", left)]
    if len(groups) != 3 or any(name not in group for name, group in zip(CANONICAL, groups, strict=False)):
        raise wrong("the left side is not b c s")
    axes = [axis for group in groups for axis in group]
    if bad := [axis for axis in axes + right.split() if not _AXIS.fullmatch(axis)]:
        raise wrong(f"{bad[0]!r} is no axis name")
    if len(set(axes)) != len(axes):
        raise wrong("an axis appears twice on the left")
    if missing := [axis for axis in right.split() if axis not in axes]:
        raise wrong(f"{missing[0]!r} on the right is not on the left")
    if len(set(right.split())) != len(right.split()):
        raise wrong("an axis appears twice on the right")
    return Pattern((groups[0], groups[1], groups[2]), tuple(axis for axis in axes if axis in right.split()))


def divisors(n: int) -> list[int]:
    """All divisors of ``n``, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [d for d in range(1, n + 1) if n % d == 0]
