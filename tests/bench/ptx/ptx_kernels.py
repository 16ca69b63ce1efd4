"""Small Triton kernels that resemble those of the package, and a PTX kernel whose body each test supplies."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from bench.ptx import Device
from bench.ptx.execution import Execution
from bench.ptx.memory import Allocation
from bench.ptx.program import program_of


@triton.jit
def add_kernel(x_ptr, y_ptr, z_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(z_ptr + i, tl.load(x_ptr + i, mask=mask) + tl.load(y_ptr + i, mask=mask), mask=mask)


@triton.jit
def product_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    M,
    N,
    K,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute C = A B. If LEFT is true, A is stored transposed. If RIGHT is true, B is stored transposed."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    rows, columns = (m < M)[:, None], (n < N)[None, :]
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = k < K
        if LEFT:
            at = k[:, None] * M + m[None, :]
            a = tl.trans(tl.load(a_ptr + at, mask=inside[:, None] & (m < M)[None, :], other=0.0))
        else:
            a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=rows & inside[None, :], other=0.0)
        if RIGHT:
            at = n[:, None] * K + k[None, :]
            b = tl.trans(tl.load(b_ptr + at, mask=(n < N)[:, None] & inside[None, :], other=0.0))
        else:
            b = tl.load(b_ptr + k[:, None] * N + n[None, :], mask=inside[:, None] & columns, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(c_ptr + m[:, None] * N + n[None, :], total, mask=rows & columns)


@triton.jit
def chain_kernel(
    a_ptr, b_ptr, c_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """Compute (A B) C for A (M, K), B (K, N), C (N, K). The left operand A B of the second product is in registers."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    c = tl.load(c_ptr + n[:, None] * K + k[None, :])
    first = tl.dot(a, b, input_precision=PRECISION)
    out = tl.dot(first.to(a.dtype), c, input_precision=PRECISION)
    tl.store(out_ptr + m[:, None] * K + k[None, :], out)


@triton.jit
def softmax_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + i, mask=i < n, other=-float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * n + i, e / tl.sum(e, 0), mask=i < n)


@triton.jit
def order_kernel(x_ptr, sorted_ptr, summed_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(sorted_ptr + i, tl.sort(x))
    tl.store(summed_ptr + i, tl.cumsum(x, 0))


@triton.jit
def collatz_kernel(x_ptr, steps_ptr):
    """Run a loop whose length differs between blocks."""
    i = tl.program_id(0)
    x = tl.load(x_ptr + i)
    steps = 0
    while x != 1:
        x = tl.where(x % 2 == 0, x // 2, 3 * x + 1)
        steps += 1
    tl.store(steps_ptr + i, steps)


@triton.jit
def off_by_one_kernel(x_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, 1.0, mask=i <= n)


@triton.jit
def large_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    """Multiply two fp32 matrices (SIZE, SIZE), which need 8 · SIZE² bytes of shared memory."""
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    at = i * SIZE + j
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="tf32"))


def faults(device: Device) -> list[str]:
    """Return the faults in all launches of the device as text. Reports of the kind "copies" are not faults."""
    return [str(report) for _, report in device.reports() if report.kind != "copies"]


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    precision: str,
    tile: tuple[int, int, int],
    left: bool,
    right: bool,
    **options: int,
) -> torch.Tensor:
    """Compute A B with `product_kernel`. With `left`, A is stored transposed. With `right`, B is stored transposed."""
    (M, K), N = a.shape, b.shape[1]
    c = torch.full((M, N), torch.nan)
    BM, BN, BK = tile
    product_kernel[(-(-M // BM), -(-N // BN))](
        a.T.contiguous() if left else a,
        b.T.contiguous() if right else b,
        c,
        M,
        N,
        K,
        LEFT=left,
        RIGHT=right,
        PRECISION=precision,
        BM=BM,
        BN=BN,
        BK=BK,
        **options,
    )
    return c


# The kernel has 64 threads. %r1 is the thread index, and %r4 is the address of the thread's word in shared memory. The
# last instruction stores %r7 to the thread's word of the output.
HEAD = """
.version 8.4
.target sm_89
.address_size 64
.visible .entry planted(.param .u64 .ptr .global .align 1 planted_param_0)
.reqntid 64
{
    .reg .pred %p<2>;
    .reg .b32 %r<16>;
    .reg .b64 %rd<4>;
    .shared .align 16 .b8 memory[256];
    ld.param.b64 %rd1, [planted_param_0];
    mov.u32 %r1, %tid.x;
    shl.b32 %r2, %r1, 2;
    mov.b32 %r3, memory;
    add.s32 %r4, %r3, %r2;
"""
TAIL = """
    cvt.u64.u32 %rd2, %r2;
    add.s64 %rd3, %rd1, %rd2;
    st.global.b32 [%rd3], %r7;
    ret;
}
"""


def planted(
    body: str, order: str = "together", out: torch.Tensor | None = None
) -> tuple[Execution, np.ndarray]:
    """Run a PTX kernel with this body in two warps; return the `Execution` and the 64 words of the output."""
    out = torch.zeros(64, dtype=torch.int32) if out is None else out
    return execute(HEAD + body + TAIL, out, warps=2, shared=256, order=order), out.numpy()


def execute(text: str, out: torch.Tensor, *, warps: int, shared: int, order: str = "together") -> Execution:
    """Run the PTX kernel `planted` of `text` in one block. The kernel's only parameter is the address of `out`."""
    address = out.data_ptr()
    allocation = Allocation(address, out.nbytes, "out")
    parameters = {"planted_param_0": address.to_bytes(8, "little")}
    return Execution(program_of(text), (1,), warps, parameters, [allocation], shared, order=order).run()


def kinds(execution: Execution) -> list[str]:
    """Return the kinds of all reports, sorted."""
    return sorted(report.kind for report in execution.reports.values())
