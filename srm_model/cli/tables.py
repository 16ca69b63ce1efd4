"""The tables that commands print, as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table, the first column left-aligned, the others right-aligned."""
    cells = [list(header), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        columns = enumerate(zip(row, widths, strict=True))
        padded = (text.rjust(width) if column else text.ljust(width) for column, (text, width) in columns)
        print("  ".join(padded).rstrip())


def cell(value: Any) -> str:
    """Format a value for a table. Numbers get three decimals; None and NaN become "undefined"."""
    if value is None or value != value:
        return "undefined"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
