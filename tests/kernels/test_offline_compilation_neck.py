"""The neck's kernels compile for every architecture, without a GPU, and fit: as `bench.resources` tells."""

from __future__ import annotations

import pytest
from offline import compiled, misfits

from bench.resources import SHARED_LIMIT

pytest.importorskip("triton")
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
def test_no_kernel_of_the_neck_spills_or_asks_for_too_much_shared_memory(architecture, tmp_path):
    case = CASES[architecture]
    rows = compiled(tmp_path, "neck", (case,), (architecture,))
    assert misfits(rows, SHARED_LIMIT[architecture]) == []
    assert {row["kernel"] for row in rows} == KERNELS | (DYT if case else set())
