"""What the benchmarks share: where results go, common options, and the instruments of `srm_model.profiling`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # read when torch is loaded: the profiler tells of every start

import torch

from srm_kernels import backends
from srm_model.profiling import Effort, Times, machine, measure, measure_together
from srm_model.profiling.machines import folder_name, sentence
from srm_model.profiling.memory import is_out_of_memory, peak
from srm_model.profiling.results import append, latest, newest, one_machine, read

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Recorder:
    """Appends rows to `<out>/<gpu or cpu>/<name>.jsonl`, each with the machine beside its figures."""

    def __init__(self, out: str | Path, name: str, device: torch.device, note: str | None = None) -> None:
        self.machine, self.note = machine(device), note
        self.path = Path(out) / folder_name(self.machine) / f"{name}.jsonl"

    def write(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row as it was written."""
        row = {**row, "note": self.note, "machine": self.machine}
        append(self.path, row)
        return row


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark that writes rows."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", default="fp32", choices=tuple(DTYPES))
    made.add_argument("--warmup", type=int, help="default: 50 on a GPU, 2 on a CPU")
    made.add_argument("--repeats", type=int, help="default: 100 on a GPU, 10 on a CPU")
    made.add_argument("--seconds", type=float, default=5.0, help="of measured calls a point, about")
    made.add_argument(
        "--note", help="kept in every row, and told by the report: what a reader must know of this run"
    )
    made.add_argument("--out", default=str(RESULTS), help="folder of results (default: bench/results)")
    return made


def effort_of(options: argparse.Namespace) -> Effort:
    return Effort.for_device(torch.device(options.device), options.warmup, options.repeats, options.seconds)


def available_backends() -> list[str]:
    return [name for name, status in backends().items() if status.available]


Call = Callable[[], object]

__all__ = [
    "DTYPES",
    "RESULTS",
    "Call",
    "Effort",
    "Recorder",
    "Times",
    "append",
    "available_backends",
    "effort_of",
    "folder_name",
    "is_out_of_memory",
    "latest",
    "machine",
    "measure",
    "measure_together",
    "newest",
    "one_machine",
    "parser",
    "peak",
    "read",
    "sentence",
]
