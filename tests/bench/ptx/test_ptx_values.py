"""Test on several emulated architectures that the results of small Triton kernels agree with PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import triton
from ptx_kernels import (
    add_kernel,
    chain_kernel,
    collatz_kernel,
    faults,
    order_kernel,
    planted,
    product,
    softmax_kernel,
)

from bench.ptx import emulated_device
from bench.ptx.arithmetic import saturate
from bench.ptx.parse import parse

ARCHITECTURES = (80, 86, 89, 90, 120)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# dtype, input_precision, tolerance relative to the largest entry
PRECISIONS = {
    "fp16": (torch.float16, "ieee", 2e-6),
    "bf16": (torch.bfloat16, "ieee", 2e-6),
    "tf32": (torch.float32, "tf32", 2e-3),
    "tf32x3": (torch.float32, "tf32x3", 2e-6),
    "fp32": (torch.float32, "ieee", 2e-6),
    "bf16x3": (torch.float32, "bf16x3", 1e-4),
}


@pytest.mark.parametrize(
    ("architecture", "dtype"), list(zip(ARCHITECTURES, (*DTYPES, *DTYPES[:2]), strict=True))
)
def test_masked_loads_and_stores(architecture, dtype):
    x, y = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype)
    z = torch.full_like(x, math.nan)
    with emulated_device(architecture) as device:
        add_kernel[(4,)](x, y, z, 1000, BLOCK=256)
    assert torch.equal(z, x + y)
    assert faults(device) == []


# Each precision is tested with each transposition. The architecture and the number of stages vary between these pairs.
PRODUCTS = [
    (name, left, right, ARCHITECTURES[(i + 2 * j) % 5], (1, 3)[(i + j) % 2])
    for i, name in enumerate(PRECISIONS)
    for j, (left, right) in enumerate(((False, False), (True, False), (False, True)))
]


@pytest.mark.parametrize(("name", "left", "right", "architecture", "stages"), PRODUCTS)
def test_products(name, left, right, architecture, stages):
    dtype, precision, tolerance = PRECISIONS[name]
    a, b = torch.randn(70, 112).to(dtype), torch.randn(112, 48).to(dtype)
    with emulated_device(architecture) as device:
        c = product(a, b, precision, (32, 32, 32), left, right, num_stages=stages)
    check_product(c, a, b, precision, tolerance)
    assert faults(device) == []
    instructions = device.launches[0].program.kernel.instructions
    assert name == "fp32" or "mma" in {ins.op[0] for ins in instructions}


@pytest.mark.parametrize("order", ["forward", "reversed"])
def test_warps_one_after_the_other_compute_the_same(order):
    a, b = torch.randn(70, 112).half(), torch.randn(112, 48).half()
    with emulated_device(89, order=order) as device:
        c = product(a, b, "ieee", (32, 32, 32), False, True, num_stages=3)
    check_product(c, a, b, "ieee", 2e-6)
    assert faults(device) == []


def check_product(c, a, b, precision, tolerance):
    exact = a.double() @ b.double()
    error = (c - exact).abs().max() / exact.abs().max()
    assert error <= tolerance
    assert precision != "tf32" or error >= 1e-5, "one pass must show the rounding of its operands"


# Triton before 3.7.1 emits no fence.proxy.async between cp.async and wgmma (triton-lang/triton, pull request 10537).
COPIES_ARE_FENCED = tuple(map(int, triton.__version__.split(".")[:3])) >= (3, 7, 1)
TILES = ((64, 32, 64, 4), (128, 64, 32, 4), (128, 128, 16, 8))  # BM, BN, BK, warps
WARPGROUPS = [
    (name, TILES[(i + j) % 3], bool(j & 1), bool(j & 2), (1, 3)[(i + j // 2) % 2])
    for i, name in enumerate(("fp16", "bf16", "tf32", "tf32x3"))
    for j in range(4)
]


@pytest.mark.parametrize(("name", "tile", "left", "right", "stages"), WARPGROUPS)
def test_products_of_warpgroups(name, tile, left, right, stages):
    dtype, precision, tolerance = PRECISIONS[name]
    a, b = torch.randn(70, 112).to(dtype), torch.randn(112, 130).to(dtype)
    with emulated_device(90) as device:
        c = product(a, b, precision, tile[:3], left, right, num_stages=stages, num_warps=tile[3])
    check_product(c, a, b, precision, tolerance)
    assert [fault for fault in faults(device) if COPIES_ARE_FENCED or not fault.startswith("proxy")] == []
    assert device.launches[0].program.wgmma


def test_warps_of_a_warpgroup_may_run_one_after_the_other():
    a, b = torch.randn(70, 112).half(), torch.randn(112, 130).half()
    with emulated_device(90, order="reversed") as device:
        c = product(a, b, "ieee", (128, 64, 32), False, False, num_stages=3, num_warps=4)
    check_product(c, a, b, "ieee", 2e-6)
    assert faults(device) == []


@pytest.mark.parametrize(
    ("name", "shape"),
    [("bf16", (64, 64, 32)), ("fp16", (128, 32, 64)), ("tf32", (64, 64, 32)), ("tf32x3", (64, 32, 64))],
)
def test_the_left_operand_of_wgmma_may_be_in_registers(name, shape):
    M, N, K = shape
    dtype, precision, _ = PRECISIONS[name]
    a, b, c = (torch.randn(s).to(dtype) for s in ((M, K), (K, N), (N, K)))
    out = torch.full((M, K), math.nan)
    with emulated_device(90) as device:
        chain_kernel[(1,)](a, b, c, out, M, N, K, PRECISION=precision)
    exact = (a.double() @ b.double()).to(dtype).double() @ c.double()
    assert (out - exact).abs().max() <= (2e-6 if name == "tf32x3" else 3e-3) * exact.abs().max()
    assert faults(device) == []
    instructions = device.launches[0].program.kernel.instructions
    assert any(isinstance(i.args[1], list) for i in instructions if i.op[:2] == ["wgmma", "mma_async"])


@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_reductions(architecture):
    x = torch.randn(5, 1000)
    y = torch.full_like(x, math.nan)
    with emulated_device(architecture) as device:
        softmax_kernel[(5,)](x, y, 1000, BLOCK=1024)
    assert torch.allclose(y, x.softmax(1), rtol=1e-5, atol=0)
    assert faults(device) == []


@pytest.mark.parametrize("architecture", [89, 90])
def test_sorting_and_scans(architecture):
    x = torch.randn(256)
    one, two = torch.empty(256), torch.empty(256)
    with emulated_device(architecture) as device:
        order_kernel[(1,)](x, one, two, BLOCK=256)
    assert torch.equal(one, x.sort().values)
    assert torch.allclose(two, x.cumsum(0), atol=1e-5)
    assert faults(device) == []


def test_loops_of_different_length():
    x = torch.arange(1, 60, dtype=torch.int32)
    steps = torch.zeros_like(x)
    with emulated_device(86) as device:
        collatz_kernel[(59,)](x, steps)

    def collatz(n: int) -> int:
        return 0 if n == 1 else 1 + collatz(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert steps.tolist() == [collatz(n) for n in range(1, 60)]
    assert faults(device) == []


def test_pairs_of_integers():
    body = "mad.lo.s32 %r5, %r1, 65535, 131070; add.s16x2 %r6, %r5, %r5; max.s16x2 %r7, %r6, %r5;"
    for thread, found in enumerate(planted(body)[1].view(np.int16).reshape(64, 2).tolist()):
        halves = np.array([65535 * thread + 131070], np.uint32).view(np.int16)
        assert found == np.maximum(halves + halves, halves).tolist()


def test_saturation_turns_nan_into_zero():
    """The PTX manual defines .sat in this way."""
    x = np.array([math.nan, -1, 0.25, 2, math.inf, -math.inf], np.float32)
    assert saturate(x).tolist() == [0, 0, 0.25, 1, 1, 0]


def test_a_local_array_in_a_body_is_no_source_line():
    kernel = parse(".visible .entry k()\n{\n.local .align 8 .b8 depot[16];\n.loc\t1 20 3\nret;\n}\n")
    assert (kernel.local, kernel.local_bytes) == ({"depot": 0}, 16)
    assert [ins.loc for ins in kernel.instructions] == [(1, 20)]
