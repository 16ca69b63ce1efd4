"""`srm-iqa data synthesize` and `srm-iqa data check`."""

from __future__ import annotations

import argparse

from srm_model import runs
from srm_model.cli.tables import print_json
from srm_model.data import describe
from srm_model.data.synthesize import synthesize as synthesize_set


def synthesize(args: argparse.Namespace) -> None:
    """Synthesise a dataset and print its description."""
    choices = {key: getattr(args, key) for key in ("types", "levels") if getattr(args, key) is not None}
    with runs.writing(args.out):
        synthesize_set(
            args.out,
            photographs=args.photographs,
            packaged=args.packaged or None,
            image_size=args.image_size,
            crop=args.crop,
            seed=args.seed,
            metric=args.metric,
            opinions=args.opinions,
            labels=args.labels,
            progress=runs.bars(not args.no_progress),
            **choices,
        )
    _print(args.out, args)


def check(args: argparse.Namespace) -> None:
    """Check every file of a dataset and print its description."""
    _print(args.root, args)


def _print(root: str, args: argparse.Namespace) -> None:
    description = describe(root, seed=args.seed, progress=not args.no_progress)
    if args.json:
        print_json([description])
        return
    for key, value in description.items():
        if isinstance(value, dict):
            value = ", ".join(
                f"{name} {' '.join(item) if isinstance(item, list) else item}" for name, item in value.items()
            )
        elif isinstance(value, list):
            value = " to ".join(f"{item:g}" for item in value)
        print(f"{key.replace('_', ' ')}: {value}")
