"""`srm-iqa report`."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

from srm_model import runs
from srm_model.cli.streams import as_named
from srm_model.cli.tables import print_json, print_text
from srm_model.reports import write_report, write_study
from srm_model.reports.records import STUDY
from srm_model.reports.study_tables import markdown, rows_of


def run(args: argparse.Namespace) -> None:
    """Write the report of a run or study, or only requested tables and figures of a study; print the written paths."""
    if args.json and args.table is None:
        raise ValueError("--json was given without --table; only tables are printed as JSON")
    folder = Path(args.folder)
    # A report can be written while jobs of a study run, because jobs append whole lines to the study's results.
    study = (folder / STUDY).is_file()
    writes = folder.is_dir() and (study or args.out is None)
    with runs.writing(folder, shared=study) if writes else nullcontext():
        _write(args, study)


def _write(args: argparse.Namespace, study: bool) -> None:
    if study:
        found, written = write_study(
            args.folder, table_numbers=args.table, figure_numbers=args.figure, out=args.out
        )
        for table in found if args.table is not None else []:
            if args.json:
                print_json(rows_of(table))
            print_text(markdown(table._replace(rows=[]) if args.json else table), as_json=args.json)
        print_text("\n".join(map(as_named, written)), as_json=args.json)
        return
    if args.table is not None or args.figure is not None:
        raise ValueError(f"{args.folder}: has no {STUDY}; --table and --figure go with a study")
    print(as_named(write_report(args.folder, args.out)))
