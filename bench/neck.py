"""What a neck costs: `python -m bench.neck` is `srm-iqa profile` with its rows in bench/results/<gpu or cpu>/."""

from __future__ import annotations

import sys

from bench.harness import RESULTS
from srm_model.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["profile", "--out", str(RESULTS)]
    sys.exit(main())
