"""The neck's kernels compile for every architecture, without a GPU, and fit: what `bench.neck_resources` exits by."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent.parent
CASES = {80: 1, 86: 0, 89: 1, 90: 0, 120: 5}  # by architecture: the road without DyT and that with it
KERNELS = {
    "forward_kernel",
    "gather_kernel",
    "backward_kernel",
    "keys_kernel",
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
    assert found == KERNELS | (DYT if case else set())
