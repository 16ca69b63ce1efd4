"""Every kernel compiles for every architecture, without a GPU, and fits.

No spills up to r = d = 64, shared memory within what a block may ask for. `python -m bench.resources` prints more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent.parent
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
KERNELS = {
    "context_kernel",
    "gram_kernel",
    "scores_kernel",
    "largest_kernel",
    "mix_kernel",
    "solve_kernel",
    "system_backward_kernel",
    "landmarks_backward_kernel",
    "gathered_kernel",
    "tokens_backward_kernel",
    "forward_kernel",
    "statistics_kernel",
    "backward_kernel",
    "sum_kernel",
}


def compiled(architecture: int, cases: tuple[int, ...]) -> list[dict[str, Any]]:
    """In a process of its own: kernels that were imported under TRITON_INTERPRET cannot be compiled."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = ["-m", "bench.resources", "--json", "--architectures", str(architecture), "--cases"]
    done = subprocess.run(
        [sys.executable, *command, *map(str, cases)],
        capture_output=True,
        text=True,
        env=env | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("architecture", SHARED_KIB)
def test_every_kernel_compiles_without_spills_and_within_shared_memory(architecture):
    rows = compiled(architecture, (0, 1))
    assert {row["kernel"] for row in rows} == KERNELS
    assert all(row["rank"] == row["d"] == 64 for row in rows)
    spilled = [(row["kernel"], row["dtype"], row["spilled"]) for row in rows if row["spilled"]]
    assert spilled == []
    limit = SHARED_KIB[architecture] * 1024
    assert [(row["kernel"], row["dtype"], row["shared"]) for row in rows if row["shared"] > limit] == []
