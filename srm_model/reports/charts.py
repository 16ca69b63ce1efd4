"""Draw the charts of the HTML pages.

The colours are variables of the pages' style sheet, which has one palette for light screens and one for dark screens.
If a chart has at most four series, they differ not only in colour, but also in dash and, if markers are drawn, in
marker. Readers can therefore distinguish the series without seeing colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from srm_model.reports import drawing
from srm_model.reports.markup import Markup, element

WIDTH, HEIGHT, SCATTER_HEIGHT, ROW = 320, 220, 260, 24  # pixels of the page
# Colours for matplotlib, which `drawing.inline` replaces by the variables of the page's style sheet.
SERIES = tuple(f"#0000a{i}" for i in range(8))
INK, SOFT, GRID, GROUND = "#0000b0", "#0000b1", "#0000b2", "#0000b3"
VARIABLES = {colour: f"--s{i}" for i, colour in enumerate(SERIES)} | {
    INK: "--ink", SOFT: "--soft", GRID: "--grid", GROUND: "--ground",
}  # fmt: skip
DASHES = ("-", (0, (4, 2)), (0, (1.3, 2)), (0, (5, 2, 1.3, 2)))
STYLE = drawing.STYLE | {
    "font.size": 11,
    "figure.dpi": 72,  # a pixel is a point
    "axes.titlesize": 11,
    "axes.spines.left": False,
    "axes.facecolor": "none",
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "ytick.left": False,
    "grid.color": GRID,
    "axes.grid.axis": "y",
    "path.simplify": False,
}


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    `look` is one index that selects the dash, the marker and the colour of the line. The colours 0, 1, … are the CSS
    variables --s0, --s1, … of the page.
    """

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    look: int


@dataclass(frozen=True)
class Fall:
    """A row of `fall_chart`: a model's metric on clean images and on attacked images.

    The 95 % interval of a value is None if no interval was computed.
    """

    name: str
    clean: float
    attacked: float
    clean_interval: tuple[float, float] | None
    attacked_interval: tuple[float, float] | None
    look: int


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    note: str | None = None,
    x_label: str,
    y_label: str,
    y_limits: tuple[float, float] | None = None,
    epochs: bool = True,
) -> Markup:
    """Draw lines with a legend. A missing value leaves a gap in the line.

    With `epochs`, the x axis has integer ticks, the y axis includes 0 unless `y_limits` is given, and lines of at most
    40 points have markers.
    """
    from matplotlib.ticker import MaxNLocator

    with _axes(HEIGHT, x_label, y_label) as (figure, axes):
        for line in series:
            y = np.where(np.isfinite(line.y), line.y, np.nan)
            marker = _marker(line.look) if epochs and len(line.x) <= 40 else {}
            axes.plot(
                line.x, y, color=_colour(line.look), linestyle=DASHES[line.look % 4], linewidth=2, **marker
            )
        ys = [y for line in series for y in line.y if math.isfinite(y)]
        axes.set_ylim(
            y_limits or padded(*((min([0.0, *ys]), max([0.0, *ys])) if epochs else (min(ys), max(ys))))
        )
        if epochs:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        text = "; ".join(f"{line.name}: {_ends(line.y)}" for line in series)
        legend = [(line.name, line.look) for line in series] if len(series) > 1 else []
        return _framed(title, figure, f"{title}. {text}", note, legend)


