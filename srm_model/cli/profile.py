"""`srm-iqa profile`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from srm_model import runs
from srm_model.cli.options import config_from, device_from
from srm_model.cli.tables import print_json, print_table, print_text
from srm_model.profiling import Effort, Subject, Sweep, article_cases, cases, folder_name
from srm_model.profiling.counting import CONVENTION
from srm_model.profiling.machines import sentence
from srm_model.profiling.results import append
from srm_model.profiling.tables import cost_table, measured_table, notes, shares, shares_table
from srm_model.profiling.traces import write_memory, write_trace

ROWS = "neck.jsonl"
_OPTIONS = {
    "parts": "part",
    "backbones": "backbone",
    "necks": "neck",
    "backend_names": "backend",
    "resolutions": "resolution",
    "batches": "batch",
    "dtypes": "dtype",
    "directions": "direction",
}


def run(args: argparse.Namespace) -> int:
    """Measure every case and print the tables; return 2 if no case could run.

    After each case, a row with the case's results or error is appended to the file `ROWS`. The file is in the
    subfolder of `--out` for this device (see `folder_name`).
    """
    device = device_from(args.device)
    chosen = {name: getattr(args, option) for name, option in _OPTIONS.items()}
    given = {name: values for name, values in chosen.items() if values is not None}
    wanted = article_cases(**given) if args.article else cases(**given)
    effort = Effort.for_device(device, args.warmup, args.repeats, args.seconds)
    sweep = Sweep(device, config_from(args), effort, small=args.small_ceilings)
    folder = Path(args.out) / folder_name(sweep.machine)

    def also(subject: Subject) -> None:
        for write in ([write_trace] if args.trace else []) + ([write_memory] if args.memory else []):
            written = write(subject, folder)
            if not args.no_progress:
                runs.say(", ".join(map(str, written)))

    rows: list[dict[str, Any]] = []
    try:
        for row in sweep.rows(wanted, also=also):
            append(folder / ROWS, row)
            rows.append(row)
            if not args.no_progress:
                runs.say(f"{len(rows)}/{len(wanted)}  {_outcome(row)}")
    finally:
        if rows:
            if args.json:
                print_json(rows, "cases")
                print_json(shares(rows), "shares")
            else:
                _print(rows)
            print_text(f"rows: {folder / ROWS}", as_json=args.json)
    return 0 if any(not row["error"] for row in rows) else 2


def _outcome(row: dict[str, Any]) -> str:
    what = (
        f"{row['part']} {row['backbone']} {row['label']} {row['resolution']} px B={row['batch']} {row['dtype']} "
        f"{row['direction']}"
    )
    return f"{what}: {row['error'] or '{:.3g} ms'.format(row['milliseconds']['p50'])}"


def _print(rows: list[dict[str, Any]]) -> None:
    print(sentence(rows[0]["machine"]))
    print(CONVENTION)
    if not all(row["error"] for row in rows):
        print()
        print_table(*cost_table(rows))
    print()
    print_table(*measured_table([row for row in rows if not row["error"]]))
    print()
    compared = shares_table(rows)
    if compared[1]:
        print_table(*compared)
        print()
    for kernels in dict.fromkeys(row["kernels"] for row in rows if row["kernels"]):
        print(f"kernels: {kernels}")
    for row in rows:
        if row["error"]:
            print(f"not measured: {_outcome(row)}")
    for note in notes(rows):
        print(f"- {note}")
