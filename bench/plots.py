"""Draw results, mostly on logarithmic axes with units.

The figures are readable without colour: lines differ in dash pattern and marker, and the segments of a bar differ in
shade and hatching.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from srm_model.profiling.tables import number
from srm_model.reports.drawing import STYLE, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MOST_TICKS = 8
GREYS = ("#f4f4f2", "#cfd3d6", "#e2d6c8", "#9fa9b1", "#d9e2d5", "#b9a98f", "#eeeeee", "#8f8f8f", "#dcd3e6")
HATCHES = ("", "//", "--", "||", "\\\\", "++", "..", "xx")


class Line(NamedTuple):
    """A named series of points; the name may contain line breaks.

    `lines` sorts the points. `roofline` keeps their order.
    """

    name: str
    points: Sequence[tuple[float, float]]


class Bar(NamedTuple):
    """A stacked bar; `parts` is a dictionary from the name of each segment to its value."""

    name: str
    parts: dict[str, float]


def lines(
    series: Sequence[Line],
    *,
    title: str,
    note: str,
    x_label: str,
    y_label: str,
    slopes: Sequence[float] = (),
) -> Figure:
    """Draw lines with markers on two logarithmic axes.

    For each exponent p in `slopes` (at most two), a grey dashed line shows the power law y ∝ x^p.
    """
    with _axes(title, note, x_label, y_label) as (figure, axes):
        for i, line in enumerate(series):
            axes.plot(*zip(*sorted(line.points), strict=True), **look(i), label=line.name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
        xs = sorted({x for line in series for x, _ in line.points})
        if len(xs) <= MOST_TICKS:
            axes.set_xticks(xs, [f"{x:,g}" for x in xs])
            axes.minorticks_off()
        x, y = xs[0], axes.get_ylim()[0] * 1.1
        for slope, style in zip(slopes, ((0, (1, 1)), (0, (4, 1))), strict=False):
            power = {1: "", 2: "²"}.get(slope, f"^{slope:g}")
            guide = {"color": "#8b949c", "linestyle": style, "linewidth": 1}
            axes.axline((x, y), (2 * x, y * 2**slope), **guide, label=f"∝ x{power}")
        figure.legend(loc="outside right center")
    return figure


def roofline(series: Sequence[Line], bandwidth: float, rate: float, *, title: str, note: str) -> Figure:
    """Draw a roofline plot, with the roof computed from the measured memory bandwidth and throughput.

    Args:
        series: Lines to draw. Each point of a line is a pair (MACs per byte, MACs per second). The points of a line are
            joined in the given order.
        bandwidth: Measured memory bandwidth in bytes per second.
        rate: Measured throughput of matrix products in MACs per second.
        title: Title.
        note: Text below the title.
    """
    with _axes(title, note, "MACs per byte that must be moved", "GMAC per second") as (figure, axes):
        xs = [rate / bandwidth, *(x for line in series for x, _ in line.points)]
        roof = np.array([min(xs) / 2, rate / bandwidth, max(xs) * 2])
        axes.loglog(roof, np.minimum(roof * bandwidth, rate) / 1e9, color="#1b1f24", linewidth=2.4)
        for i, line in enumerate(series):
            points = np.array(line.points)
            axes.loglog(points[:, 0], points[:, 1] / 1e9, **look(i), label=line.name)
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
        figure.legend(loc="outside right center")
    return figure


def stacked(bars: Sequence[Bar], segments: Sequence[str], *, title: str, note: str, x_label: str) -> Figure:
    """Draw horizontal stacked bars on a linear axis.

    The shade and the hatching of a segment depend only on its position in `segments`. Segments that are 0 in all bars
    are left out.
    """
    height = 1.4 + max(0.35 * len(bars), 0.19 * len(segments))
    with _axes(title, note, x_label, "", height=height) as (figure, axes):
        left = np.zeros(len(bars))
        names = [bar.name for bar in bars]
        looks = zip(itertools.cycle(GREYS), itertools.cycle(HATCHES), segments, strict=False)
        for shade, hatch, segment in looks:
            widths = np.array([bar.parts.get(segment, 0.0) for bar in bars])
            if widths.any():
                style = {"color": shade, "hatch": hatch, "edgecolor": "#3a4249", "label": segment}
                axes.barh(names, widths, 0.65, left, **style)
            left += widths
        for place, total in enumerate(left):
            axes.text(total, place, f" {number(total)}", va="center")
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside right center")
    return figure


def surface(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    note: str,
    row_label: str,
    column_label: str,
) -> Figure:
    """Draw ratios as a grid of numbers.

    The larger the ratio in a cell, the darker is the background of the cell. Thick lines separate the cells with a
    ratio below 1 from the cells with a ratio of 1 or more.
    """
    logs = np.log(np.array(values, dtype=float))
    most = max(float(np.nanmax(np.abs(logs), initial=0)), math.log(2))
    with _axes(title, note, column_label, row_label, height=1.4 + 0.36 * len(rows)) as (figure, axes):
        axes.imshow(logs, cmap="Greys", vmin=-most, vmax=3 * most, aspect="auto")
        for (i, j), value in np.ndenumerate(logs):
            axes.text(j, i, "–" if np.isnan(value) else number(math.exp(value), 2), ha="center", va="center")
            # Edges between cells below 1 and cells of 1 or more.
            for down, right in ((1, 0), (0, 1)):
                if i + down == len(rows) or j + right == len(columns):
                    continue
                other = logs[i + down, j + right]
                if (value < 0) != (other < 0) and not np.isnan(value + other):
                    xs = [j + right - 0.5, j + 0.5]
                    axes.plot(xs, [i + down - 0.5, i + 0.5], color="#1b1f24", linewidth=3)
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.grid(visible=False)
    return figure


def _plain_ticks(axis: Axis) -> None:
    """Label 1, 2, 5, 10, … as plain numbers."""
    from matplotlib.ticker import LogLocator

    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter("{x:,g}")


@contextmanager
def _axes(
    title: str, note: str, x_label: str, y_label: str, *, height: float = 4.2
) -> Iterator[tuple[Figure, Axes]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(7.6, height))
        axes = figure.subplots()
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_title(title, loc="left", weight="bold", pad=18)
        axes.annotate(note, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8)
        yield figure, axes
