"""Test that documentation, comments and messages contain none of the phrases below."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("bench", "constraints", "csrc", "docs", "experiments", "srm_kernels", "srm_model", "tests")
SUFFIXES = {".cff", ".cpp", ".h", ".md", ".py", ".rst", ".sh", ".toml", ".txt"}
# Regular expression of a phrase → suggestion. Add a phrase if reviews find it twice.
PHRASES = {
    "(is|are|was|were) owed": "not measured yet",
    "(is|are|was|were) aimed at": "the target is",
    "a kill": "an interruption; SIGKILL",
    "another hand": "an independent implementation",
    "doors?": "public function; argument checks",
    "for who": "for users who",
    "found out by": "detected from",
    "held against": "compared with",
    "in hand": "in progress; current",
    "lest": "so that ... cannot",
    "lies at": "is in",
    "roads?": "path; pipeline",
    "rooms": "name the thing: module, folder, buffer",
    "the house": "the project",
    "to be had": "available; remaining",
    "told (by|of|on)": "reported by; shown by",
}
GAP = r"(?:\s|#|//)+"  # a phrase can continue on the next line, also in a comment
BANNED = {
    re.compile(rf"\b{phrase.replace(' ', GAP)}\b", re.IGNORECASE): suggestion
    for phrase, suggestion in PHRASES.items()
}


def found(text: str) -> list[tuple[int, str, str]]:
    """Return line, phrase and suggestion for every banned phrase of a text."""
    return [
        (text.count("\n", 0, hit.start()) + 1, re.sub(GAP, " ", hit[0]), suggestion)
        for pattern, suggestion in BANNED.items()
        for hit in pattern.finditer(text)
    ]


def test_a_phrase_is_found_across_lines():
    text = "# Times on a GPU are not known: that is\n# owed. Roads, tomorrow, a broad or told-on word pass,\n"
    assert found(text) == [(1, "is owed", "not measured yet"), (2, "Roads", "path; pipeline")]
    assert found("It also tolds of crossroads, headrooms and indoors.") == []


def test_no_banned_phrase_is_used():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    files += [path for path in ROOT.iterdir() if path.suffix in SUFFIXES or path.name == "Makefile"]
    assert len(files) > 300
    hits = [
        f"{path.relative_to(ROOT)}:{line}: {phrase!r}; write: {suggestion}"
        for path in sorted(files)
        if path != Path(__file__).resolve()
        for line, phrase, suggestion in found(path.read_text(encoding="utf-8"))
    ]
    assert not hits, "\n".join(hits)
