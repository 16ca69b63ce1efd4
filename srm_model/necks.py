"""Define the names and properties of the necks, for modules that must not import torch."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of neck."""

    attention: str | None  # attention of its links, "nystrom" or "full"; None for a neck without links
    surrogate: str  # neck of the surrogate model for transfer attacks
    look: int  # index of its colour, dash and marker in charts


NECKS = {
    "srm": Kind("nystrom", "none", 0),
    "quadratic": Kind("full", "none", 2),
    "none": Kind(None, "srm", 1),
}


def check_neck(name: str) -> None:
    """Raise ValueError unless `name` is the name of a neck."""
    if name not in NECKS:
        raise ValueError(f"neck={name!r}: expected one of {', '.join(map(repr, NECKS))}")
