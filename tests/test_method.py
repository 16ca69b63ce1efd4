"""Test that every section of docs/METHOD.md to which the code refers exists."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POINTER = re.compile(r"docs/METHOD\.md §(\d(?:\.\d)?)((?:,| and| to|,? §?\d(?:\.\d)?)*)")


def test_every_section_that_code_points_to_exists():
    page = (ROOT / "docs/METHOD.md").read_text(encoding="utf-8")
    sections = set(re.findall(r"^##+ (\d(?:\.\d)?)\.? ", page, re.MULTILINE))
    assert {"1", "1.6", "2", "2.1", "3.4", "4", "5", "6"} <= sections
    pointers = []
    for package in ("srm_kernels", "srm_model", "bench"):
        for path in (ROOT / package).rglob("*.py"):
            for first, more in POINTER.findall(path.read_text(encoding="utf-8")):
                pointers += [(path, number) for number in (first, *re.findall(r"\d(?:\.\d)?", more))]
    assert len(pointers) > 40
    assert [(str(path), number) for path, number in pointers if number not in sections] == []
