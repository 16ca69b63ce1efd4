"""Theoretical occupancy against hand-worked cases, and the table of compiled kernels."""

from __future__ import annotations

import pytest

from bench.occupancy import kernel_table, occupancy


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "capability", "blocks", "share", "limit"),
    [
        # 32 registers × 32 threads = 1024 a warp, 16 of them in each quarter of the registers: all 64 warps
        (32, 0, 8, 80, 8, 1.0, "warps"),
        # 128 × 32 = 4096 a warp, 4 in a quarter: 16 warps, 4 blocks of 4
        (128, 0, 4, 86, 4, 16 / 48, "registers"),
        # 255 × 32 = 8160, rounded to 8192, 2 in a quarter: 8 warps, one block of 8
        (255, 0, 8, 90, 1, 8 / 64, "registers"),
        # 129 × 32 = 4128, rounded to 4352, 3 in a quarter: 12 warps, 3 blocks of 4
        (129, 0, 4, 89, 3, 12 / 48, "registers"),
        # the same 12 warps, not the 15 that undivided registers would hold: two blocks of 5
        (129, 0, 5, 89, 2, 10 / 48, "registers"),
        # 49 KiB and the KiB kept: two in 100 KiB; a byte more and there is one
        (32, 49 * 1024, 4, 89, 2, 8 / 48, "shared memory"),
        (32, 49 * 1024 + 1, 4, 120, 1, 4 / 48, "shared memory"),
        # a single block may have 99 KiB on a consumer card, 227 on an H100
        (32, 99 * 1024, 4, 86, 1, 4 / 48, "shared memory"),
        (32, 100 * 1024, 4, 86, 0, 0.0, "shared memory"),
        (32, 227 * 1024, 4, 90, 1, 4 / 64, "shared memory"),
        # small blocks: 16 of one warp on sm_86, 24 on sm_89
        (16, 0, 1, 86, 16, 16 / 48, "blocks"),
        (16, 0, 1, 89, 24, 24 / 48, "blocks"),
        # more than a thread may have
        (256, 0, 1, 80, 0, 0.0, "registers"),
        # a block that needs more registers than there are
        (255, 0, 16, 80, 0, 0.0, "registers"),
    ],
)
def test_occupancy(registers, shared, warps, capability, blocks, share, limit):
    found = occupancy(registers, shared, warps, capability)
    assert (found.blocks, found.share, found.limit) == (blocks, pytest.approx(share), limit)
    assert found.warps == blocks * warps


def test_occupancy_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="capability=75"):
        occupancy(32, 0, 4, 75)
    with pytest.raises(ValueError, match="warps=0"):
        occupancy(32, 0, 0, 80)


ROW = {
    "operator": "neck",
    "kernel": "query_side",
    "architecture": 120,
    "warps": 4,
    "registers": 128,
    "spilled": 0,
    "shared": 51_200,
    "case": {"rank": 64, "dtype": "bfloat16"},
}


def test_a_line_of_the_table():
    """128 registers leave room for 4 blocks; 50 KiB and the one that the driver keeps leave room for one."""
    header, (line,) = kernel_table([ROW])
    assert dict(zip(header, line, strict=True)) == {
        "operator": "neck", "kernel": "query_side", "sm": "120", "warps": "4", "registers": "128", "spilled B": "0",
        "shared KiB": "50.0", "blocks": "1", "occupancy %": "8", "limited by": "shared memory",
        "shape": "rank=64, dtype=bfloat16",
    }  # fmt: skip


def test_shapes_at_which_a_kernel_is_the_same_are_one_line():
    other = ROW | {"case": {"rank": 32, "dtype": "float16"}}
    assert len(kernel_table([ROW, other])[1]) == 1
    assert len(kernel_table([ROW, other | {"registers": 129}])[1]) == 2


def test_a_row_that_lacks_something_is_refused():
    with pytest.raises(ValueError, match="lacks 'shared'"):
        kernel_table([{"kernel": "k", "registers": 1, "warps": 1, "architecture": 80}])
