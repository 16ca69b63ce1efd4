"""Small SVG charts that take their colours from the page's style sheet.

Series differ by colour, dash and marker at once, so that they stay apart in grey and for colour-blind readers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from srm_model.reports.markup import Markup, element, join

WIDTH, HEIGHT = 320, 220
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 40
SCATTER_HEIGHT = 260
DASHES = (None, "6 3", "2 3", "8 3 2 3")


@dataclass(frozen=True)
class Series:
    """A line, over epochs or anything else; `look` picks colour (class s0, s1, …), dash and marker."""

    name: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    look: int


@dataclass(frozen=True)
class Fall:
    """A row of the fall chart: clean and attacked value, each with a 95 % interval or None."""

    name: str
    clean: float
    attacked: float
    clean_interval: tuple[float, float] | None
    attacked_interval: tuple[float, float] | None
    look: int


class Frame:
    """Axes of one panel: data limits, pixel mapping, grid, tick labels."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], *, height: float = HEIGHT, left: float = LEFT
    ) -> None:
        self.x_limits, self.y_limits, self.height, self.left = x, y, height, left

    def px(self, x: float) -> float:
        low, high = self.x_limits
        return self.left + (x - low) / (high - low) * (WIDTH - self.left - RIGHT)

    def py(self, y: float) -> float:
        low, high = self.y_limits
        return self.height - BOTTOM - (y - low) / (high - low) * (self.height - TOP - BOTTOM)

    def axes(
        self, x_label: str, y_label: str, x_ticks: Sequence[float] = (), y_ticks: Sequence[float] = ()
    ) -> Markup:
        bottom, right = self.height - BOTTOM, WIDTH - RIGHT
        parts = []
        for tick in y_ticks or ticks(*self.y_limits):
            y = self.py(tick)
            parts.append(element("line", class_="grid", x1=LEFT, x2=right, y1=_n(y), y2=_n(y)))
            parts.append(element("text", tick_label(tick), class_="end", x=LEFT - 6, y=_n(y + 4)))
        for tick in x_ticks or ticks(*self.x_limits):
            x = self.px(tick)
            parts.append(element("line", class_="axis", x1=_n(x), x2=_n(x), y1=bottom, y2=bottom + 4))
            parts.append(element("text", tick_label(tick), class_="mid", x=_n(x), y=bottom + 17))
        parts.append(element("line", class_="axis", x1=LEFT, x2=right, y1=bottom, y2=bottom))
        middle = (LEFT + right) / 2
        parts.append(element("text", x_label, class_="mid label", x=_n(middle), y=self.height - 5))
        centre = _n((TOP + bottom) / 2)
        parts.append(
            element(
                "text", y_label, class_="mid label", transform=f"translate(11 {centre}) rotate(-90)", x=0, y=0
            )
        )
        return join(parts)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    note: str | None = None,
    x_label: str,
    y_label: str,
    y_limits: tuple[float, float] | None = None,
) -> Markup:
    """Lines with markers over whole-numbered epochs, with a legend; missing values leave a gap."""
    xs = [x for line in series for x in line.x]
    ys = [y for line in series for y in line.y if math.isfinite(y)]
    first, last = min(xs), max(xs)
    span = (first, last) if last > first else (first - 0.5, last + 0.5)
    frame = Frame(span, y_limits or padded(min([0.0, *ys]), max([0.0, *ys])))
    step = max(1, math.ceil((last - first) / 8))
    x_ticks = [float(x) for x in range(math.ceil(first), math.floor(last) + 1, step)]
    drawn = []
    for line in series:
        points = [
            (frame.px(x), frame.py(y)) if math.isfinite(y) else None
            for x, y in zip(line.x, line.y, strict=True)
        ]
        drawn.append(_polyline(points, line.look))
        if len(points) <= 40:
            drawn += [marker(line.look, *point) for point in points if point]
    text = "; ".join(f"{line.name}: {_ends(line.y)}" for line in series)
    return figure(
        title,
        _svg(join(frame.axes(x_label, y_label, x_ticks), drawn), f"{title}. {text}"),
        note=note,
        legend=[(line.name, line.look) for line in series] if len(series) > 1 else [],
    )


