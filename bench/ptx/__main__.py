"""Run compiled Triton kernels on the PTX emulator: `python -m bench.ptx matrix`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import append, machine, read
from srm_model.files import write_text

ARCHITECTURES = (80, 86, 89, 90, 120)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 1 where a row failed."""
    options = _parser().parse_args(arguments)
    if os.environ.pop("TRITON_INTERPRET", None):  # interpreted kernels cannot be compiled
        given = sys.argv[1:] if arguments is None else arguments
        return subprocess.call([sys.executable, "-m", "bench.ptx", *given])
    return int(options.run(options))


def _matrix(options: argparse.Namespace) -> int:
    import torch

    from . import matrix

    torch.set_num_threads(1)
    wanted = [
        run
        for run in matrix.runs(
            sample=options.sample, architectures=options.architectures, orders=options.orders
        )
        if options.only in f"{run.about()['kind']} {run.case.name}" and run.dtype in options.dtypes
    ]
    kept: list[dict[str, Any]] = []
    if options.out and options.out.is_file():
        known = {matrix.key_of(run.about()) for run in wanted}
        about = machine("cpu")
        kept = [row for row in read(options.out) if row["machine"]["triton"] == about["triton"]]
        done = {matrix.key_of(row) for row in kept if row["passed"]} if options.resume else set()
        kept = [row for row in kept if matrix.key_of(row) not in known or matrix.key_of(row) in done]
        wanted = [run for run in wanted if matrix.key_of(run.about()) not in done]
        write_text(options.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    failed, start = 0, time.monotonic()
    for number, row in enumerate(matrix.rows(wanted, kept), 1):
        failed += not row["passed"]
        if options.out:
            append(
                options.out, row | {"machine": {k: machine("cpu")[k] for k in ("triton", "torch", "commit")}}
            )
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
    parser = argparse.ArgumentParser(prog="python -m bench.ptx", description=__doc__)
    commands = parser.add_subparsers(required=True)
    matrix = commands.add_parser(
        "matrix",
        help="check every kernel at every branch of its launch rules",
        description="Execute every case in every dtype on every architecture and judge it by the numerics rule.",
    )
    matrix.add_argument("--sample", action="store_true", help="run the sample of continuous integration only")
    matrix.add_argument(
        "--architectures", type=int, nargs="+", default=(89, 90, 120, 80, 86), choices=ARCHITECTURES
    )
    matrix.add_argument(
        "--dtypes", nargs="+", default=("bf16", "fp16", "fp32"), choices=("bf16", "fp16", "fp32")
    )
    matrix.add_argument(
        "--orders", nargs="+", default=("together",), choices=("together", "forward", "reversed"),
        help="order of the warps of a block between barriers",
    )  # fmt: skip
    matrix.add_argument(
        "--only", default="", metavar="TEXT", help="run cases whose kind and name contain TEXT"
    )
    matrix.add_argument("--out", type=Path, metavar="FILE", help="write rows to FILE as they come")
    matrix.add_argument("--resume", action="store_true", help="keep the rows of FILE that passed")
    matrix.set_defaults(run=_matrix)
    return parser


if __name__ == "__main__":
    sys.exit(main())
