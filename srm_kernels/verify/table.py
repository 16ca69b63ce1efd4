"""What the command prints: a line for each case as it is finished, a summary, and the tables of the other commands."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from ..verdicts import FAULTS, Row, grouped

WIDTHS = (36, 5, 8, 12, 9, 9, 9)
HEADER = ("operator", "dtype", "shape", "result", "error", "forward", "backward")
DTYPES = ("bf16", "fp16", "fp32")


def tolerate() -> None:
    """Let stdout replace characters that its encoding does not have."""
    with suppress(AttributeError, ValueError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def line(cells: Sequence[str]) -> str:
    """Cells in columns."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)).rstrip()


def speedup(row: Row, direction: str) -> float | None:
    """How many times faster the row's implementation is than the best other one."""
    times = row["milliseconds"].get(direction, {})
    others = [time for name, time in times.items() if name != row["backend"]]
    if row["backend"] not in times or not others:
        return None
    return float(min(others) / times[row["backend"]])


def result(row: Row) -> str:
    """A row as one line; the reason of what is not right follows it."""
    label = row["operator"] + ("" if row["backend"] == "triton" else f" [{row['backend']}]")
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    cells = (label, row["dtype"], row["shape"], row["status"], ratio)
    text = line((*cells, *(_times(speedup(row, direction)) for direction in ("forward", "backward"))))
    return text if row["reason"] is None else f"{text}\n    {row['reason']}"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"


def summary(rows: Iterable[Row]) -> list[str]:
    """Lines of operator × dtype: right or not, and the geometric mean of the gains over shapes in both directions."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for (operator, dtype), found in grouped(rows).items():
        for backend in dict.fromkeys(row["backend"] for row in found):
            own = [row for row in found if row["backend"] == backend]
            cells.setdefault((operator, backend), {})[dtype] = _cell(own)
    lines = [f"{'operator':36}" + "".join(f"{dtype:24}" for dtype in DTYPES)]
    for (operator, backend), by_dtype in cells.items():
        label = operator + ("" if backend == "triton" else f" [{backend}]")
        lines.append(f"{label:36}" + "".join(f"{by_dtype.get(dtype, '–'):24}" for dtype in DTYPES))
    return [text.rstrip() for text in lines]


def _cell(rows: Sequence[Row]) -> str:
    faults = [row["status"] for row in rows if row["status"] in FAULTS]
    if faults:
        return faults[0]
    if all(row["status"] == "unsupported" for row in rows):
        return "not supported"
    means = []
    for direction in ("forward", "backward"):
        found = [value for row in rows if (value := speedup(row, direction)) is not None]
        means.append(f"{math.exp(sum(map(math.log, found)) / len(found)):.2f}×" if found else "–")
    return f"right, {' / '.join(means)}"


class Progress:
    """A line that is overwritten on a terminal, and left out elsewhere."""

    def __init__(self, stream: Any = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = bool(getattr(self._stream, "isatty", lambda: False)())

    def show(self, text: str) -> None:
        """Replace what is shown."""
        if self._terminal:
            print(f"\r\x1b[K{text}", end="", file=self._stream, flush=True)


def left(done: int, total: int, seconds: float) -> str:
    """What is done, and about how long the rest takes."""
    if not done:
        return f"{done}/{total}"
    return f"{done}/{total}, about {math.ceil(seconds / done * (total - done))} s left"
