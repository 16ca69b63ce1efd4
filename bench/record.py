"""JSON lines of a measurement that is written at once, when it is whole."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from srm_model.files import json_text, write_text
from srm_model.profiling import machines


def machine(device: str) -> dict[str, Any]:
    """What `machines.machine` says, and how busy the machine is."""
    return {**machines.machine(device), "load": round(os.getloadavg()[0], 1)}


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json_text(line) + "\n" for line in lines))
