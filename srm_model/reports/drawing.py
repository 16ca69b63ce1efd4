"""Helpers for all charts: matplotlib's settings, the style of data series, and SVG for files and pages."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from srm_model.reports.markup import Markup, element

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, as on the report's page. There are four dashes and nine markers, and 4 and 9 have no common
# factor. Up to 36 series therefore differ in dash or marker, even without colour.
COLOURS = ("#0072b2", "#c8540a", "#00805f", "#9a4f80", "#5f45a8", "#56b4e9")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "X", "<", "P", "*")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e8e5",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "srm-iqa",
    "figure.constrained_layout.use": True,
}
UNDATED: dict[str, Any] = {"metadata": {"Date": None}}


def look(number: int) -> dict[str, Any]:
    """Return the colour, dash and marker of a series, for `Axes.plot`."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.6,
    }


def svg(figure: Figure, style: dict[Any, Any] = STYLE) -> str:
    """Return a figure as an SVG document. The same figure always gives the same text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(style):
        figure.savefig(buffer, format="svg", **UNDATED)
    return buffer.getvalue()


def inline(figure: Figure, alt: str, style: dict[Any, Any], variables: dict[str, str]) -> Markup:
    """Return a figure as an HTML element.

    Args:
        figure: The figure.
        alt: Alternative text, for readers who cannot see the chart.
        style: matplotlib settings.
        variables: A dict from colours in the figure to the variables of the style sheet that replace these colours.
    """
    text = svg(figure, style)
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="[A-Za-z]\w*_\d+"', "", body)  # several figures of a page would have the same ids
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
    body = re.sub(r"\s*\n\s*", " ", body)
    for colour, variable in variables.items():
        body = body.replace(colour, f"var({variable})")
    width, height = (f"{72 * side:g}" for side in figure.get_size_inches())
    return element("svg", Markup(body), viewBox=f"0 0 {width} {height}", role="img", aria_label=alt)
