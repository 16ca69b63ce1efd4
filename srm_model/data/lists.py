"""Read lists of images and scores with the encodings and separators that text editors and spreadsheets use."""

from __future__ import annotations

import codecs
import csv
import io
import re
from pathlib import Path

_SEPARATORS = (",", ";", "\t", "|")
_HEAD = 1 << 16  # bytes that are read to find a table's first line
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # tried before UTF-16, because this mark starts with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_list(path: Path) -> str:
    """Read a file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Bytes that are not valid UTF-8 become surrogate escapes, as in `os.fsdecode`. Lists can therefore contain file names
    that are not UTF-8.

    Raises:
        ValueError: The file cannot be read.
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
    """Decode bytes as `read_list` does.

    For UTF-16 and UTF-32, `errors` is passed to `bytes.decode`. In UTF-8, invalid bytes always become surrogate
    escapes.
    """
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
        if 4 * head[first::2].count(0) > len(head):  # more than half of the characters are ASCII
            return data.decode(encoding, errors)
    return data.decode("utf-8-sig", "surrogateescape")


def header(path: Path) -> tuple[list[str], str]:
    """Return a table's column names and its separator.

    The separator is the character among `,`, `;`, tab and `|` that splits the first line into the most columns.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        text = decode(file.read(_HEAD), errors="replace")
    found = {separator: _first_row(text, separator) for separator in _SEPARATORS}
    separator = max(_SEPARATORS, key=lambda separator: len(found[separator]))
    return found[separator], separator


def records(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Return, for every row of a table, its line number and a dict of its fields by column name.

    Raises:
        OSError: The file cannot be opened.
        ValueError: The file cannot be read as a table.
    """
    columns, separator = header(path)
    reader = csv.reader(io.StringIO(read_list(path), newline=""), delimiter=separator, skipinitialspace=True)
    try:
        rows = [(reader.line_num, dict(zip(columns, row, strict=False))) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"{path}, row {reader.line_num}: not readable as a table ({error})") from None
    return rows[1:]


def number(text: str) -> float:
    """Convert text as `float` does, and also accept a decimal comma; raise ValueError for any other text."""
    return float(text.replace(",", ".") if re.fullmatch(r"\s*[+-]?\d+,\d+\s*", text) else text)


def _first_row(text: str, separator: str) -> list[str]:
    try:
        row = next(csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return []
    return [name.strip() for name in row]
