"""The tables that commands print: rows of values, as plain text or, with `--json`, as one JSON object per row.

`add_json` adds `--json` to a command. In `parser.py`, `_command` calls `add_json` for a command with `table=True`.
Commands print their tables with `print_rows` or `print_json`. Only `verify`, which belongs to `srm_kernels`, prints its
own JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from srm_model.files import finite
from srm_model.messages import say

Row = Mapping[str, Any]
# A dict from a column's heading to the name of a value, or to a function that computes the column's cell from a row.
Columns = Mapping[str, str | Callable[[Row], Any]]
_HELP = "print one JSON object per row of each table, with unrounded values, and all other text on stderr"


def add_json(parser: argparse.ArgumentParser, text: str = _HELP) -> None:
    """Add `--json`, with this help text."""
    parser.add_argument("--json", action="store_true", help=text)


def print_rows(
    rows: Sequence[Row], columns: Columns, *, as_json: bool = False, table: str | None = None
) -> None:
    """Print a table of text, or its rows as JSON.

    Args:
        rows: Rows of the table, each a dict from name to value. JSON has all values of a row. Text has only the values
            that `columns` selects.
        columns: Columns of the text (see `Columns`). JSON ignores them.
        as_json: Whether to print JSON.
        table: Name of the table, which is added to each JSON object. Commands that print several tables need this
            name to distinguish the tables.
    """
    if as_json:
        print_json(rows, table)
        return
    sources = columns.values()
    cells = [[row[find] if isinstance(find, str) else find(row) for find in sources] for row in rows]
    print_table(list(columns), cells)


def print_json(rows: Iterable[Row], table: str | None = None) -> None:
    """Print each row as a JSON object, with the name of its table if there is one. NaN and infinities become null."""
    about = {} if table is None else {"table": table}
    for row in rows:
        print(json.dumps(finite({**about, **row}), allow_nan=False))


def print_type_level(rows: Sequence[Row], name: str) -> None:
    """Print, below a table, the SROCC of a predictor that knows only distortion type and level.

    Rows with the same value and number of images share a line. Nothing is printed for rows without a value.

    Args:
        rows: Rows with the values `type_level_srocc` and `images`.
        name: Name of the value that identifies a row. It is printed if the rows differ in `type_level_srocc` or
            `images`.
    """
    groups: dict[tuple[float | None, int], list[str]] = {}
    for row in rows:
        groups.setdefault((row["type_level_srocc"], row["images"]), []).append(str(row[name]))
    for (ceiling, images), names in groups.items():
        if ceiling is not None:
            own = f"the {images} images of {', '.join(dict.fromkeys(names))}"
            which = own if len(groups) > 1 else f"the same {images} images"
            print(f"Predictor that knows only distortion type and level: SROCC {cell(ceiling)} on {which}")


def print_text(text: str, *, as_json: bool = False) -> None:
    """Print text that is not part of a table. If `as_json` is true, use stderr, so that stdout has only JSON."""
    if as_json:
        say(text.strip("\n"))
    else:
        print(text)


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table of text, the first column left-aligned, the others right-aligned."""
    cells = [list(header), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    for row in cells:
        columns = enumerate(zip(row, widths, strict=True))
        padded = (text.rjust(width) if column else text.ljust(width) for column, (text, width) in columns)
        print("  ".join(padded).rstrip())


def cell(value: Any) -> str:
    """Format a value for a table. Floats get three decimals; None and NaN become "undefined"."""
    if value is None or value != value:
        return "undefined"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
