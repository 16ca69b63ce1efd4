"""Write messages to standard error. Standard output is for results."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def say(text: str) -> None:
    """Write a line to stderr. If stderr is closed, do nothing."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        with suppress(OSError):  # otherwise the interpreter fails at exit, when it flushes stderr
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def bars(wanted: bool) -> bool:
    """Return whether to show progress bars: `wanted` must be True, and stderr must be a terminal."""
    return wanted and sys.stderr.isatty()
