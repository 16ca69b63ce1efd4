"""Run compiled Triton kernels on the PTX emulator.

`python -m bench.ptx --matrix` checks every kernel, on up to five architectures and in up to three dtypes. A check fails
if the error of a result exceeds the bound of the numerics rule (`srm_kernels/numerics.py`), if the emulator reports a
fault (such as an invalid memory access or a race), if it refuses a launch, or if the code raises an error.

`python -m bench.ptx --report` counts the instructions of the kernels at the article's shapes. From the
counts, the report estimates which unit of a GPU limits each kernel.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import RESULTS, parser, write_lines
from bench.ptx.execution import ORDERS
from bench.ptx.rates import GPUS
from srm_model.files import write_text
from srm_model.profiling import machine
from srm_model.profiling.results import read

ARCHITECTURES = (80, 86, 89, 90, 120)
SIMULATED = RESULTS / "simulated"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 1 if a row failed."""
    options = _parser().parse_args(arguments)
    if os.environ.pop("TRITON_INTERPRET", None):  # interpreted kernels cannot be compiled
        given = sys.argv[1:] if arguments is None else arguments
        return subprocess.call([sys.executable, "-m", "bench.ptx", *given])
    import torch

    torch.set_num_threads(1)
    return _report(options) if options.report else _matrix(options)


def _about() -> dict[str, Any]:
    about = machine("cpu")
    return {name: about[name] for name in ("triton", "torch", "commit")}


def _report(options: argparse.Namespace) -> int:
    """Write the report's rows and page after each architecture, so that an interrupted run keeps the finished rows."""
    from . import report

    out = options.out or SIMULATED
    path, about = out / "kernels.jsonl", _about()
    workloads = [one for one in report.WORKLOADS if options.only in one.name]
    if not workloads:
        names = "; ".join(one.name for one in report.WORKLOADS)
        raise SystemExit(
            f"--only {options.only!r}: no workload has this in its name; expected a part of one of {names}"
        )
    counted = {one.name for one in workloads}
    for gpus in report.by_architecture(options.gpus or tuple(report.GPUS)):
        found = []
        for row in report.rows(gpus, workloads):
            found.append({**row, "machine": about})
            print(
                f"{row['gpu']:14} {row['workload']:22} {row['kernel']:26} {row['us']:8.1f} µs, limited by "
                f"{row['limit']}, {100 * row['share_of_floor']:3.0f} % of the floor",
                flush=True,
            )
        kept = read(path) if path.is_file() else []
        kept = [row for row in kept if row["gpu"] not in gpus or row["workload"] not in counted]
        found = sorted([*kept, *found], key=report.place)
        write_lines(path, found)
        write_text(out / "report.md", report.page(found))
    print(f"{out / 'report.md'}: {len(found)} rows of a simulation, not run on a GPU")
    return 0


def _matrix(options: argparse.Namespace) -> int:
    from . import matrix

    wanted = [
        run
        for run in matrix.runs(
            sample=options.sample, architectures=options.architectures, orders=options.orders
        )
        if options.only in "{kind} {case}".format(**run.about()) and run.dtype in options.dtypes
    ]
    if not wanted:
        raise SystemExit(
            f"--only {options.only!r}: no case on these architectures and dtypes has this in its name"
        )
    about = _about()
    place = {key: number for number, key in enumerate(matrix.every_key())}
    written = {}  # the rows of the file by their key, replaced one after the other
    if options.out and options.out.is_file():
        found = [row for row in read(options.out) if row["machine"]["triton"] == about["triton"]]
        written = {matrix.key_of(row): row for row in found if matrix.key_of(row) in place}
    failed, start = 0, time.monotonic()
    known = list(written.values()) if options.resume else []
    for number, row in enumerate(matrix.rows(wanted, known), 1):
        failed += not row["passed"]
        row.setdefault("machine", about)
        written[matrix.key_of(row)] = row
        write_lines(options.out, sorted(written.values(), key=lambda row: place[matrix.key_of(row)]))
        print(_line(row), f"[{number}/{len(wanted)}, {time.monotonic() - start:.0f} s]", flush=True)
        for text in (*row["reports"], *row["refusals"], *filter(None, [row.get("error")])):
            print("    ", text, flush=True)
    print(f"{len(wanted) - failed} passed, {failed} failed")
    return int(failed > 0)


def _line(row: dict[str, Any]) -> str:
    ratio = f"{row['ratio']:6.3f}" if "ratio" in row else "     -"
    mark = "passed" if row["passed"] else "FAILED"
    return f"{mark} sm_{row['architecture']:<3} {row['dtype']} {ratio}  {row['kind']} {row['case']}"


def _parser() -> argparse.ArgumentParser:
    made = parser("ptx", __doc__)
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--matrix", action="store_true", help="check every kernel in every dtype on every architecture"
    )
    what.add_argument(
        "--report", action="store_true", help="simulate what limits each kernel at the article's shapes"
    )
    made.add_argument(
        "--out", type=Path, metavar="PATH",
        help="write the matrix's rows to the file PATH as they come, or the report to the folder PATH "
        "(default: bench/results/simulated)",
    )  # fmt: skip
    made.add_argument(
        "--only", default="", metavar="TEXT",
        help="run cases whose kind and name contain TEXT, or count workloads whose name contains it",
    )  # fmt: skip
    matrix = made.add_argument_group("with --matrix")
    matrix.add_argument("--sample", action="store_true", help="run only the sample of continuous integration")
    matrix.add_argument(
        "--architectures", type=int, nargs="+", default=(89, 90, 120, 80, 86), choices=ARCHITECTURES
    )
    matrix.add_argument(
        "--dtypes", nargs="+", default=("bf16", "fp16", "fp32"), choices=("bf16", "fp16", "fp32")
    )
    matrix.add_argument(
        "--orders", nargs="+", default=("together",), choices=ORDERS,
        help="order of the warps of a block between barriers",
    )  # fmt: skip
    matrix.add_argument(
        "--resume", action="store_true", help="keep a row of PATH that passed, if its code is the same now"
    )
    report = made.add_argument_group("with --report")
    report.add_argument(
        "--gpus", nargs="+", choices=GPUS, metavar="NAME", help=f"{', '.join(GPUS)} (default: all)"
    )
    return made


if __name__ == "__main__":
    sys.exit(main())