def scatter(
    x: np.ndarray,
    y: np.ndarray,
    *,
    look: int,
    title: str,
    note: str,
    alt: str,
    x_limits: tuple[float, float],
    y_limits: tuple[float, float],
    x_label: str,
    y_label: str,
    curve: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Markup:
    """Draw points inside `x_limits` as dots, points outside `x_limits` as arrowheads, and `curve` as a line.

    An arrowhead is on the left or right edge of the chart, at the y coordinate of its point.
    """
    low, high = x_limits
    with _axes(SCATTER_HEIGHT, x_label, y_label) as (figure, axes):
        finite = np.isfinite(x) & np.isfinite(y)
        inside = finite & (x >= low) & (x <= high)
        # Draw dots as lines of length zero with round ends: one path, instead of one element per image.
        ends = [
            np.column_stack([v[inside], v[inside], np.full(inside.sum(), np.nan)]).ravel() for v in (x, y)
        ]
        size = 5.2 if len(x) <= 300 else 3.2
        axes.plot(*ends, color=_colour(look), linewidth=size, solid_capstyle="round", alpha=0.72, gid="dots")
        for beyond, edge, marker in ((finite & (x < low), low, "<"), (finite & (x > high), high, ">")):
            place, style = np.full(beyond.sum(), edge), {"color": _colour(look), "markersize": 6}
            axes.plot(place, y[beyond], marker, clip_on=False, **style)
        if curve is not None:
            grid = np.linspace(low, high, 61)
            axes.plot(grid, curve(grid), color=INK, linestyle="--", linewidth=1.5)
        axes.set(xlim=x_limits, ylim=y_limits)
        return _framed(title, figure, alt, note)


def fall_chart(
    groups: Sequence[tuple[str, Sequence[Fall]]], *, title: str, note: str, x_label: str
) -> Markup:
    """Draw a row for each model of each group.

    Filled markers show clean values, hollow markers show attacked values, and thin bars show 95 % intervals. A broad
    pale line connects the two values of a row.
    """
    rows: list[tuple[str, Fall | None]] = []
    for name, falls in groups:
        rows += [(name, None), *((fall.name, fall) for fall in falls)]
    with _axes(44 + ROW * len(rows), x_label, "") as (figure, axes):
        for place, (_, fall) in enumerate(rows):
            if fall is None:
                continue
            colour = _colour(fall.look)
            axes.plot([fall.clean, fall.attacked], [place] * 2, color=colour, linewidth=5, alpha=0.22)
            for value, interval, filled in (
                (fall.clean, fall.clean_interval, True),
                (fall.attacked, fall.attacked_interval, False),
            ):
                if interval is not None:
                    axes.plot(interval, [place] * 2, color=colour, linewidth=1.2, marker="|", markersize=8)
                face = {} if filled else {"markerfacecolor": GROUND, "markeredgewidth": 1.8}
                axes.plot([value], [place], color=colour, **_marker(fall.look) | face)
        values = [v for _, fall in rows if fall for v in _values(fall) if math.isfinite(v)]
        axes.set_xlim(max(-1.0, math.floor(5 * min([0.0, *values])) / 5), 1.02)
        axes.axvline(0, color=SOFT, linewidth=1)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        for label, (_, fall) in zip(axes.get_yticklabels(), rows, strict=True):
            if fall is None:
                label.set(color=INK, weight="bold")
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x")
        said = "; ".join(
            f"{name}, {fall.name}: clean {fall.clean:.2f}, attacked {fall.attacked:.2f}"
            for name, falls in groups
            for fall in falls
        )
        return _framed(title, figure, f"{title}. {said}.", note)


def swatch(look: int) -> Markup:
    """Return the marker of a series in its colour, for legends and tables."""
    return element("span", class_=f"swatch s{look}")


def padded(low: float, high: float) -> tuple[float, float]:
    """Return axis limits slightly beyond `low` and `high`.

    If `low` is 0, the lower limit is also 0. The two limits differ even if `low` equals `high`.
    """
    span = (high - low) or abs(high) or 1.0
    return (low if low == 0 else low - 0.05 * span), high + 0.05 * span


@contextmanager
def _axes(height: float, x_label: str, y_label: str) -> Iterator[tuple[Any, Any]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH / 72, height / 72), facecolor="none")
        axes = figure.subplots()
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.margins(x=0.02)
        yield figure, axes


def _framed(
    title: str, figure: Any, alt: str, note: str | None, legend: Sequence[tuple[str, int]] = ()
) -> Markup:
    small = element("small", note) if note else None
    entries = [element("li", swatch(look), name) for name, look in legend]
    keys = element("ul", entries, class_="legend") if entries else None
    body = drawing.inline(figure, alt, STYLE, VARIABLES)
    return element("figure", element("figcaption", title, small), keys, body, class_="chart")


def _colour(look: int) -> str:
    return SERIES[look % len(SERIES)]


def _marker(look: int) -> dict[str, Any]:
    return {"marker": drawing.MARKERS[look % 4], "markersize": 6}


def _values(fall: Fall) -> tuple[float, ...]:
    return fall.clean, fall.attacked, *(fall.clean_interval or ()), *(fall.attacked_interval or ())


def _ends(values: Sequence[float] | np.ndarray) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "no values"
    return f"first {finite[0]:.3g}, last {finite[-1]:.3g}"
