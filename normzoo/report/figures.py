"""Learning curves and per-seed dots, as PNG and PDF: drawn without a screen, the same bytes for the same results."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from normzoo.report.comparison import Comparison, Row
from normzoo.report.findings import PERCENT
from normzoo.report.frame import Results
from normzoo.report.text import one_line

# Paul Tol's "muted" scheme, told apart under the common colour blindnesses. After nine the strokes change, not the hue.
_COLORS = ("#332288", "#CC6677", "#44AA99", "#AA4499", "#117733", "#88CCEE", "#882255", "#999933", "#DDCC77")
_STROKES = ("-", (0, (4, 1.4)), (0, (1, 1.1)), (0, (5, 1.2, 1, 1.2)))
_INK, _PALE, _GRID = "#222222", "#8a8a8a", "#e4e4e4"
# Okabe and Ito's blue and vermilion; grey and a hollow mark where nothing was decided.
_VERDICTS = {"better": "#0072B2", "worse": "#D55E00"}

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "axes.edgecolor": _PALE,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": _PALE,
    "ytick.color": _PALE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "text.color": _INK,
    "text.parse_math": False,  # a dollar sign in a label is a dollar sign
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.solid_capstyle": "round",
    "pdf.fonttype": 42,  # editable text, as journals ask
}

_DPI = 200


@dataclass(frozen=True)
class Stroke:
    """How one norm is drawn, on every figure of a study."""

    color: str
    dashes: object
    width: float


def strokes(results: Results) -> dict[str, Stroke]:
    """One stroke for each norm, by label: black for the baseline, then colours in the order of the study."""
    found: dict[str, Stroke] = {}
    norms = {row["label"]: row["norm"] for row in results.rows}
    others = 0
    for label, norm in norms.items():
        if norm == results.baseline:
            found[label] = Stroke("#000000", "-", 2.2)
            continue
        lap, color = divmod(others, len(_COLORS))
        found[label] = Stroke(_COLORS[color], _STROKES[lap % len(_STROKES)], 1.5)
        others += 1
    return found


def draw_all(results: Results, comparisons: Sequence[Comparison], folder: Path) -> dict[str, dict[str, str]]:
    """Draw every figure into ``folder``.

    Returns:
        For each task the stems of its files by kind: ``{"digits/cnn": {"curves": "curves-digits-cnn", "seeds": …}}``. A
        task whose cells logged no validation curve has no ``"curves"``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, dict[str, str]] = {}
    by_label = strokes(results)
    for slug, comparison in zip(_slugs([c.task for c in comparisons]), comparisons, strict=True):
        drawn[comparison.task] = {}
        for kind, figure in (
            ("curves", lambda c: curves(results, c, by_label)),
            ("seeds", seed_dots),
        ):
            with _style():
                made = figure(comparison)
                if made is not None:
                    stem = f"{kind}-{slug}"
                    save(made, folder / stem)
                    drawn[comparison.task][kind] = stem
    return drawn


@contextmanager
def _style() -> Iterator[None]:
    # From matplotlib's own defaults, so that a matplotlibrc of the reader's does not change a report.
    with mpl.rc_context(), warnings.catch_warnings():
        # A class may be named in any script; a missing glyph is drawn as a box, which is no reason to lose the figure.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def save(figure: Figure, stem: Path) -> None:
    """Write ``stem.png`` and ``stem.pdf``, without the time of writing."""
    figure.savefig(stem.with_name(f"{stem.name}.png"), dpi=_DPI, metadata={"Software": None})
    figure.savefig(
        stem.with_name(f"{stem.name}.pdf"), metadata={"CreationDate": None, "Producer": None, "Creator": None}
    )


def _slugs(names: Sequence[str]) -> list[str]:
    """File names for tasks, different even where only their punctuation is."""
    slugs: list[str] = []
    for name in names:
        slug = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "task"
        slugs.append(slug if slug not in slugs else f"{slug}-{len(slugs) + 1}")
    return slugs


# ------------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class _Curve:
    """The curves of one norm: its seeds, and their mean over the seeds that trained."""

    row: Row
    seeds: list[tuple[np.ndarray, np.ndarray, bool]]
    epochs: np.ndarray
    mean: np.ndarray


