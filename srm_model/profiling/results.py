"""Rows in a file that outlives the run that writes it: JSON lines, each appended whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from srm_model.files import json_text, make_folder
from srm_model.profiling.machines import IDENTITY


def append(path: str | Path, row: dict[str, Any]) -> None:
    """Add one row by a single write, so that an interruption leaves the earlier rows and never half of this one."""
    path = Path(path)
    make_folder(path.parent)
    line = (json_text(row) + "\n").encode(errors="backslashreplace")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(handle).st_size
        torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"  # a power cut in the middle of a line
        os.write(handle, b"\n" + line if torn else line)
    finally:
        os.close(handle)


def read(path: str | Path) -> list[dict[str, Any]]:
    """All whole rows of a file; a line that a power cut tore is left out. A missing file is a ValueError."""
    path = Path(path)
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError:
        raise ValueError(f"{path}: no such file, or not readable") from None
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
    """The machine that all rows were measured on; ValueError where machines, versions or commits are mixed."""
    if not rows:
        raise ValueError("no rows to tell of")
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
    """Rows measured as the last one was: same machine, versions and commit."""
    rows = list(rows)
    if not rows:
        return []
    last = [rows[-1].get("machine", {}).get(name) for name in IDENTITY]
    return [row for row in rows if [row.get("machine", {}).get(name) for name in IDENTITY] == last]


def newest(rows: Iterable[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Of rows that agree in `keys` the last one, in order of first appearance: a repeated measurement replaces."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        found[tuple(json.dumps(row.get(key)) for key in keys)] = row
    return list(found.values())
