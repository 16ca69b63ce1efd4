"""Test the instruction counts of kernels whose work is known, and the time bounds computed from these counts."""

from __future__ import annotations

import pytest
import torch
from ptx_kernels import product

from bench.ptx import emulated_device
from bench.ptx.bounds import bound
from bench.ptx.counting import by_place, ptx_counts, unit_of
from bench.ptx.rates import GPUS
from bench.ptx.sass import unit_of_opcode


def test_counts_of_a_product():
    M = N = K = 64
    a, b = torch.randn(M, K).half(), torch.randn(K, N).half()
    with emulated_device(89, count=True) as device:
        product(a, b, "ieee", (32, 32, 32), False, False, num_stages=1)
    (launch,) = device.launches
    counts = ptx_counts(launch)
    assert counts["mma m16n8k16 f16"] == M * N * K / (16 * 8 * 16)
    assert len(launch.counters.read) * 32 == 2 * M * K * 2
    assert len(launch.counters.written) * 32 == M * N * 4
    places = by_place(launch)
    assert sum(place["mma"] for place in places.values()) == counts["mma"]
    assert any("ptx_kernels.py" in place for place in places)
    for use_sass in (True, False):
        found = bound(launch, GPUS["RTX 4090"], batch=2, use_sass=use_sass)
        assert found["products"] == {"bf16": 2 * M * N * K}
        assert found["units"]["mma"] == 2 * counts["mma"]
        assert found["busy"]["mma"] == pytest.approx(2 * M * N * K / 256 / 128 / 2520)
        assert found["asked_bytes"] == 2 * (
            2 * 2 * M * K * 2 + M * N * 4
        )  # each operand is read by two blocks
        assert found["us"] >= max(found["busy"].values())


def test_counts_of_some_blocks_stand_for_the_grid():
    a, b = torch.randn(64, 64).half(), torch.randn(64, 64).half()
    counted = []
    for blocks in (None, lambda name, grid: [1, 2]):
        with emulated_device(89, count=True, blocks=blocks) as device:
            product(a, b, "ieee", (32, 32, 32), False, False, num_stages=1)
        counted.append(ptx_counts(device.launches[0]))
    assert counted[0] == counted[1]


def test_counts_of_a_product_of_warpgroups():
    M = N = K = 128
    a, b = torch.randn(M, K).half(), torch.randn(K, N).half()
    with emulated_device(90, count=True) as device:
        product(a, b, "ieee", (64, 64, 32), False, False, num_stages=1)
    assert ptx_counts(device.launches[0])["wgmma m64n64k16 f16"] == M * N * K / (64 * 64 * 16)
    assert bound(device.launches[0], GPUS["H100"], use_sass=False)["products"] == {"bf16": M * N * K}


@pytest.mark.parametrize(("warps", "repeated"), [(1, 1), (8, 4)])
def test_more_warps_than_the_tile_has_fragments_repeat_products(warps, repeated):
    a, b = torch.randn(16, 32).half(), torch.randn(32, 16).half()
    with emulated_device(89, count=True) as device:
        product(a, b, "ieee", (16, 16, 32), False, False, num_stages=1, num_warps=warps)
    found = bound(device.launches[0], GPUS["RTX 4090"], use_sass=False)
    assert found["repeated"] == repeated


@pytest.mark.parametrize(
    ("instruction", "unit"),
    [
        ("add.f32", "fp32"),
        ("fma.rn.f32", "fp32"),
        ("add.s32", "alu"),
        ("mad.lo.s32", "imad"),
        ("ex2.approx.ftz.f32", "xu"),
        ("cvt.rn.f32.s32", "xu"),
        ("cvt.rn.bf16x2.f32", "convert"),
        ("cvt.u64.u32", "alu"),
        ("ld.global.v4.b32", "global"),
        ("st.shared.v4.b32", "shared"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "shared"),
        ("cp.async.cg.shared.global", "global"),
        ("cp.async.commit_group", "other"),
        ("ld.param.b64", "other"),
        ("shfl.sync.bfly.b32", "shuffle"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", "mma"),
        ("wgmma.fence.sync.aligned", "other"),
        ("bar.sync", "barrier"),
        ("mov.b32", "move"),
    ],
)
def test_units_of_ptx(instruction, unit):
    assert unit_of(instruction.split(".")) == unit


@pytest.mark.parametrize(
    ("opcode", "unit"),
    [
        ("HMMA.16816.F32", "mma"),
        ("FFMA", "fp32"),
        ("IMAD.MOV.U32", "imad"),
        ("MUFU.EX2", "xu"),
        ("F2FP.BF16.F32.PACK_AB", "alu"),
        ("F2F.F64.F32", "xu"),
        ("LDGSTS.E.BYPASS.128", "global"),
        ("LDGDEPBAR", "barrier"),
        ("LDG.E.128", "global"),
        ("LDC", "other"),
        ("UIADD3", "other"),
        ("IADD3", "alu"),
    ],
)
def test_units_of_sass(opcode, unit):
    assert unit_of_opcode(opcode) == unit