def curve_chart(
    series: Sequence[Series],
    *,
    title: str,
    note: str | None = None,
    x_label: str,
    y_label: str,
    y_limits: tuple[float, float] | None = None,
) -> Markup:
    """Lines without markers over real numbers, with a legend; missing values leave a gap."""
    xs = [float(x) for line in series for x in line.x]
    ys = [float(y) for line in series for y in line.y if math.isfinite(y)] or [0.0]
    span = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 0.5, min(xs) + 0.5)
    frame = Frame(span, y_limits or padded(min(ys), max(ys)))
    drawn = [
        _polyline(
            [
                (frame.px(x), frame.py(y)) if math.isfinite(y) else None
                for x, y in zip(line.x, line.y, strict=True)
            ],
            line.look,
        )
        for line in series
    ]
    text = "; ".join(f"{line.name}: {_ends(line.y)}" for line in series)
    return figure(
        title,
        _svg(join(frame.axes(x_label, y_label), drawn), f"{title}. {text}"),
        note=note,
        legend=[(line.name, line.look) for line in series] if len(series) > 1 else [],
    )


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
    """Points inside the limits as dots, those beyond as arrow heads on the edge, and `curve` as a line."""
    frame = Frame(x_limits, y_limits, height=SCATTER_HEIGHT)
    finite = np.isfinite(x) & np.isfinite(y)
    low, high = x_limits
    inside = finite & (x >= low) & (x <= high)
    radius = 2.6 if len(x) <= 300 else 1.6
    dots = "".join(
        f"M{_n(frame.px(a))} {_n(frame.py(b))}h0" for a, b in zip(x[inside], y[inside], strict=True)
    )
    arrows = "".join(
        f"M{_n(edge)} {_n(frame.py(b) - 4)}v8l{7 * side} -4z"
        for side, beyond, edge in (
            (-1, finite & (x < low), frame.px(low) + 7),
            (1, finite & (x > high), frame.px(high) - 7),
        )
        for b in y[beyond]
    )
    line = None
    if curve is not None:
        grid = np.linspace(low, high, 61)
        mapped = curve(grid)
        points = [
            (frame.px(a), frame.py(b)) if y_limits[0] <= b <= y_limits[1] else None
            for a, b in zip(grid, mapped, strict=True)
        ]
        line = element("path", class_="curve", d=_path(points))
    body = join(
        frame.axes(x_label, y_label),
        element("path", class_=f"dots s{look}", d=dots, stroke_width=_n(2 * radius)) if dots else None,
        element("path", class_=f"beyond s{look}", d=arrows) if arrows else None,
        line,
    )
    return figure(title, _svg(body, alt, height=SCATTER_HEIGHT), note=note)


def fall_chart(
    groups: Sequence[tuple[str, Sequence[Fall]]], *, title: str, note: str, x_label: str
) -> Markup:
    """For each group a row per model: filled marker clean, hollow marker attacked, 95 % intervals as bars."""
    row, head = 24, 24
    height = TOP + BOTTOM + sum(head + row * len(falls) for _, falls in groups)
    values = [
        value
        for _, falls in groups
        for fall in falls
        for value in (
            fall.clean,
            fall.attacked,
            *(fall.clean_interval or ()),
            *(fall.attacked_interval or ()),
        )
        if math.isfinite(value)
    ]
    lowest = max(-1.0, math.floor(5 * min([0.0, *values])) / 5)
    frame = Frame((lowest, 1.0), (0, 1), height=height, left=64)  # room for the longest name, quadratic
    parts: list[Markup] = []
    for tick in ticks(*frame.x_limits):
        x = frame.px(tick)
        parts.append(
            element(
                "line", class_="zero" if tick == 0 else "grid", x1=_n(x), x2=_n(x), y1=TOP, y2=height - BOTTOM
            )
        )
        parts.append(element("text", tick_label(tick), class_="mid", x=_n(x), y=height - BOTTOM + 16))
    y = float(TOP)
    said = []
    for name, falls in groups:
        parts.append(element("text", name, class_="group", x=2, y=_n(y + 16)))
        y += head
        for fall in falls:
            parts.append(
                element("text", fall.name, class_="end", x=_n(frame.left - 6), y=_n(y + row / 2 + 4))
            )
            parts.append(_fall_row(frame, fall, y + row / 2))
            said.append(f"{name}, {fall.name}: clean {fall.clean:.2f}, attacked {fall.attacked:.2f}")
            y += row
    middle = (frame.left + WIDTH - RIGHT) / 2
    parts.append(element("text", x_label, class_="mid label", x=_n(middle), y=height - 5))
    return figure(title, _svg(join(parts), f"{title}. {'; '.join(said)}.", height=height), note=note)


