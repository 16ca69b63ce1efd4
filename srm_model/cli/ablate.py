"""`srm-iqa ablate`."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from srm_model import runs
from srm_model.backbones import check_backbone, check_size
from srm_model.cli.options import device_from, named_folders
from srm_model.cli.tables import print_rows, print_text
from srm_model.files import write_json
from srm_model.reports.records import STUDY, Records
from srm_model.study.context import Context
from srm_model.study.file import Study, read_study
from srm_model.study.jobs import Job, jobs
from srm_model.study.sharing import check_sets, do_one, find_job, missing, share


def run(args: argparse.Namespace) -> None:
    """Run those jobs of a study that have no results yet, and print a summary.

    With --job, run only this job. With --list or --dry-run, only list jobs.
    """
    if args.json and (args.list or args.dry_run or args.job):
        raise ValueError(
            "--json was given with --list, --dry-run or --job, which print no table; expected --json without them"
        )
    study = read_study(args.study, named_folders(args.data or ()))
    for backbone in study.backbones:
        check_backbone(backbone)
    with nullcontext() if args.dry_run or args.list else runs.writing(args.out, shared=True):
        _run(study, args)


def _run(study: Study, args: argparse.Namespace) -> None:
    context = Context(
        study, Path(args.out), device_from(args.device), workers=args.workers, progress=not args.no_progress
    )
    found = jobs(context)
    check_sets(found, context.out)
    for backbone, side in sorted({(m.backbone, m.config.image_size) for job in found for m in job.needs}):
        check_size(backbone, side)
    if args.list:
        print("\n".join(job.name for job in found))
    elif args.dry_run:
        left = missing(found, context.out)
        print("\n".join([*(job.label for job in left), f"{len(left)} of {len(found)} results are missing"]))
    else:
        _do(found, context, args)


def _do(found: list[Job], c: Context, args: argparse.Namespace) -> None:
    job = find_job(args.job, found, c.out) if args.job else None
    write_json(c.out / STUDY, c.study.to_dict())
    if c.device.type == "cpu":
        runs.keep_memory()
    # A scheduler starts the same command with different job names. Record all these calls as one command.
    arguments = ["NAME" if args.job and word == args.job else word for word in args.arguments]
    with runs.recorded(c.out, arguments, title=c.study.title):
        if args.job:
            if job is not None:
                do_one(job, found, c)
            print(f"{args.job}: {'done already' if job is None else 'done'}")
            return
        share(found, c)
    lines = Records(c.out).lines
    kinds = dict.fromkeys(job.kind for job in found)
    rows = [{"results": kind, "lines": sum(line["kind"] == kind for line in lines)} for kind in kinds]
    print_rows(rows, {"results": "results", "lines": "lines"}, as_json=args.json)
    print_text(f"tables and figures: srm-iqa report {c.out}", as_json=args.json)
