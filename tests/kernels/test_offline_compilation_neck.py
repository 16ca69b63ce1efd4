"""The neck's kernels compile for every architecture, without a GPU, and fit: what `bench.neck_resources` exits by."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent.parent
CASES = {80: 1, 86: 0, 89: 3, 90: 0, 120: 1}  # by architecture: the road without DyT and that with it
COMMON = {
    "project_kernel",
    "attention_backward_kernel",
    "keys_kernel",
    "maps_backward_kernel",
    "merge_links_kernel",
    "tau_loss_kernel",
    "moments_kernel",
    "merge_kernel",
    "rms_backward_kernel",
    "norm_kernel",
    "fuse_kernel",
    "products_kernel",
    "fusion_backward_kernel",
    "losses_kernel",
    "losses_backward_kernel",
    "pool_kernel",
    "pool_backward_kernel",
}
ROADS = {
    0: {"absorb_kernel", "absorbed_kernel", "gather_kernel"},
    1: {"tokens_kernel", "gather_kernel"},
    3: {"tokens_kernel"},
}
DYT = {"dyt_kernel", "dyt_backward_kernel", "dyt_sum_kernel"}


@pytest.mark.parametrize("architecture", CASES)
def test_no_kernel_of_the_neck_spills_or_asks_for_too_much_shared_memory(architecture):
    case = CASES[architecture]
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = ["-m", "bench.neck_resources", "--architectures", str(architecture), "--cases", str(case)]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=env | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    found = {line.split()[0] for line in done.stdout.splitlines()[1:]}
    assert found == COMMON | ROADS[case] | (DYT if case else set())
