"""The roofline: what each contender makes of the memory's bandwidth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from normzoo.bench.result import FLOOR, Row
from normzoo.errors import NormzooError


def roofline(rows: Sequence[Row], path: Path) -> None:
    """Draw achieved bandwidth over the bytes that must be moved, under the bandwidth of the floor, into a file.

    A norm does a few operations for each value, far below what any processor could do in the time that the value takes
    to arrive: its roof is the memory, and the floor of each size measures it.

    Raises:
        NormzooError: when nothing was timed, or for a format that cannot be written.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    directions = [d for d in ("forward", "backward", "both") if any(r.direction == d and r.gb_per_s for r in rows)]
    if not directions:
        raise NormzooError("nothing to plot: no contender has a bandwidth")
    figure, axes = plt.subplots(
        1, len(directions), figsize=(5 * len(directions) + 3, 5), sharey=True, squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys((r.norm, r.contender) for r in rows if r.gb_per_s and r.contender != FLOOR))
    colours = plt.get_cmap("tab20")
    for ax, direction in zip(axes[0], directions, strict=True):
        here = [r for r in rows if r.direction == direction and r.gb_per_s]
        for i, (norm, contender) in enumerate(names):
            points = sorted((_bytes(r), r.gb_per_s or 0) for r in here if (r.norm, r.contender) == (norm, contender))
            if points:
                style = dict(marker="o" if contender == "normzoo" else "x", linestyle=":", color=colours(i % 20))
                ax.plot(*zip(*points, strict=True), label=f"{norm}, {contender}", **style)
        roof = sorted((_bytes(r), r.gb_per_s or 0) for r in here if r.contender == FLOOR)
        ax.plot(*zip(*roof, strict=True), color="black", marker="_", markersize=16, label="floor")
        ax.set(xscale="log", yscale="log", title=direction, xlabel="bytes that must be moved")
        for axis, unit in ((ax.xaxis, "B"), (ax.yaxis, "")):
            axis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_formatter=NullFormatter())
            axis.set_major_formatter(EngFormatter(unit))
        ax.grid(visible=True, alpha=0.3)
    axes[0][0].set_ylabel("GB/s")
    figure.legend(*axes[0][-1].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise NormzooError(f"cannot write the plot to {path}: {error}") from error
    finally:
        plt.close(figure)


def _bytes(row: Row) -> int:
    return round((row.gb_per_s or math.nan) * 1e9 * (row.seconds or math.nan))
