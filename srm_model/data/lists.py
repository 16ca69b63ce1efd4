"""Lists of images and their scores as text editors and spreadsheets write them."""

from __future__ import annotations

import codecs
import csv
import io
import re
from pathlib import Path

_SEPARATORS = (",", ";", "\t", "|")
_HEAD = 1 << 16  # bytes, of which the first line of a table is read
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_list(path: Path) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

    Bytes that are not UTF-8 stay as in `os.fsdecode`, so that they can be part of a file name. A file that cannot be
    read is a ValueError that names it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: not readable ({error.strerror})") from None
    try:
        return decode(data)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not readable as {error.encoding} text ({error.reason})") from None


def decode(data: bytes, *, errors: str = "strict") -> str:
    """The text of these bytes, as in `read_list`; `errors` is for UTF-16 and UTF-32."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data.decode(encoding, errors)
    head = data[:_HEAD]
    zeros = [head[place::4].count(0) for place in range(4)]
    whole = len(head) // 4
    for upper, middle, encoding in (((3, 2), 1, "utf-32-le"), ((0, 1), 2, "utf-32-be")):
        if whole and all(zeros[place] == whole for place in upper) and 2 * zeros[middle] > whole:
            return data.decode(encoding, errors)
    for first, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        if 4 * head[first::2].count(0) > len(head):  # half of the characters are ASCII
            return data.decode(encoding, errors)
    return data.decode("utf-8-sig", "surrogateescape")


def header(path: Path) -> tuple[list[str], str]:
    """The names in the first line of a table, and the separator by which there are most of them.

    A file that cannot be read is an OSError.
    """
    with path.open("rb") as file:
        text = decode(file.read(_HEAD), errors="replace")
    found = {separator: _first_row(text, separator) for separator in _SEPARATORS}
    separator = max(_SEPARATORS, key=lambda separator: len(found[separator]))
    return found[separator], separator


def records(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Line number and fields by column of every row of a table; one that cannot be read is a ValueError."""
    columns, separator = header(path)
    reader = csv.reader(io.StringIO(read_list(path), newline=""), delimiter=separator, skipinitialspace=True)
    try:
        rows = [(reader.line_num, dict(zip(columns, row, strict=False))) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"{path}, row {reader.line_num}: not readable as a table ({error})") from None
    return rows[1:]


def number(text: str) -> float:
    """A decimal number, with a point or, as where semicolons separate, a comma; else a ValueError."""
    return float(text.replace(",", ".") if re.fullmatch(r"\s*[+-]?\d+,\d+\s*", text) else text)


def _first_row(text: str, separator: str) -> list[str]:
    try:
        row = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return []
    return [name.strip() for name in row]