def sparkline(values: Sequence[float]) -> Markup:
    """A word-sized line of a quantity over the epochs, scaled to its own range; decoration beside numbers."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return Markup("")
    low, span = min(finite), max(finite) - min(finite)
    width, height = 80, 18

    def point(i: int, value: float) -> tuple[float, float] | None:
        share = (value - low) / span if span else 0.5
        x = 2 + i * (width - 4) / (len(values) - 1)
        return (x, height - 3 - share * (height - 6)) if math.isfinite(value) else None

    points = [point(i, value) for i, value in enumerate(values)]
    return element(
        "svg",
        element("path", class_="spark", d=_path(points)),
        class_="sparkline",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        aria_hidden="true",
    )


def figure(
    title: str, body: Markup, *, note: str | None = None, legend: Sequence[tuple[str, int]] = ()
) -> Markup:
    """A chart under its title, an optional note and an optional legend."""
    small = element("small", note) if note else None
    entries = [element("li", swatch(look), name) for name, look in legend]
    keys = element("ul", entries, class_="legend") if entries else None
    return element("figure", element("figcaption", title, small), keys, body, class_="chart")


def swatch(look: int) -> Markup:
    """The line and marker of a series, for legends and tables."""
    return element(
        "svg",
        element("path", class_=f"line s{look}", d="M1 6h22", stroke_dasharray=DASHES[look % 4]),
        marker(look, 12, 6),
        class_="swatch",
        viewBox="0 0 24 12",
        width=24,
        height=12,
        aria_hidden="true",
    )


def marker(look: int, x: float, y: float, *, hollow: bool = False) -> Markup:
    class_ = f"{'hollow' if hollow else 'mark'} s{look}"
    shape = look % 4
    if shape == 0:
        return element("circle", class_=class_, cx=_n(x), cy=_n(y), r=3.4)
    outlines = {1: "m-3 -3h6v6h-6z", 2: "m0 -4l4 7h-8z", 3: "m0 -4.4l4 4.4l-4 4.4l-4 -4.4z"}
    return element("path", class_=class_, d=f"M{_n(x)} {_n(y)}{outlines[shape]}")


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers inside [low, high]."""
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_label(value: float) -> str:
    return f"{value:.6g}".replace("-", "−")


def padded(low: float, high: float) -> tuple[float, float]:
    """Limits a little wider than the data, and never empty."""
    span = (high - low) or abs(high) or 1.0
    return (low if low == 0 else low - 0.05 * span), high + 0.05 * span


def _fall_row(frame: Frame, fall: Fall, y: float) -> Markup:
    parts = []
    if math.isfinite(fall.clean) and math.isfinite(fall.attacked):
        xs = sorted((frame.px(fall.clean), frame.px(fall.attacked)))
        parts.append(element("path", class_=f"link s{fall.look}", d=f"M{_n(xs[0])} {_n(y)}H{_n(xs[1])}"))
    for value, interval, hollow in (
        (fall.clean, fall.clean_interval, False),
        (fall.attacked, fall.attacked_interval, True),
    ):
        if interval is not None:
            low, high = (frame.px(end) for end in interval)
            d = f"M{_n(low)} {_n(y - 4)}v8m0 -4H{_n(high)}m0 -4v8"
            parts.append(element("path", class_=f"whisker s{fall.look}", d=d))
        if math.isfinite(value):
            parts.append(marker(fall.look, frame.px(value), y, hollow=hollow))
    return join(parts)


def _svg(body: Markup, alt: str, *, height: float = HEIGHT) -> Markup:
    return element("svg", body, viewBox=f"0 0 {WIDTH} {_n(height)}", role="img", aria_label=alt)


def _polyline(points: Sequence[tuple[float, float] | None], look: int) -> Markup:
    return element("path", class_=f"line s{look}", d=_path(points), stroke_dasharray=DASHES[look % 4])


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    written, drawing = [], False
    for point in points:
        if point is not None:
            written.append(f"{'L' if drawing else 'M'}{_n(point[0])} {_n(point[1])}")
        drawing = point is not None
    return "".join(written)


def _ends(values: Sequence[float] | np.ndarray) -> str:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "no values"
    return f"{finite[0]:.3g} at first, {finite[-1]:.3g} at last"


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
