"""Compile kernels without a GPU, in a separate process.

A process that has imported kernels under TRITON_INTERPRET cannot compile them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from srm_model.profiling.results import read

ROOT = Path(__file__).resolve().parent.parent.parent
COMPILED = ROOT / "bench/results/compiled/resources.jsonl"


def compiled(
    folder: Path,
    family: str,
    cases: tuple[int, ...],
    architectures: tuple[int, ...],
    kernels: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Return the rows that `bench.resources` writes for some shapes of a family.

    If `kernels` is not empty, only these kernels are compiled.
    """
    out = folder / "resources.jsonl"
    numbers = ["--cases", *map(str, cases), "--architectures", *map(str, architectures)]
    if kernels:
        numbers += ["--kernels", *kernels]
    run("-m", "bench.resources", "--families", family, *numbers, "--out", str(out))
    return read(out)


def run(*arguments: str) -> str:
    """Run Python with these arguments, without Triton's interpreter, and return its standard output."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=env | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout
