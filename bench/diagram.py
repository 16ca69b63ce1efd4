"""Draw the README's picture of the model: `python -m bench.diagram docs/model.svg`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

INK, PALE, ACCENT = "#1f2933", "#eef2f6", "#1664a5"
STAGES = ("stage 1, stride 4", "stage 2, stride 8", "stage 3, stride 16", "stage 4, stride 32")


def box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, *, accent: bool = False
) -> None:
    """Draw a rounded box with a text in its centre; (x, y) is the lower left corner of the box."""
    edge, face = (ACCENT, "#e3eefa") if accent else (INK, PALE)
    style = "round,pad=0.02,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, ec=edge, fc=face, lw=1.2))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=INK, fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], *, accent: bool = False) -> None:
    colour = ACCENT if accent else INK
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.2})


def draw() -> Figure:
    """Return the picture: the input image, the backbone, the neck (links and gate), the head and the score."""
    figure = Figure(figsize=(9.6, 3.7))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 19.2), ylim=(0, 7.4))
    axes.axis("off")
    box(axes, 0.3, 2.6, 1.9, 1.4, "image\nin [0, 1]")
    for number, name in enumerate(STAGES):
        box(axes, 3.4, 5.2 - 1.5 * number, 2.9, 1.0, name)
        if number < 3:
            arrow(axes, (4.85, 5.2 - 1.5 * number), (4.85, 4.75 - 1.5 * number))
    axes.text(4.85, 6.6, "timm backbone", ha="center", color=INK, fontsize=10, weight="bold")
    arrow(axes, (2.25, 3.3), (3.35, 5.4))
    for number in range(3):
        y = 5.7 - 1.5 * number
        box(axes, 8.3, y - 0.5, 3.0, 1.0, "Nyström attention\nr landmark keys", accent=True)
        arrow(axes, (6.35, y), (8.25, y))
        arrow(axes, (6.35, 1.2), (8.25, y - 0.25), accent=True)
        arrow(axes, (11.35, y), (13.2, 4.2 + (1 - number) * 0.3))
    axes.text(8.1, 1.55, "keys and values", ha="left", color=ACCENT, fontsize=9)
    axes.text(7.25, 6.0, "queries", ha="center", color=INK, fontsize=9)
    box(axes, 13.25, 3.4, 2.3, 1.6, "gate\nwith capped gain", accent=True)
    axes.text(11.6, 6.6, "SRM neck", ha="center", color=ACCENT, fontsize=10, weight="bold")
    box(axes, 16.5, 3.5, 1.0, 1.4, "head")
    arrow(axes, (15.6, 4.2), (16.45, 4.2))
    arrow(axes, (17.55, 4.2), (18.35, 4.2))
    axes.text(18.75, 4.2, "score", ha="center", va="center", color=INK, fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the picture to a file."""
    parser = argparse.ArgumentParser(prog="python -m bench.diagram", description=__doc__)
    parser.add_argument(
        "out",
        type=Path,
        metavar="FILE",
        help="picture to write; the suffix sets the format, such as docs/model.svg",
    )
    options = parser.parse_args(arguments)
    mpl.rcParams["svg.hashsalt"] = "srm"  # makes the file reproducible
    metadata = {"Date": None} if options.out.suffix == ".svg" else None
    draw().savefig(options.out, dpi=130, facecolor="white", metadata=metadata)
    return 0


if __name__ == "__main__":
    sys.exit(main())
