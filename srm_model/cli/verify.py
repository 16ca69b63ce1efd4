"""`srm-iqa verify`, which is `python -m srm_kernels verify`."""

from __future__ import annotations

import argparse

from srm_kernels.verify.command import main


def run(args: argparse.Namespace) -> int:
    """Measure the kernels on the GPU at hand; the exit code is that of `python -m srm_kernels verify`."""
    return main(args.arguments[1:], "srm-iqa verify")
