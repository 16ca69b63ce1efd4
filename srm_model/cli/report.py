"""`srm-iqa report`."""

from __future__ import annotations

import argparse

from srm_model.reports import write_report


def run(args: argparse.Namespace) -> None:
    """Write the page and print its path."""
    print(write_report(args.folder, args.out))
