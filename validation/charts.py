"""The page's charts as inline SVG, with text as text and reproducible bytes.

A chart is drawn in placeholder colours, which CSS variables then replace, so that it is readable in
light mode, in dark mode and on paper. Figures are small, so that their text is readable at the
width of a phone; the page puts two side by side if there is room.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import require
from .layers import LayerError
from .report import MEASURES
from .retrieval import RetrievalRow

SIZE = (4.6, 3.1)  # inches
POINTS = 1500
# Differences below this come from the arithmetic of the measure itself.
FLOOR = 1e-16
BINS = 24
MOST_TICKS = 7

INK, QUIET, GRID, LIMIT = "#000001", "#000002", "#000003", "#000004"
SERIES = ("#000005", "#000006", "#000007")
MARKERS = "osD"
VARIABLES = {
    INK: "--ink",
    QUIET: "--quiet",
    GRID: "--grid",
    LIMIT: "--limit",
    **{color: f"--series-{i}" for i, color in enumerate(SERIES)},
}
STYLE = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.minor.visible": False,
    "ytick.minor.visible": False,
}


def histogram(values: np.ndarray, limit: float | None, *, noun: str, measure: str) -> str:
    """A histogram of the inputs' distances from the reference, on a logarithmic axis.

    Args:
        values: Distances, 0 is best. Values that are not finite are left out, values below 1e-16
            are drawn there. At least one is finite.
        limit: The gate's limit, or None.
        noun: Label of the counts, such as "texts".
        measure: Label of the distances, such as "1 − cosine".
    """
    finite = values[np.isfinite(values)]
    logs = np.log10(np.clip(finite, FLOOR, None))
    shown = logs if limit is None or limit <= 0 else np.append(logs, math.log10(limit))
    low, high = _decades(shown)
    bins = max(1, BINS // (high - low)) * (high - low)  # no bin crosses a power of ten
    edges = np.linspace(low, high, bins + 1)
    counts, _ = np.histogram(logs, edges)

    def draw(axes: Any) -> None:
        axes.bar(edges[:-1], counts, np.diff(edges) * 0.9, align="edge", color=SERIES[0])
        _set_ticks(axes.xaxis, low, high)
        axes.set_xlim(low, high)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=False, axis="x")
        axes.set_xlabel(measure)
        axes.set_ylabel(noun)
        if limit is not None and limit > 0:
            position = math.log10(limit)
            axes.axvline(position, color=LIMIT, linestyle=(0, (4, 3)), linewidth=1.5)
            side = "right" if position > (low + high) / 2 else "left"
            axes.set_title("limit", x=(position - low) / (high - low), ha=side, size=10.5, c=LIMIT)

    return _svg(draw, f"Histogram of {measure} over the {noun}")


def scatter(x: np.ndarray, y: np.ndarray, *, score: str) -> str:
    """The artifact's score of each pair against the reference's, and the diagonal.

    Args:
        x: The reference's finite scores; at least one.
        y: As many of the artifact's, in the same order.
        score: Label of the scores, such as "cosine".
    """
    chosen = choose_points(x, y)
    values = np.concatenate([x, y])
    margin = 0.04 * max(float(np.ptp(values)), 1e-6)
    ends = (float(values.min()) - margin, float(values.max()) + margin)

    def draw(axes: Any) -> None:
        axes.plot(ends, ends, color=QUIET, linewidth=1)
        axes.plot(
            x[chosen], y[chosen], "o", color=SERIES[0], markersize=3.2, markeredgewidth=0, alpha=0.6
        )
        axes.set(xlim=ends, ylim=ends, xlabel=f"reference's {score}", ylabel=f"artifact's {score}")
        axes.locator_params(nbins=6)

    return _svg(draw, f"The artifact's {score} against the reference's, with the diagonal")


def choose_points(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Indices of at most 1,500 points to draw: a third farthest off, the rest spread over x."""
    if len(x) <= POINTS:
        return np.arange(len(x))
    farthest = np.argsort(-np.abs(x - y), kind="stable")
    rest = farthest[POINTS // 3 :]
    rest = rest[np.argsort(x[rest], kind="stable")]
    spread = np.linspace(0, len(rest) - 1, POINTS - POINTS // 3).round().astype(int)
    return np.concatenate([farthest[: POINTS // 3], rest[spread]])


def layer_lines(errors: Sequence[LayerError]) -> str | None:
    """The relative error after each layer, on a logarithmic axis.

    Layers with an error of zero or NaN are gaps; returns None if there are only gaps.
    """
    lines = {
        "largest of a token": [error.relative_error_max for error in errors],
        "mean": [error.relative_error_mean for error in errors],
    }
    logs = {name: _logs(values) for name, values in lines.items()}
    finite = np.concatenate([values[np.isfinite(values)] for values in logs.values()])
    if not len(finite):
        return None
    low, high = _decades(finite)

    def draw(axes: Any) -> None:
        layers = [error.layer for error in errors]
        for (name, values), color, marker in zip(logs.items(), SERIES, MARKERS, strict=False):
            axes.plot(layers, values, f"{marker}-", c=color, ms=3.5, lw=1.4, label=name)
        _set_ticks(axes.yaxis, low, high)
        axes.set_ylim(low, high)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=False, axis="x")
        axes.set(xlabel="after layer (0: embedding)", ylabel="relative error")
        _legend(axes, 2)

    return _svg(draw, "Relative error of the hidden states after each layer")


def retrieval_differences(rows: Sequence[RetrievalRow]) -> str:
    """Artifact minus reference, with intervals: by dimension, or by measure for a reranker.

    Args:
        rows: At least one.
    """

    def draw(axes: Any) -> None:
        axes.axhline(0, color=QUIET, linewidth=1)
        for measure, group, x, color, marker in _by_measure(rows):
            y = np.array([row.difference for row in group])
            # abs: rounding can put a mean just outside of its interval.
            reach = np.abs([[row.low for row in group] - y, [row.high for row in group] - y])
            axes.errorbar(
                x, y, reach, fmt=marker, c=color, ms=4.5, lw=1.4, capsize=2.5, label=measure
            )
        axes.set_ylabel("artifact − reference")
        _set_x_axis(axes, rows)

    return _svg(draw, "Difference of retrieval quality, artifact less reference")


def retrieval_values(rows: Sequence[RetrievalRow]) -> str:
    """The artifact's quality as points, the reference's as rings around them.

    Args:
        rows: At least one.
    """

    def draw(axes: Any) -> None:
        for measure, group, x, color, marker in _by_measure(rows):
            axes.plot(x, [row.reference for row in group], marker, c=color, ms=8, mfc="none")
            axes.plot(
                x, [row.artifact for row in group], marker, c=color, ms=4, mew=0, label=measure
            )
        axes.set(ylabel="quality", ylim=(0, 1))
        _set_x_axis(axes, rows)

    return _svg(draw, "Retrieval quality of the artifact and of the reference")


def _by_measure(
    rows: Sequence[RetrievalRow],
) -> Iterator[tuple[str, list[RetrievalRow], list[float], str, str]]:
    """Yield (measure, its rows, their x positions, color, marker)."""
    measures, labels = _measures(rows), _x_labels(rows)
    for i, measure in enumerate(measures):
        group = [row for row in rows if row.measure == measure]
        shift = 0.0 if group[0].dimension is None else 0.22 * (i - (len(measures) - 1) / 2)
        x = [labels.index(_x_label(row)) + shift for row in group]
        yield (
            MEASURES.get(measure, measure),
            group,
            x,
            SERIES[i % len(SERIES)],
            MARKERS[i % len(MARKERS)],
        )


def _measures(rows: Sequence[RetrievalRow]) -> list[str]:
    return list(dict.fromkeys(row.measure for row in rows))


def _x_labels(rows: Sequence[RetrievalRow]) -> list[str]:
    """The labels of the x axis."""
    return list(dict.fromkeys(map(_x_label, rows)))


def _x_label(row: RetrievalRow) -> str:
    return row.measure if row.dimension is None else str(row.dimension)


def _set_x_axis(axes: Any, rows: Sequence[RetrievalRow]) -> None:
    labels = _x_labels(rows)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.grid(visible=False, axis="x")
    if rows[0].dimension is not None:
        axes.set_xlabel("dimensions (MRL)")
        _legend(axes, len(_measures(rows)))


def _logs(values: Sequence[float]) -> np.ndarray:
    """Decimal logarithms, float64; NaN for values that are 0 or not finite."""
    array = np.array(values)
    usable = np.isfinite(array) & (array > 0)
    return np.where(usable, np.log10(np.where(usable, np.clip(array, FLOOR, None), 1)), np.nan)


def _decades(logs: np.ndarray) -> tuple[int, int]:
    """The range of whole decades, at least two, that contains decimal logarithms."""
    high = math.floor(logs.max()) + 1
    return min(math.floor(logs.min()), high - 2), high


def _set_ticks(axis: Any, low: int, high: int) -> None:
    """Label an axis of logarithms with powers of ten, in Unicode instead of TeX."""
    step = -(-(high - low) // (MOST_TICKS - 1))
    powers = [power for power in range(low, high + 1) if power % step == 0]
    axis.set_ticks(powers, [_power(power) for power in powers])


def _power(exponent: int) -> str:
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _legend(axes: Any, columns: int) -> None:
    """Put the legend above the chart, where it hides nothing."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, handletextpad=0.4, borderpad=0.2
    )


def _svg(draw: Any, label: str) -> str:
    """Draw a chart with `draw(axes)` and return it as an `<svg>` element."""
    matplotlib = require("matplotlib", "report")
    figures = require("matplotlib.figure", "report")
    buffer = io.StringIO()
    # Element ids are hashes of salt and shape; charts on one page must not share ids.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}):
        figure = figures.Figure(figsize=SIZE, layout="constrained")
        draw(figure.add_subplot())
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return _for_page(buffer.getvalue(), label)


def _for_page(svg: str, label: str) -> str:
    """Turn a stand-alone SVG file into an element of the page: strip what only files need."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # would apply to the whole page
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    used = set(re.findall(r"#(\w+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    opening = f'<svg class="chart" role="img" aria-label="{html.escape(label)}" {view[0]}>'
    return opening + svg[svg.index(">") + 1 :]
