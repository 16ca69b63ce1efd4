"""What a neck costs: `python -m bench.neck` is `srm-iqa profile` with its rows in bench/results/<gpu or cpu>/."""

from __future__ import annotations

import sys

from bench.harness import RESULTS
from srm_model.cli import main


def run() -> int:
    """`srm-iqa profile` with what the command line has; a folder given there is the one that counts."""
    return main(["profile", "--out", str(RESULTS), *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(run())