def curves(results: Results, comparison: Comparison, by_label: dict[str, Stroke]) -> Figure | None:
    """Validation metric over epochs: all of training at the left, its last part enlarged at the right.

    Thick lines are means over the seeds that trained, thin lines are seeds; a cross is where a run stopped being
    finite. None when no cell logged two epochs.
    """
    found = [curve for row in comparison.rows if (curve := _curve(results, comparison, row))]
    if not any(len(epochs) > 1 for curve in found for epochs, _, _ in curve.seeds):
        return None
    last = max(float(epochs[-1]) for curve in found for epochs, _, _ in curve.seeds)
    first = min(float(epochs[0]) for curve in found for epochs, _, _ in curve.seeds)
    height = max(3.0, 0.9 + 0.185 * len(found))
    figure = Figure(figsize=(7.4, height))
    scale = _scale([v for curve in found for _, values, _ in curve.seeds for v in values], comparison.mode)
    enlarge = last - first >= 4
    names = {curve.row.label: _end_label(curve.row) for curve in found}
    right = 0.985 - _width(figure, list(names.values()), 7.5) - 0.065
    axes = _place(figure, height, right, 2 if enlarge else 1)
    for axis in axes:
        for curve in found:
            _draw_curve(axis, curve, by_label[curve.row.label])
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.grid(axis="y")
    axes[0].set_xlim(first, last)
    _limits(axes[0], scale, [v for c in found for _, values, _ in c.seeds for v in values])
    if enlarge:
        tail = math.ceil(first + 0.6 * (last - first))
        axes[1].set_xlim(tail, last)
        _limits(axes[1], scale, _tail(found, tail), robust=True)
    axes[0].set_ylabel(_axis_label(comparison.validation, scale))
    _heading(figure, axes, comparison, ["all of training", "its last part, enlarged"] if enlarge else [""])
    _direct_labels(figure, axes[-1], found, by_label, names)
    return figure


def _end_label(row: Row) -> str:
    lost = "" if row.complete else f" ({len(row.values)}/{row.planned})"
    return f"{_shorten(one_line(row.label), 28)}{lost}"


def _place(
    figure: Figure, height: float, right: float, panels: int, left: float = 0.09, gap: float = 0.085
) -> list[Axes]:
    """Panels side by side between two edges (parts of the figure), under a heading and over a label."""
    bottom, top = 0.47 / height, 1 - 0.52 / height
    width = (right - left - gap * (panels - 1)) / panels
    return [figure.add_axes((left + i * (width + gap), bottom, width, top - bottom)) for i in range(panels)]


def _heading(figure: Figure, axes: Sequence[Axes], comparison: Comparison, titles: Sequence[str]) -> None:
    goal = "higher" if comparison.mode == "max" else "lower"
    left = axes[0].get_position().x0
    height = figure.get_figheight()
    figure.text(left, 1 - 0.17 / height, one_line(comparison.task), fontsize=10, fontweight="bold", va="center")
    figure.text(0.985, 1 - 0.17 / height, f"{goal} is better", fontsize=8, color=_PALE, ha="right", va="center")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left", color=_PALE, pad=5)


def _curve(results: Results, comparison: Comparison, row: Row) -> _Curve | None:
    seeds, means = [], []
    for seed, cell in row.ids.items():
        epochs, values = (np.array(part) for part in results.curve(cell, comparison.validation))
        finite = np.isfinite(values)
        if not finite.any():
            continue
        trained = row.runs[seed].outcome == "ok"
        trained_for = epochs[finite] + 1  # the logs count from 0, and measure at the end
        seeds.append((trained_for, values[finite], trained))
        if trained:
            means.append(dict(zip(trained_for, values[finite], strict=True)))
    if not seeds:
        return None
    shared = sorted(set.intersection(*(set(m) for m in means))) if means else []
    mean = np.array([np.mean([m[e] for m in means]) for e in shared])
    return _Curve(row, seeds, np.array(shared), mean)


def _draw_curve(axis: Axes, curve: _Curve, stroke: Stroke) -> None:
    for epochs, values, trained in curve.seeds:
        axis.plot(epochs, values, color=stroke.color, lw=0.5, alpha=0.35, zorder=2)
        if not trained:
            axis.plot(epochs[-1:], values[-1:], "x", color=stroke.color, ms=5, mew=1.3, zorder=5, clip_on=True)
    front = 4 if curve.row.baseline else 3
    axis.plot(curve.epochs, curve.mean, color=stroke.color, ls=stroke.dashes, lw=stroke.width, zorder=front)


