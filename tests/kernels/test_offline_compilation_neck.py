"""The neck's kernels compile for every architecture, without a GPU, and fit: as `bench.resources` tells."""

from __future__ import annotations

import pytest
from offline import compiled, misfits

from bench.resources import SHARED_LIMIT

pytest.importorskip("triton")
CASES = {80: 1, 86: 0, 89: 3, 90: 0, 120: 1}  # by architecture: the road without DyT and that with it
LARGEST = {80: (6, 7, 9), 120: (9,)}  # r·d of 128·64, 64·128, and in fp32 of 64·64, which must not spill
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
    "gelu_kernel",
    "logits_kernel",
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
def test_no_kernel_of_the_neck_spills_or_asks_for_too_much_shared_memory(architecture, tmp_path):
    case = CASES[architecture]
    rows = compiled(tmp_path, "neck", (case,), (architecture,))
    assert misfits(rows, SHARED_LIMIT[architecture]) == []
    assert {row["kernel"] for row in rows} == COMMON | ROADS[case] | (DYT if case else set())


@pytest.mark.parametrize("architecture", LARGEST)
def test_the_ends_and_the_backward_pass_fit_at_the_largest_sizes(architecture, tmp_path):
    kernels = "merge_links_kernel", "attention_backward_kernel"
    rows = compiled(tmp_path, "neck", LARGEST[architecture], (architecture,), kernels)
    assert len(rows) == 2 * len(LARGEST[architecture])
    assert misfits(rows, SHARED_LIMIT[architecture]) == []
