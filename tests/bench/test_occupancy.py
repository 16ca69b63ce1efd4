"""Test the theoretical occupancy against cases computed by hand, and the table of compiled kernels."""

from __future__ import annotations

import pytest

from bench.occupancy import kernel_table, occupancy


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "capability", "blocks", "share", "limit"),
    [
        # A warp needs 32 × 32 = 1024 registers. Each quarter of the register file holds 16 warps: all 64 warps fit.
        (32, 0, 8, 80, 8, 1.0, "warps"),
        # A warp needs 128 × 32 = 4096 registers. A quarter holds 4 warps: 16 warps fit, 4 blocks of 4.
        (128, 0, 4, 86, 4, 16 / 48, "registers"),
        # 255 × 32 = 8160 is rounded up to 8192. A quarter holds 2 warps: 8 warps fit, one block of 8.
        (255, 0, 8, 90, 1, 8 / 64, "registers"),
        # 129 × 32 = 4128 is rounded up to 4352. A quarter holds 3 warps: 12 warps fit, 3 blocks of 4.
        (129, 0, 4, 89, 3, 12 / 48, "registers"),
        # Again 12 warps fit: two blocks of 5. An undivided register file would hold 15 warps.
        (129, 0, 5, 89, 2, 10 / 48, "registers"),
        # A block needs 49 KiB and 1 KiB for the driver: two blocks fit in 100 KiB. With one byte more, one fits.
        (32, 49 * 1024, 4, 89, 2, 8 / 48, "shared memory"),
        (32, 49 * 1024 + 1, 4, 120, 1, 4 / 48, "shared memory"),
        # A block may use at most 99 KiB on a consumer GPU, and at most 227 KiB on an H100.
        (32, 99 * 1024, 4, 86, 1, 4 / 48, "shared memory"),
        (32, 100 * 1024, 4, 86, 0, 0.0, "shared memory"),
        (32, 227 * 1024, 4, 90, 1, 4 / 64, "shared memory"),
        # Small blocks of one warp: at most 16 blocks on sm_86, and at most 24 on sm_89.
        (16, 0, 1, 86, 16, 16 / 48, "blocks"),
        (16, 0, 1, 89, 24, 24 / 48, "blocks"),
        # A thread cannot have 256 registers.
        (256, 0, 1, 80, 0, 0.0, "registers"),
        # A block needs more registers than the register file has.
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
    """There are registers for 4 blocks, but shared memory for only one: a block needs 50 KiB, and the driver 1 KiB."""
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