def _tail(found: Sequence[_Curve], start: float) -> list[float]:
    return [float(v) for curve in found for v in curve.mean[curve.epochs >= start]] or [
        float(v) for curve in found for _, values, _ in curve.seeds for v in values
    ]


def _direct_labels(
    figure: Figure, axis: Axes, found: Sequence[_Curve], by_label: dict[str, Stroke], names: dict[str, str]
) -> None:
    """Write every norm's name beside the end of its curve, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    to_screen = axis.transData + axis.transAxes.inverted()

    def place(curve: _Curve) -> float:
        ends = curve.mean if len(curve.mean) else curve.seeds[0][1]
        y = float(np.clip(ends[-1], min(low, high), max(low, high)))
        return float(to_screen.transform((axis.get_xlim()[1], y))[1])

    ordered = sorted(found, key=place)
    points = axis.get_position().height * figure.get_figheight() * 72
    spots = _spread([place(curve) for curve in ordered], 10.5 / points)
    for curve, spot in zip(ordered, spots, strict=True):
        stroke = by_label[curve.row.label]
        end = place(curve)
        drawn = {"color": stroke.color, "transform": axis.transAxes, "clip_on": False}
        inch = 1 / (axis.get_position().width * figure.get_figwidth())
        joint, start, text = 1 + 0.09 * inch, 1 + 0.10 * inch, 1 + 0.42 * inch
        axis.plot([1.0, joint], [end, spot], lw=0.6, **drawn)
        axis.plot(
            [start, text - 0.06 * inch], [spot] * 2, lw=stroke.width, ls=stroke.dashes, solid_capstyle="butt", **drawn
        )
        weight = "bold" if curve.row.baseline else "normal"
        name = names[curve.row.label]
        axis.text(text, spot, name, transform=axis.transAxes, va="center", fontsize=7.5, fontweight=weight)


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """The nearest places to ``wanted`` (sorted) that are ``gap`` apart and stay beside the axis, as far as they fit.

    Labels that touch form a block, centred on the mean of its wants: isotonic regression, which clipping then bounds.
    """
    blocks: list[tuple[float, int]] = []  # the place of a block's first label less the gaps before it; how many labels
    for i, place in enumerate(wanted):
        blocks.append((place - i * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    low = -0.02
    high = max(low, 1.02 - gap * (len(wanted) - 1))
    bases = [min(max(base, low), high) for base, n in blocks for _ in range(n)]
    return [base + i * gap for i, base in enumerate(bases)]


def _width(figure: Figure, texts: Sequence[str], size: float) -> float:
    """The width of the longest text, in bold, as a part of the figure's width."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    widths = []
    for text in texts:
        drawn = figure.text(0, 0, text, fontsize=size, fontweight="bold")
        widths.append(drawn.get_window_extent(renderer).width)
        drawn.remove()
    return max(widths, default=0.0) / (figure.get_figwidth() * figure.dpi)


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


# --------------------------------------------------------------------------------------------------------------- dots


def seed_dots(comparison: Comparison) -> Figure | None:
    """Every seed as a dot: the metric at the left, the paired difference to the baseline at the right.

    The difference has its t interval; a far outlier is an arrow at the edge with its number.
    None when no run came to a value.
    """
    c = comparison
    if not any(row.values for row in c.rows):
        return None
    paired = any(d.n for _, d in c.differences)
    height = 1.05 + 0.21 * len(c.rows)
    figure = Figure(figsize=(7.4, height))
    labels = [_shorten(one_line(row.label), 30) for row in c.rows]
    left = 0.025 + _width(figure, labels, 7.5)
    troubles = _width(figure, [row.troubles for row in c.rows], 7)
    axes = _place(figure, height, 0.985 - (troubles + 0.015 if troubles else 0), 2 if paired else 1, left, 0.03)
    for axis in axes:
        axis.set_ylim(len(c.rows) - 0.4, -0.6)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        for i in range(0, len(c.rows), 2):
            axis.axhspan(i - 0.5, i + 0.5, color="#f6f6f6", lw=0, zorder=0)
        axis.grid(axis="x")
    _metric_dots(axes[0], c, labels)
    if paired:
        _difference_dots(axes[1], c)
    for i, row in enumerate(c.rows):
        if row.troubles:
            axes[-1].text(
                1.02,
                i,
                row.troubles,
                transform=axes[-1].get_yaxis_transform(),
                va="center",
                fontsize=7,
                color="#B03A00",
            )
    base = _shorten(one_line(c.baseline.label), 30) if c.baseline else ""
    interval = f"{PERCENT} t interval" if any(d.t for _, d in c.differences) else "one seed, no interval"
    _heading(figure, axes, c, ["each seed, and the mean", f"difference to {base}, {interval}"][: len(axes)])
    return figure


