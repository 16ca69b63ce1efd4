"""Measure necks with `srm-iqa profile`, and store the results in bench/results.

`python -m bench.neck` appends one row per case to bench/results/<machine>/neck.jsonl. <machine> is the GPU's name or
`cpu`.
"""

from __future__ import annotations

import sys

from bench.harness import RESULTS
from srm_model.cli import main


def run() -> int:
    """Run `srm-iqa profile` with the arguments of the command line; `--out` defaults to bench/results."""
    return main(["profile", "--out", str(RESULTS), *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(run())
