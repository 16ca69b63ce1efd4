"""Lines on standard error, for people who watch; standard output is for results."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def say(text: str) -> None:
    """Write a line to stderr, where that is possible; stdout is for results."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        with suppress(OSError):  # or the interpreter would fail over it at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def bars(wanted: bool) -> bool:
    """Whether libraries are to draw their bars: where they are wanted, and only on a terminal."""
    return wanted and sys.stderr.isatty()