def _metric_dots(axis: Axes, c: Comparison, labels: Sequence[str]) -> None:
    values = [v for row in c.rows for v in row.values.values()]
    for i, (row, label) in enumerate(zip(c.rows, labels, strict=True)):
        color = "#000000" if row.baseline else _color(row)
        _dots(axis, row.values, c.seeds, i, color)
        if len(row.values) > 1:
            axis.plot([row.mean] * 2, [i - 0.34, i + 0.34], color=color, lw=1.8, solid_capstyle="butt", zorder=4)
        weight = "bold" if row.baseline else "normal"
        spot = {"xycoords": axis.get_yaxis_transform(), "xytext": (-5, 0), "textcoords": "offset points"}
        axis.annotate(label, (0, i), **spot, ha="right", va="center", fontsize=7.5, fontweight=weight)
    scale = _scale(values, c.mode)
    _limits(axis, scale, values, horizontal=True)
    axis.set_xlabel(_axis_label(c.measured, scale))


def _difference_dots(axis: Axes, c: Comparison) -> None:
    limit = _reach(c)
    axis.axvline(0, color="#000000", lw=1.0, zorder=1)
    for i, row in enumerate(c.rows):
        d = row.difference
        if d is None or d.n == 0:
            if row.baseline:
                axis.text(limit * 0.03, i, "baseline", va="center", fontsize=7, color=_PALE)
            continue
        color = _color(row)
        if d.t is not None:
            axis.plot([d.t.low, d.t.high], [i, i], color=color, lw=1.3, solid_capstyle="butt", zorder=2)
        _dots(axis, d.seeds, c.seeds, i, color)
        if abs(d.mean) > limit:
            side = math.copysign(1, d.mean)
            axis.plot([side * limit * 0.975], [i], ">" if side > 0 else "<", color=color, ms=6, zorder=5)
            text = f"{c.numbers.value(d.mean, True)} "
            axis.text(
                side * limit * 0.93, i, text, va="center", ha="right" if side > 0 else "left", fontsize=7, color=color
            )
        else:
            face = color if row.difference and row.difference.better else "white"
            axis.plot([d.mean], [i], "D", color=color, mfc=face, ms=4.6, mew=1.2, zorder=4)
    axis.set_xlim(-limit, limit)
    axis.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: "0" if x == 0 else f"{x:+.4g}".replace("-", "−")))
    what = f"{one_line(c.measured)}, norm − baseline"
    axis.set_xlabel(f"{what}   better →" if c.mode == "max" else f"← better   {what}")


def _reach(c: Comparison) -> float:
    """Half the width of the axis of differences: all of the rows, but for those far beyond the others."""
    reaches = sorted(
        max(abs(v) for v in (*d.seeds.values(), *((d.t.low, d.t.high) if d.t else ()))) for _, d in c.differences if d.n
    )
    usual = reaches[round(0.6 * (len(reaches) - 1))] or reaches[-1]
    kept = [reach for reach in reaches if reach <= 6 * usual]
    return 1.08 * kept[-1] or 1.0


def _dots(axis: Axes, values: dict[int, float], seeds: Sequence[int], i: int, color: str) -> None:
    """The seeds of one row, each at its own height in every row, so that a pair can be followed."""
    for k, seed in enumerate(seeds):
        if seed in values:
            lift = 0.0 if len(seeds) == 1 else 0.46 * (k / (len(seeds) - 1) - 0.5)
            axis.plot([values[seed]], [i + lift], "o", color=color, ms=3.2, mew=0, alpha=0.6, zorder=3)


