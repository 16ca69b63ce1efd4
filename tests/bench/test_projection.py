"""Occupancy against hand-worked cases, projections against their own arithmetic, and the word in every row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.projection import (
    CARDS,
    PROJECTION,
    Card,
    Work,
    kernel_table,
    main,
    neck_work,
    occupancy,
    project,
)
from srm_model import SRMConfig


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


def test_peaks_are_the_published_ones():
    """Dense bf16 tensor rate with fp32 accumulation, TFLOPS as the maker prints them: two a multiply-accumulate."""
    published = {"RTX 3090": 71, "RTX 4090": 165.2, "RTX 5090": 209.5}
    rates = {card.name: 2 * card.matrix_rate("bf16") / 1e12 for card in CARDS}
    for name, value in published.items():
        assert rates[name] == pytest.approx(value, rel=0.005)


def test_a_projection_is_its_own_arithmetic():
    card = Card("a card", 89, 100, 1.0, 1000)  # 25.6 TMAC/s, 1 TB/s
    moving = Work(
        macs=10**9, fused_bytes=10**9, apart_bytes=3 * 10**9, fused_launches=100, apart_launches=500
    )
    found = project(card, moving, "bf16", bandwidth_share=0.5, matrix_share=0.5, launch=1e-6)
    assert (found.best, found.fused, found.apart) == pytest.approx((1.0, 2.1, 6.5))
    assert found.bound == "bandwidth"
    computing = Work(256 * 10**9, 10**6, 10**6, 0, 0)
    found = project(card, computing, "bf16", bandwidth_share=0.5, matrix_share=0.5)
    assert (found.best, found.fused, found.apart) == pytest.approx((10, 20, 20))
    assert found.bound == "matrix rate"
    assert project(card, Work(1, 1, 1, 10, 10), "fp32").bound == "launches"


def test_the_work_of_a_neck():
    config = SRMConfig()
    channels = (64, 128, 320, 512)
    srm, quadratic, none = (
        neck_work(config, neck, channels, 512, 1, "bf16") for neck in ("srm", "quadratic", "none")
    )
    assert none.macs < srm.macs < quadratic.macs
    assert none.fused_bytes < srm.fused_bytes == quadratic.fused_bytes < srm.apart_bytes
    # the pyramid alone, in two bytes a value
    pyramid = 2 * (128 * 128 * 64 + 64 * 64 * 128 + 32 * 32 * 320 + 16 * 16 * 512)
    weights = 2 * (256 * (64 + 128 + 320 + 512) + 3 * 4 * 256 * 256)
    assert srm.fused_bytes == pyramid + weights + 2 * 256 * 8 * 8
    twice = neck_work(config, "srm", channels, 512, 2, "fp32")
    assert twice.macs == 2 * srm.macs
    assert 2 * srm.fused_bytes < twice.fused_bytes < 4 * srm.fused_bytes


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


def test_every_row_says_what_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    resources = tmp_path / "resources.jsonl"
    resources.write_text(json.dumps(ROW) + "\n")
    assert main(["--resources", str(resources), "--matrix-share", "0.3"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("RTX")]
    assert len(lines) == 3 * len(CARDS)
    assert all(line.endswith(PROJECTION) for line in lines)
    assert "30% of published dense tensor rate" in printed
    (line,) = (line for line in printed.splitlines() if "query_side" in line)
    # 128 registers leave room for 4 blocks, 50 KiB and the one that the driver keeps for one
    expected = "neck query_side 120 4 128 0 50.0 1 8 shared memory rank=64, dtype=bfloat16"
    assert line.split() == expected.split()


def test_shapes_at_which_a_kernel_is_the_same_are_one_line():
    other = ROW | {"case": {"rank": 32, "dtype": "float16"}}
    assert len(kernel_table([ROW, other])[1]) == 1
    assert len(kernel_table([ROW, other | {"registers": 129}])[1]) == 2


def test_rows_of_resources_that_lack_something_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match="lacks 'shared'"):
        kernel_table([{"kernel": "k", "registers": 1, "warps": 1, "architecture": 80}])
    assert main(["--resources", str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err
