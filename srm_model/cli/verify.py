"""`srm-iqa verify`."""

from __future__ import annotations

import argparse

from srm_kernels.verify.command import main


def run(args: argparse.Namespace) -> int:
    """Run `python -m srm_kernels verify` and return its exit code."""
    return main(args.arguments[1:], "srm-iqa verify")