def _color(row: Row) -> str:
    return _VERDICTS.get(row.difference.verdict, "#6b6b6b") if row.difference else "#6b6b6b"


# -------------------------------------------------------------------------------------------------------------- scales


@dataclass(frozen=True)
class _Scale:
    """``linear``, ``log``, or ``error``: the logarithm of what is missing to 1, with ticks that say the value itself.

    A perfect score has no logarithm: it is drawn where half of ``least``, the smallest error seen, would be.
    """

    kind: str
    least: float = 0.0


def _scale(values: Sequence[float], mode: str) -> _Scale:
    v = np.array(values)
    errors = 1 - v[v < 1]
    if (
        mode == "max"
        and v.min() >= 0
        and v.max() <= 1
        and len(errors)
        and errors.min() < 0.1
        and errors.max() > 4 * errors.min()
    ):
        return _Scale("error", float(errors.min()))
    if mode == "min" and v.min() > 0 and v.max() > 8 * v.min():
        return _Scale("log")
    return _Scale("linear")


def _axis_label(metric: str, scale: _Scale) -> str:
    return one_line(metric) + {"error": "  (log of 1 − value)", "log": "  (log)", "linear": ""}[scale.kind]


def _limits(axis: Axes, scale: _Scale, values: Sequence[float], robust: bool = False, horizontal: bool = False) -> None:
    """Set the scale of an axis, and its limits a little beyond the values; without far outliers when ``robust``."""
    there, back = _transform(scale)
    placed = there(np.array(values))
    low, high = float(placed.min()), float(placed.max())
    if robust:
        q1, q3 = np.quantile(placed, [0.25, 0.75])
        kept = placed[np.abs(placed - np.clip(placed, q1, q3)) <= 3 * (q3 - q1)]
        low, high = float(kept.min()), float(kept.max())
    pad = 0.06 * (high - low) or max(abs(high) * 0.01, 1e-3)
    first, last = (float(x) for x in back(np.array([low - pad, high + pad])))
    target = axis.xaxis if horizontal else axis.yaxis
    set_scale = axis.set_xscale if horizontal else axis.set_yscale
    set_limits = axis.set_xlim if horizontal else axis.set_ylim
    if scale.kind == "error":
        set_scale("function", functions=(there, back))
        set_limits(first, last)
        target.set_major_locator(FixedLocator(_error_ticks(first, last, scale.least, count=4 if horizontal else 7)))
        target.set_minor_locator(NullLocator())
        target.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.6g}"))
    elif scale.kind == "log":
        set_scale("log")
        set_limits(first, last)
        target.set_major_locator(LogLocator(subs=(1, 2, 5) if last < 100 * first else (1,)))
        target.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.6g}"))
        target.set_minor_formatter(NullFormatter())
    else:
        set_limits(first, last)
        target.set_major_locator(MaxNLocator(4 if horizontal else 6, steps=[1, 2, 5, 10]))
        target.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.6g}".replace("-", "−")))


def _transform(scale: _Scale) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]:
    if scale.kind == "error":
        # Logarithmic up to the best score that is not perfect, straight from there through 1 and on to the margin.
        end, slope = -math.log10(scale.least), math.log10(2) / scale.least

        def there(y: np.ndarray) -> np.ndarray:
            error = 1 - np.asarray(y, dtype=float)
            return np.where(
                error >= scale.least, -np.log10(np.maximum(error, scale.least)), end + (scale.least - error) * slope
            )

        def back(z: np.ndarray) -> np.ndarray:
            z = np.asarray(z, dtype=float)
            return np.where(z <= end, 1 - 10.0 ** -np.minimum(z, end), 1 - scale.least + (z - end) / slope)

        return there, back
    if scale.kind == "log":
        return np.log10, lambda z: 10.0 ** np.asarray(z)
    return (lambda y: y), (lambda z: z)


def _error_ticks(low: float, high: float, least: float, count: int) -> list[float]:
    """Round values between the limits, about evenly far apart on the error scale."""
    nice = [0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999]
    inside = [t for t in nice if low <= t <= high]
    if len(inside) < 3:
        inside = [float(t) for t in MaxNLocator(count).tick_values(low, high) if low <= t <= high]
    return [t for t in inside if 1 - t > 0.9 * least] + ([1.0] if high >= 1 else [])
