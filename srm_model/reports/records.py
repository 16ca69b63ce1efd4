"""Read a study's results: JSON lines, one for each measurement."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
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
FULL = "full"  # the variant without an ablation


class Records:
    """The lines of `results.jsonl`. Lines that are not objects with "kind", "identity" and "values" are ignored."""

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
        """Return the line with this kind and identity, or None if there is no such line yet.

        A line may have been written before a field was added to SRMConfig. The field then counts as having its default
        value.
        """
        wanted = json.loads(json.dumps(identity))  # turns tuples into lists, as in the file
        for line in self.lines:
            if line["kind"] == kind and _with_defaults(line["identity"]) == wanted:
                return line
        return None

    def add(self, line: dict[str, Any]) -> None:
        text = json_text(line)
        append_line(self.path, text)
        self.lines.append(json.loads(text))

    def elsewhere(self, kind: str, identity: dict[str, Any], field: str) -> dict[str, Any] | None:
        """Return a line whose identity differs from `identity` only in the value of `field`, or None."""
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
    """The study and the results that tables and figures show."""

    title: str
    study: dict[str, Any]
    records: Records

    @classmethod
    def read(cls, folder: str | Path) -> StudyResults:
        study = read_json(Path(folder) / STUDY)
        if not isinstance(study, dict) or "config" not in study:
            raise ValueError(
                f"{Path(folder) / STUDY}: was not written by srm-iqa ablate; expected the folder of a study"
            )
        records = Records(folder)
        records.lines.sort(key=lambda line: _place(line["identity"], study))
        return cls(str(study.get("title", "Study")), study, records)

    def unablated(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of this kind that belong to models without an ablation."""
        return [line for line in self.records.of(kind) if line["identity"]["variant"] == FULL]


def _place(identity: dict[str, Any], study: dict[str, Any]) -> list[int | float]:
    """Return the sort key of a line of `results.jsonl`, computed from the identity of the line.

    Several processes can append lines to the file, so the order of the lines in the file depends on their speed. The
    sort key gives a fixed order. It consists of the positions of the dataset, backbone, variant and neck in the study's
    lists, then the position of the norm in `NORMS`, then ε and the seed.
    """
    listed = (
        ("data", list(study.get("data", ()))),
        ("backbone", study.get("backbones", ())),
        ("variant", [FULL, *study.get("ablations", ())]),
        ("neck", study.get("necks", ())),
        ("norm", tuple(NORMS)),
    )
    place: list[int | float] = [
        list(names).index(identity[key]) if identity.get(key) in names else -1 for key, names in listed
    ]
    return [*place, identity.get("eps", 0.0), identity.get("seed", 0)]


def grouped(lines: Sequence[dict[str, Any]], *keys: str) -> list[list[dict[str, Any]]]:
    """Group lines whose identities have the same values of `keys`. Groups are in the order of their first lines."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault(json.dumps([line["identity"].get(key) for key in keys]), []).append(line)
    return list(groups.values())


def numbers_of(lines: Sequence[dict[str, Any]], *keys: str | int) -> np.ndarray:
    """Return one number from the values of each line, (len(lines),) float64. null becomes NaN.

    `keys` is the path to the number: with the keys "worst" and "srocc", the number is `values["worst"]["srocc"]`.
    """
    found = (reduce(getitem, keys, line["values"]) for line in lines)
    return np.array([math.nan if item is None else item for item in found], dtype=np.float64)


def over_seeds(lines: Sequence[dict[str, Any]], *keys: str | int) -> str:
    """Take one number from each line, and return the mean ± standard deviation of the numbers as text.

    The lines are results of the same measurement with different seeds. `keys` is the path to the number in the values
    of each line, as in `numbers_of`. The variance is divided by n − 1, where n is the number of lines. If there is only
    one line, the text is the number alone.
    """
    mean = fixed(mean_of(lines, *keys))
    if len(lines) < 2:
        return mean
    return f"{mean} {PLUS_MINUS} {fixed(float(np.std(numbers_of(lines, *keys), ddof=1)))}"


def mean_of(lines: Sequence[dict[str, Any]], *keys: str | int) -> float:
    """Return the mean of `numbers_of`, or NaN without lines."""
    return float(np.mean(numbers_of(lines, *keys))) if lines else math.nan
