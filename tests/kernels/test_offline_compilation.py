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


# A case of `bench.resources`, and what is compiled of it for one architecture: kernels that spilled once, by other
# roads to the same sizes, and kernels over tiles above 64 that did not fit.
SMALL = {86: (2, "backward_kernel"), 120: (6, "landmarks_backward_kernel")}
LARGE = {
    86: (11, "forward_kernel", "pieces_backward_kernel", "landmarks_backward_kernel"),
    89: (12, "leverage_kernel"),
    120: (13, "queries_backward_kernel", "scores_kernel"),
}


def compiled(
    architecture: int, cases: tuple[int, ...], kernels: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """In a process of its own: kernels that were imported under TRITON_INTERPRET cannot be compiled."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = ["-m", "bench.resources", "--json", "--architectures", str(architecture), "--cases"]
    done = subprocess.run(
        [sys.executable, *command, *map(str, cases), *(("--kernels", *kernels) if kernels else ())],
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
    assert spilled(rows) == []
    assert oversized(rows, architecture) == []


@pytest.mark.parametrize("architecture", SMALL)
def test_other_roads_spill_nothing_either(architecture):
    case, *kernels = SMALL[architecture]
    rows = compiled(architecture, (case,), tuple(kernels))
    assert {row["kernel"] for row in rows} == set(kernels)
    assert spilled(rows) == []
    assert oversized(rows, architecture) == []


@pytest.mark.parametrize("architecture", LARGE)
def test_larger_tiles_fit_where_a_block_has_least(architecture):
    case, *kernels = LARGE[architecture]
    rows = compiled(architecture, (case,), tuple(kernels))
    assert {row["kernel"] for row in rows} == set(kernels)
    assert oversized(rows, architecture) == []


def spilled(rows: list[dict[str, Any]]) -> list[tuple[str, str, int]]:
    return [(row["kernel"], row["dtype"], row["spilled"]) for row in rows if row["spilled"]]


def oversized(rows: list[dict[str, Any]], architecture: int) -> list[tuple[str, str, int]]:
    limit = SHARED_KIB[architecture] * 1024
    return [(row["kernel"], row["dtype"], row["shared"]) for row in rows if row["shared"] > limit]
