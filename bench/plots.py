"""Pictures of results as self-contained SVG: logarithmic axes with units, readable in grey.

Series differ by shade, dash and marker at once, and bars by shade and hatching, so that no colour has to be told.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from srm_model.profiling.tables import number
from srm_model.reports.charts import DASHES, marker
from srm_model.reports.markup import Markup, element, join

WIDTH, HEIGHT = 760, 420
MOST_TICKS = 8
LEFT, RIGHT, TOP, BOTTOM = 84, 230, 56, 58
FAMILY = "system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
SUPERSCRIPTS: dict[float, str] = {1: "", 2: "²"}
SHADES = ("#0b3c5d", "#b04a00", "#3f8f6b", "#8a6fb0", "#7a7a7a", "#111111", "#c98f00", "#5b86b5")
STYLE = f"""
text {{ font: 12.5px {FAMILY}; fill: #1b1f24; }}
.title {{ font-size: 15px; font-weight: 600; }} .note {{ font-size: 12px; fill: #4c555e; }}
.mid {{ text-anchor: middle; }} .end {{ text-anchor: end; }}
.page {{ fill: #fff; }} .grid {{ stroke: #dcdfe2; }} .axis {{ stroke: #4c555e; }}
.line, .guide {{ fill: none; stroke-width: 2; }} .guide {{ stroke: #8b949c; stroke-width: 1.2; }}
.hollow {{ fill: #fff; stroke-width: 2; }} .roof {{ fill: none; stroke: #1b1f24; stroke-width: 2.4; }}
.bar {{ stroke: #1b1f24; stroke-width: .8; }} .border {{ fill: none; stroke: #1b1f24; stroke-width: 3; }}
""" + "".join(
    f".line.s{i}, .hollow.s{i} {{ stroke: {shade}; }} .mark.s{i} {{ fill: {shade}; }}\n"
    for i, shade in enumerate(SHADES)
)


class Line(NamedTuple):
    """A series; points need not be sorted. A name may have several lines."""

    name: str
    points: Sequence[tuple[float, float]]


class Bar(NamedTuple):
    """A stack of segments, in the order of the chart's segment names."""

    name: str
    parts: dict[str, float]


class Axis:
    """A logarithmic axis between two pixels."""

    def __init__(self, values: Sequence[float], first: float, last: float, *, base: int) -> None:
        low, high = min(values), max(values)
        self.base = base
        room = (high / low) ** 0.06 if high > low else base**0.5
        self.low, self.high = math.log(low / room), math.log(high * room)
        self.first, self.last = first, last

    def __call__(self, value: float) -> float:
        return self.first + (math.log(value) - self.low) / (self.high - self.low) * (self.last - self.first)

    def ticks(self) -> list[float]:
        """Powers of the base, with more between powers of ten where there would be few, or every other power."""
        step = math.log(self.base)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        powers = list(range(first, last + 1))
        if self.base == 10 and len(powers) < 3:
            for between in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
                found = [m * 10.0**p for p in range(first - 1, last + 1) for m in between]
                found = [v for v in found if self.low <= math.log(v) <= self.high]
                if len(found) > 1:
                    break
            return found
        every = max(1, math.ceil(len(powers) / MOST_TICKS))
        return [float(self.base) ** p for p in powers[::every]]


def lines(
    series: Sequence[Line],
    *,
    title: str,
    note: str,
    x_label: str,
    y_label: str,
    slopes: Sequence[float] = (),
) -> str:
    """Lines with markers on two logarithmic axes; `slopes` draws faint guides of these exponents."""
    xs = [x for line in series for x, _ in line.points]
    ys = [y for line in series for _, y in line.points]
    if not xs:
        raise ValueError(f"{title}: nothing to draw")
    x, y = Axis(xs, LEFT, WIDTH - RIGHT, base=2), Axis(ys, HEIGHT - BOTTOM, TOP, base=10)
    drawn: list[Markup] = [_axes(x, y, x_label, y_label, sorted(set(xs)))]
    for slope in slopes:
        drawn.append(_guide(x, y, slope))
    placed = [[(x(a), y(b)) for a, b in sorted(line.points)] for line in series]
    return _page(title, note, join(drawn, _drawn(series, placed)))


def roofline(series: Sequence[Line], bandwidth: float, rate: float, *, title: str, note: str) -> str:
    """Lines of (MACs a byte, MACs a second), in the order of their points, under the measured ceilings."""
    ridge = rate / bandwidth
    xs = [*(x for line in series for x, _ in line.points), ridge]
    span = (min(xs) / 2, max(xs) * 2)
    ys = [*(y for line in series for _, y in line.points), rate, span[0] * bandwidth]
    x = Axis([*xs, *span], LEFT, WIDTH - RIGHT, base=10)
    y = Axis([value / 1e9 for value in ys], HEIGHT - BOTTOM, TOP, base=10)
    drawn = [_axes(x, y, "MACs per byte that has to move", "GMAC per second")]
    points = [(span[0], span[0] * bandwidth), (ridge, rate), (span[1], rate)]
    roof = "L".join(f"{x(a):.1f} {y(b / 1e9):.1f}" for a, b in points)
    drawn.append(element("path", class_="roof", d=f"M{roof}"))
    placed = [[(x(a), y(b / 1e9)) for a, b in line.points] for line in series]
    return _page(title, note, join(drawn, _drawn(series, placed)))


def stacked(bars: Sequence[Bar], segments: Sequence[str], *, title: str, note: str, x_label: str) -> str:
    """Horizontal stacks on a linear axis: shares are compared, not growth.

    A segment looks alike in every picture that is given the same `segments`; those that no bar has are left out.
    """
    row = 34
    left = 190
    height = TOP + BOTTOM + row * len(bars) + 22
    most = max(sum(bar.parts.values()) for bar in bars)
    width = WIDTH - RIGHT - left

    def px(value: float) -> float:
        return left + value / most * width

    bottom = height - BOTTOM
    drawn: list[Markup] = [_patterns(len(segments))]
    step = _round(most / 5)
    for count in range(int(most / step + 1e-9) + 1):
        at = px(count * step)
        drawn.append(element("line", class_="grid", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=TOP, y2=bottom))
        drawn.append(element("text", _plain(count * step), class_="mid", x=f"{at:.1f}", y=bottom + 18))
    for index, bar in enumerate(bars):
        y, reached = TOP + 8 + row * index, 0.0
        drawn.append(element("text", bar.name, class_="end", x=left - 8, y=y + 16))
        for look, segment in enumerate(segments):
            value = bar.parts.get(segment, 0.0)
            if value > 0:
                start, reached = px(reached), reached + value
                x, width_ = f"{start:.1f}", f"{px(reached) - start:.1f}"
                drawn.append(
                    element("rect", class_="bar", fill=f"url(#p{look})", x=x, y=y, width=width_, height=22)
                )
        drawn.append(element("text", number(reached), x=f"{px(reached) + 6:.1f}", y=y + 16))
    drawn.append(element("text", x_label, class_="mid", x=f"{left + width / 2:.1f}", y=height - 16))
    used = [segment for segment in segments if any(bar.parts.get(segment) for bar in bars)]
    for place, segment in enumerate(used):
        at, fill = TOP + 8 + 22 * place, f"url(#p{segments.index(segment)})"
        drawn.append(element("rect", class_="bar", fill=fill, x=WIDTH - 130, y=at, width=22, height=14))
        drawn.append(element("text", segment, x=WIDTH - 102, y=at + 12))
    return _page(title, note, join(drawn), height=max(height, TOP + 22 * len(used) + 40))


def surface(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    note: str,
    row_label: str,
    column_label: str,
) -> str:
    """Ratios as a grid, lighter below 1 and darker above, the number in every cell; a thick line where it is 1."""
    wide, tall, left = 88, 36, 130
    top = TOP + 42
    height = top + tall * len(rows) + 30
    known = [abs(math.log(v)) for line in values for v in line if v]
    most = max([*known, math.log(2)])
    drawn: list[Markup] = []
    for j, name in enumerate(columns):
        drawn.append(element("text", name, class_="mid", x=left + wide * (j + 0.5), y=top - 8))
    drawn.append(element("text", column_label, class_="mid", x=left + wide * len(columns) / 2, y=top - 26))
    drawn.append(
        element(
            "text",
            row_label,
            class_="mid",
            transform=f"translate(58 {top + tall * len(rows) / 2}) rotate(-90)",
            x=0,
            y=0,
        )
    )
    for i, name in enumerate(rows):
        drawn.append(element("text", name, class_="end", x=left - 10, y=top + tall * i + 23))
        for j, value in enumerate(values[i]):
            share = 0.5 if not value else 0.5 + 0.5 * math.log(value) / most
            grey = round(250 - 115 * share)
            x, y = left + wide * j, top + tall * i
            fill = f"rgb({grey},{grey},{grey})" if value else "#fff"
            drawn.append(
                element("rect", x=x, y=y, width=wide, height=tall, fill=fill, stroke="#fff", stroke_width=1)
            )
            text = "–" if value is None else number(value, 2)
            drawn.append(element("text", text, class_="mid", x=x + wide / 2, y=y + 23))
    border = _border(values, left, top, wide, tall)
    return _page(title, note, join(drawn, border), height=height)


def _border(
    values: Sequence[Sequence[float | None]], left: int, top: int, wide: int, tall: int
) -> Markup | None:
    """Edges between cells below 1 and cells of 1 or more."""
    path = ""
    for i, line in enumerate(values):
        for j, value in enumerate(line):
            for di, dj in ((1, 0), (0, 1)):
                if i + di >= len(values) or j + dj >= len(line):
                    continue
                other = values[i + di][j + dj]
                if value is None or other is None or (value < 1) == (other < 1):
                    continue
                x, y = left + wide * (j + dj), top + tall * (i + di)
                path += f"M{x} {y}h{wide}" if di else f"M{x} {y}v{tall}"
    return element("path", class_="border", d=path) if path else None


def _guide(x: Axis, y: Axis, slope: float) -> Markup:
    """A line of this exponent through the lower left, as far as it stays inside, with its name at the end."""
    start = y.low + 0.04 * (y.high - y.low)
    end_x = x.high if slope <= 0 else min(x.high, x.low + (y.high - start) / slope)
    end_y = start + slope * (end_x - x.low)
    a, b = (x.first, y(math.exp(start))), (x(math.exp(end_x)), y(math.exp(end_y)))
    path = element("path", class_="guide", d=f"M{a[0]:.1f} {a[1]:.1f}L{b[0]:.1f} {b[1]:.1f}")
    text = f"∝ x{SUPERSCRIPTS.get(slope, f'^{slope:g}')}"
    if end_x < x.high:  # it leaves through the top
        name = element("text", text, class_="note end", x=f"{b[0] - 20:.1f}", y=f"{b[1] + 14:.1f}")
    else:
        name = element("text", text, class_="note", x=f"{b[0] + 4:.1f}", y=f"{b[1] + 4:.1f}")
    return join(path, name)


def _drawn(series: Sequence[Line], placed: Sequence[Sequence[tuple[float, float]]]) -> Markup:
    """Series at their pixels, and the legend to the right."""
    drawn: list[Markup] = []
    at = TOP + 12
    for index, (line, points) in enumerate(zip(series, placed, strict=True)):
        look = index % len(SHADES)
        path = "".join(f"{'L' if i else 'M'}{a:.1f} {b:.1f}" for i, (a, b) in enumerate(points))
        hollow = index >= 4  # markers repeat after four
        dash = DASHES[(index + index // 4) % 4]
        drawn.append(element("path", class_=f"line s{look}", d=path, stroke_dasharray=dash))
        drawn += [marker(look, a, b, hollow=hollow) for a, b in points]
        swatch = f"M{WIDTH - RIGHT + 40} {at}h34"
        drawn.append(element("path", class_=f"line s{look}", d=swatch, stroke_dasharray=dash))
        drawn.append(marker(look, WIDTH - RIGHT + 57, at, hollow=hollow))
        for name in line.name.split("\n"):
            drawn.append(element("text", name, x=WIDTH - RIGHT + 82, y=at + 4))
            at += 18
        at += 6
    return join(drawn)


def _axes(x: Axis, y: Axis, x_label: str, y_label: str, x_ticks: Sequence[float] = ()) -> Markup:
    """Frame, grid and labels; `x_ticks` are what was measured, where those are few."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    drawn: list[Markup] = []
    for tick in y.ticks():
        at = f"{y(tick):.1f}"
        drawn.append(element("line", class_="grid", x1=LEFT, x2=right, y1=at, y2=at))
        drawn.append(element("text", _plain(tick), class_="end", x=LEFT - 8, y=f"{y(tick) + 4:.1f}"))
    for tick in x_ticks if 0 < len(x_ticks) <= MOST_TICKS else x.ticks():
        at = f"{x(tick):.1f}"
        drawn.append(element("line", class_="grid", x1=at, x2=at, y1=TOP, y2=bottom))
        drawn.append(element("text", _plain(tick), class_="mid", x=at, y=bottom + 19))
    drawn.append(element("path", class_="axis", fill="none", d=f"M{LEFT} {TOP}V{bottom}H{right}"))
    drawn.append(element("text", x_label, class_="mid", x=(LEFT + right) / 2, y=bottom + 42))
    centre = f"translate(20 {(TOP + bottom) / 2}) rotate(-90)"
    drawn.append(element("text", y_label, class_="mid", transform=centre, x=0, y=0))
    return join(drawn)


def _patterns(count: int) -> Markup:
    """Fills that differ by shade and by hatching."""
    slash, back = "M-1 1l2-2M0 8l8-8M7 9l2-2", "M-1 7l2 2M0 0l8 8M7-1l2 2"
    hatches = ("", slash, "M0 4h8", "M4 0v8", back, "M0 4h8M4 0v8", "M1 2h2M5 6h2", slash + back)
    greys = (
        "#f4f4f2",
        "#cfd3d6",
        "#e2d6c8",
        "#9fa9b1",
        "#d9e2d5",
        "#b9a98f",
        "#eeeeee",
        "#8f8f8f",
        "#dcd3e6",
    )
    made = []
    for look in range(count):
        hatch = hatches[look % len(hatches)]
        ground = element("rect", width=8, height=8, fill=greys[look % len(greys)])
        strokes = element("path", d=hatch, stroke="#3a4249", stroke_width=1, fill="none") if hatch else None
        made.append(
            element(
                "pattern", ground, strokes, id=f"p{look}", width=8, height=8, patternUnits="userSpaceOnUse"
            )
        )
    return element("defs", made)


def _page(title: str, note: str, body: Markup, *, height: float = HEIGHT) -> str:
    height = round(height)
    return (
        str(
            element(
                "svg",
                element("title", f"{title}. {note}"),
                element("style", Markup(STYLE)),
                element("rect", class_="page", width=WIDTH, height=height),
                element("text", title, class_="title", x=16, y=24),
                element("text", note, class_="note", x=16, y=43),
                body,
                xmlns="http://www.w3.org/2000/svg",
                viewBox=f"0 0 {WIDTH} {height}",
                role="img",
            )
        )
        + "\n"
    )


def _plain(value: float) -> str:
    """A tick as people write it: 0.05, 4,096, 2·10⁶."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return (
            f"{value:,.10g}" if abs(value) >= 100 or value == round(value) else f"{float(f'{value:.3g}'):g}"
        )
    power = math.floor(math.log10(abs(value)) + 1e-9)
    digits = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    head = value / 10**power
    return f"10{digits}" if abs(head - 1) < 1e-6 else f"{head:.3g}·10{digits}"


def _round(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= value)
