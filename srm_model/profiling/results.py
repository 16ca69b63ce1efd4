"""Read and write files of measured rows, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from srm_model.files import append_line, json_text
from srm_model.profiling.machines import IDENTITY


def append(path: str | Path, row: dict[str, Any]) -> None:
    """Append one row to a file."""
    append_line(path, json_text(row))


def read(path: str | Path) -> list[dict[str, Any]]:
    """Read all rows of a file; raise ValueError if the file cannot be read. Incomplete lines are ignored."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except OSError:
        raise ValueError(f"{path}: no such file, or not readable; expected JSON lines") from None
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def one_machine(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the machine of all rows; raise ValueError if machines, versions or commits differ."""
    if not rows:
        raise ValueError("no rows; expected at least one")
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        about = row.get("machine")
        if not isinstance(about, dict):
            raise ValueError("a row does not say which machine it was measured on")
        found.setdefault(tuple(about.get(name) for name in IDENTITY), about)
    if len(found) > 1:
        keys = list(found)
        differing = [
            f"{name} ({', '.join(sorted({str(key[i]) for key in keys}))})"
            for i, name in enumerate(IDENTITY)
            if len({key[i] for key in keys}) > 1
        ]
        raise ValueError(
            f"rows of different measurements cannot share a table: {'; '.join(differing)} differ"
        )
    return next(iter(found.values()))


def latest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows whose machine, versions and commit equal those of the last row."""
    rows = list(rows)
    if not rows:
        return []
    last = [rows[-1].get("machine", {}).get(name) for name in IDENTITY]
    return [row for row in rows if [row.get("machine", {}).get(name) for name in IDENTITY] == last]


def newest(rows: Iterable[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Return the last row for each combination of values of `keys`.

    The rows are in the order in which their combinations first occur.
    """
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        found[tuple(json.dumps(row.get(key)) for key in keys)] = row
    return list(found.values())
