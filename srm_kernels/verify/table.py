"""The output of the command: a line for each finished case, a summary, and progress."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from ..verdicts import DIRECTIONS, FAULTS, RIGHT, Row, grouped

WIDTHS = (36, 5, 8, 12, 9, 9, 9)
HEADER = ("operator", "dtype", "shape", "result", "error", "forward", "backward")
DTYPES = ("bf16", "fp16", "fp32")


def tolerate() -> None:
    """Make stdout replace characters that its encoding does not have."""
    with suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def line(cells: Sequence[str]) -> str:
    """Return a line of cells in columns."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def speedup(row: Row, direction: str) -> float | None:
    """Return the speedup of the row's implementation over the fastest other implementation."""
    times = row["milliseconds"].get(direction, {})
    others = [time for name, time in times.items() if name != row["backend"]]
    if row["backend"] not in times or not others:
        return None
    return float(min(others) / times[row["backend"]])


def result(row: Row) -> str:
    """Format a row as one line, followed by a line with the reason if the row has one."""
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    speedups = (speedup(row, direction) for direction in DIRECTIONS)
    gains = ("" if value is None else f"{value:.2f}×" for value in speedups)
    text = line(
        (_label(row["operator"], row["backend"]), row["dtype"], row["shape"], row["status"], ratio, *gains)
    )
    return text if row["reason"] is None else f"{text}\n    {row['reason']}"


def _label(operator: str, backend: str) -> str:
    return operator if backend == "triton" else f"{operator} [{backend}]"


def summary(rows: Iterable[Row]) -> list[str]:
    """Return the lines of a table with one line per operator and backend, and one column per dtype.

    A cell contains the first fault of its cases. If no case has a fault and the backend supports none of the cases, the
    cell contains "not supported". If all supported cases exceed the memory of the device, the cell contains "out of
    memory". Otherwise, the cell contains "right" and two speedups: of the forward pass, and of the forward and the
    backward pass together. The speedups are geometric means over shapes (see `speedup`).
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for (operator, dtype), found in grouped(rows).items():
        for backend in dict.fromkeys(row["backend"] for row in found):
            own = [row for row in found if row["backend"] == backend]
            cells.setdefault((operator, backend), {})[dtype] = _cell(own)
    lines = [f"{'operator':36}" + "".join(f"{dtype:24}" for dtype in DTYPES)]
    for (operator, backend), by_dtype in cells.items():
        cells_of_line = "".join(f"{by_dtype.get(dtype, '–'):24}" for dtype in DTYPES)
        lines.append(f"{_label(operator, backend):36}{cells_of_line}")
    return [text.rstrip() for text in lines]


def _cell(rows: Sequence[Row]) -> str:
    faults = [row["status"] for row in rows if row["status"] in FAULTS]
    if faults:
        return faults[0]
    if all(row["status"] == "unsupported" for row in rows):
        return "not supported"
    if all(row["status"] != RIGHT for row in rows):
        return "out of memory"
    means = []
    for direction in DIRECTIONS:
        found = [value for row in rows if (value := speedup(row, direction)) is not None]
        means.append(f"{math.exp(sum(map(math.log, found)) / len(found)):.2f}×" if found else "–")
    return f"right, {' / '.join(means)}"


class Progress:
    """A progress line that is overwritten in place. If the stream is not a terminal, nothing is printed."""

    def __init__(self, stream: Any = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = bool(getattr(self._stream, "isatty", lambda: False)())

    def show(self, text: str) -> None:
        """Replace the line."""
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=self._stream, flush=True)


def left(done: int, total: int, seconds: float) -> str:
    """Return the progress as text: finished and total items and, after the first item, the estimated remaining time."""
    if not done:
        return f"{done}/{total}"
    return f"{done}/{total}, about {math.ceil(seconds / done * (total - done))} s left"
