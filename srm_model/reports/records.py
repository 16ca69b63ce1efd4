"""A study's results: JSON lines, one for each thing that was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from srm_model.config import SRMConfig
from srm_model.files import append_line, json_text, read_json
from srm_model.norms import NORMS
from srm_model.reports.text import fixed

RESULTS, STUDY = "results.jsonl", "study.json"
_DEFAULTS = json.loads(json.dumps(SRMConfig().to_dict()))
PLUS_MINUS = "±"


class Records:
    """The lines of `results.jsonl`, each {"kind", "identity", "values", …}; a line that a kill cut short is dropped."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / RESULTS
        self.lines: list[dict[str, Any]] = []
        if self.path.is_file():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:
                    continue
                if isinstance(line, dict) and {"kind", "identity", "values"} <= line.keys():
                    self.lines.append(line)

    def find(self, kind: str, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The line of that identity, None where it has yet to be measured.

        A field that SRMConfig got since a line was written counts as its default there.
        """
        wanted = json.loads(json.dumps(identity))  # tuples are lists there
        for line in self.lines:
            if line["kind"] == kind and _with_defaults(line["identity"]) == wanted:
                return line
        return None

    def add(self, line: dict[str, Any]) -> None:
        text = json_text(line)
        append_line(self.path, text)
        self.lines.append(json.loads(text))

    def elsewhere(self, kind: str, identity: dict[str, Any], field: str) -> dict[str, Any] | None:
        """A line of that identity but for another value of one field, None where there is none."""
        wanted = json.loads(json.dumps(identity))
        for line in self.lines:
            known = _with_defaults(line["identity"])
            if line["kind"] == kind and {**known, field: wanted[field]} == wanted != known:
                return line
        return None

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == kind]


def _with_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    if "config" not in identity:
        return identity
    return {**identity, "config": {**_DEFAULTS, **identity["config"]}}


@dataclass(frozen=True)
class StudyResults:
    """What tables and figures are made of."""

    title: str
    study: dict[str, Any]
    records: Records

    @classmethod
    def read(cls, folder: str | Path) -> StudyResults:
        study = read_json(Path(folder) / STUDY)
        if not isinstance(study, dict) or "config" not in study:
            raise ValueError(f"{Path(folder) / STUDY}: not a study of this program")
        records = Records(folder)
        records.lines.sort(key=lambda line: _place(line["identity"], study))
        return cls(str(study.get("title", "Study")), study, records)


def _place(identity: dict[str, Any], study: dict[str, Any]) -> list[int | float]:
    """Where a line stands: as the study lists things, whatever order several processes did them in."""
    listed = (
        ("data", list(study.get("data", ()))),
        ("backbone", study.get("backbones", ())),
        ("variant", ["full", *study.get("ablations", ())]),
        ("neck", study.get("necks", ())),
        ("norm", tuple(NORMS)),
    )
    place: list[int | float] = [
        list(names).index(identity[key]) if identity.get(key) in names else -1 for key, names in listed
    ]
    return [*place, identity.get("eps", 0.0), identity.get("seed", 0)]


def grouped(lines: Sequence[dict[str, Any]], *keys: str) -> list[list[dict[str, Any]]]:
    """Lines by what they have in common in their identity, in the order of the first of each."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(json.dumps([line["identity"].get(key) for key in keys]), []).append(line)
    return list(groups.values())


def over_seeds(lines: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], Any]) -> str:
    """Mean ± standard deviation (n − 1) over lines that differ by seed; the value alone where there is one."""
    numbers = [
        math.nan if item is None else float(item) for item in map(value, (line["values"] for line in lines))
    ]
    if not numbers:
        return fixed(math.nan)
    mean = fixed(float(np.mean(numbers)))
    if len(numbers) == 1:
        return mean
    return f"{mean} {PLUS_MINUS} {fixed(float(np.std(numbers, ddof=1)))}"


def mean_of(lines: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], Any]) -> float:
    numbers = [value(line["values"]) for line in lines]
    return (
        float(np.mean([math.nan if item is None else float(item) for item in numbers]))
        if numbers
        else math.nan
    )
