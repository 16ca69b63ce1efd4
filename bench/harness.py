"""Shared parts of the benchmarks: command-line options, inputs, timing and rows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.operators import DTYPES
from srm_kernels import backends
from srm_model.files import json_text, write_text
from srm_model.profiling import Effort, folder_name, machine
from srm_model.profiling.results import append

RESULTS = Path(__file__).resolve().parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Call = Callable[[], object]


class Recorder:
    """Append rows to `<out>/<gpu or cpu>/<name>.jsonl`, each with the machine and the note.

    Args:
        out: Folder of results.
        name: Name of the benchmark.
        device: Device that is measured.
        note: Text that is written into every row, or None.
    """

    def __init__(
        self, out: str | Path, name: str, device: torch.device | str, note: str | None = None
    ) -> None:
        self.machine, self.note = machine(device), note
        self.path = Path(out) / folder_name(self.machine) / f"{name}.jsonl"

    def write(self, row: dict[str, Any]) -> dict[str, Any]:
        """Append a row with the machine and the note; return the complete row."""
        row = {**row, "note": self.note, "machine": self.machine}
        append(self.path, row)
        return row


def machine_with_load(device: str) -> dict[str, Any]:
    """Return the description of the machine and its load average over one minute."""
    return {**machine(device), "load": round(os.getloadavg()[0], 1)}


def write_lines(path: Path | None, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines atomically; do nothing if `path` is None."""
    if path is not None:
        write_text(path, "".join(json_text(line) + "\n" for line in lines))


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m bench.<name>` that keeps the line breaks of the description."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def timing_parser(name: str, description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark that times calls and records rows.

    Args:
        name: Name of the benchmark.
        description: Description of the benchmark in `--help`.
        **defaults: Default values of options, where they differ from the common defaults.
    """
    usual = {
        "warmup": "50 on a GPU, 2 on a CPU",
        "repeats": "100 on a GPU, 10 on a CPU",
        "out": "bench/results",
    }
    shown = {option: f"(default: {value})" for option, value in (usual | defaults).items()}
    made = parser(name, description)
    made.add_argument("--device", default=DEVICE, help="measure on this device (default: %(default)s)")
    made.add_argument("--dtype", default="fp32", choices=tuple(DTYPES))
    made.add_argument("--warmup", type=int, help=f"run this many unmeasured calls {shown['warmup']}")
    made.add_argument("--repeats", type=int, help=f"measure at most this many calls {shown['repeats']}")
    made.add_argument(
        "--seconds",
        type=float,
        default=5.0,
        help="measure each point for about this long (default: %(default)s)",
    )
    made.add_argument("--note", help="keep this text in every row; the report shows it")
    made.add_argument(
        "--out", default=str(RESULTS), metavar="DIR", help=f"write rows to DIR/<gpu or cpu>/ {shown['out']}"
    )
    made.set_defaults(**defaults)
    return made


def effort_of(options: argparse.Namespace) -> Effort:
    """Return the number of warm-up calls, the number of measured calls and the time limit, as given by the options.

    If the option `warmup` or `repeats` is None, the default of the device is used.
    """
    return Effort.for_device(torch.device(options.device), options.warmup, options.repeats, options.seconds)


def available_backends() -> list[str]:
    """Return the names of the backends that can run here."""
    return [name for name, status in backends().items() if status.available]


def attention_inputs(
    shape: tuple[int, int],
    queries: int,
    keys: int,
    d: int,
    options: argparse.Namespace,
    *,
    gradients: bool = False,
) -> list[Tensor]:
    """Return standard normal Q, K and V. Equal arguments give equal tensors.

    Args:
        shape: (B, H).
        queries: N_q.
        keys: N_k.
        d: Width of a head.
        options: Options with `device` and `dtype`.
        gradients: Whether the tensors require gradients.

    Returns:
        Q (B, H, N_q, d), K and V (B, H, N_k, d).
    """
    generator = torch.Generator(options.device).manual_seed(0)
    drawn = (
        torch.randn(*shape, tokens, d, generator=generator, device=options.device)
        for tokens in (queries, keys, keys)
    )
    return [x.to(DTYPES[options.dtype]).requires_grad_(gradients) for x in drawn]
