"""The necks by name: what command line, study files, reports and profiles know of them, without torch."""

from __future__ import annotations

from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of neck.

    Attributes:
        attention: How its links mix, "nystrom" or "full"; None for a neck without links.
        surrogate: The neck on which transfer attacks against it are crafted.
        look: Its colour, dash and marker in charts.
    """

    attention: str | None
    surrogate: str
    look: int


NECKS = {
    "srm": Kind("nystrom", "none", 0),
    "quadratic": Kind("full", "none", 2),
    "none": Kind(None, "srm", 1),
}


def check_neck(name: str) -> None:
    """ValueError for a name that is no neck's."""
    if name not in NECKS:
        raise ValueError(f"neck={name!r}: expected one of {', '.join(map(repr, NECKS))}")
