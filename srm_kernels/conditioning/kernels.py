"""Triton kernels that solve the landmark system by elimination, one program per matrix (docs/METHOD.md §2.1).

A program holds A (R×R) and its right-hand side (R×D) in registers. R and D are r and d, rounded up to powers of two and
at least 16. A is padded with the identity, and the right-hand side is padded with zeros. Arithmetic is fp32.

For the solver `cholesky`, the kernels apply Gaussian elimination without pivoting to A = W + λI. As explained in
`reference`, A = E⁻¹ (S + λI) E, where S is symmetric and E is diagonal. Because E is diagonal, A and S + λI have the
same pivots. These pivots are the squares of the diagonal entries of the Cholesky factor of S + λI, so the Cholesky
factorisation exists if all pivots are positive. If a pivot is not positive or the logits are not symmetric, the kernel
solves the system by elimination with partial pivoting, as for the solver `lu`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..devices import MOST_REGISTERS, register_limit
from ..options import SolveOptions
from ..parts import INTERPRETED, on_device

LARGEST = 128  # r and d

# `Solver`
CHOLESKY: tl.constexpr = tl.constexpr(0)
LU: tl.constexpr = tl.constexpr(1)

EPS: tl.constexpr = tl.constexpr(1.1920929e-07)
SYMMETRY_TOLERANCE: tl.constexpr = tl.constexpr(1e-3)


def landmark_solve(logits: Tensor, rhs: Tensor, options: SolveOptions) -> tuple[Tensor, Tensor]:
    """Return X (…, r, d) in fp32 and the `Solver` (…,) of each matrix, for r, d ≤ 128 and inputs other than fp64."""
    a, g = _matrices(logits), _matrices(rhs)
    count, r, d = g.shape
    x = torch.empty(rhs.shape, dtype=torch.float32, device=rhs.device)
    used = torch.empty(rhs.shape[:-2], dtype=torch.int64, device=rhs.device)
    if count:
        with on_device(a):
            _solve_forward_kernel[(count,)](
                logits_ptr=a, rhs_ptr=g, x_ptr=x, used_ptr=used, r=r, d=d, ridge=options.ridge,
                **_strides(logits=a, rhs=g), RIDGED=options.ridge > 0, PIVOTING=options.solver == "lu",
                **launch_options(r, d),
            )  # fmt: skip
    return x, used


def landmark_solve_backward(
    grads: Sequence[Tensor],
    results: Sequence[Tensor],
    logits: Tensor,
    rhs: Tensor,
    options: SolveOptions,
) -> list[Tensor]:
    """Return the gradients of logits and rhs by implicit differentiation.

    `grads` has the gradient of X. `results` has X and the `Solver` of each matrix, as returned by `landmark_solve`.
    """
    (grad,) = grads
    x, used = results
    a, dx = _matrices(logits), _matrices(grad)
    count, r, d = dx.shape
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    d_rhs = torch.empty(rhs.shape, dtype=rhs.dtype, device=rhs.device)
    if count:
        with on_device(a):
            _solve_backward_kernel[(count,)](
                logits_ptr=a, x_ptr=x, used_ptr=used, dx_ptr=dx, d_logits_ptr=d_logits, d_rhs_ptr=d_rhs,
                r=r, d=d, ridge=options.ridge, **_strides(logits=a, dx=dx),
                SYMMETRIC=options.solver == "cholesky", RIDGED=options.ridge > 0, **launch_options(r, d),
            )  # fmt: skip
    return [d_logits, d_rhs]


def launch_options(r: int, d: int) -> dict[str, int]:
    """Return tile sizes, the number of warps, and the maximum number of registers per thread.

    Each thread holds at most 32 elements of the larger of the two tiles R×R and R×D. The maximum number of registers is
    set explicitly, because the kernels spill registers if ptxas chooses the number.
    """
    R, D = (max(16, triton.next_power_of_2(n)) for n in (r, d))
    warps = min(16, max(2, R * max(R, D) // 512))
    return {"R": R, "D": D, "num_warps": warps, **register_limit(MOST_REGISTERS if warps <= 8 else 128)}


def _strides(**matrices: Tensor) -> dict[str, int]:
    """Return the strides of matrices (batch, m, n), by the names of the kernels' parameters."""
    return {
        f"stride_{name}{axis}": stride
        for name, matrix in matrices.items()
        for axis, stride in zip(("", "_row", "_col"), matrix.stride(), strict=True)
    }


def _matrices(tensor: Tensor) -> Tensor:
    """Reshape a tensor (…, m, n) to (batch, m, n). Copy it if offsets within a matrix need more than 32 bits.

    In Triton's interpreter, the result is fp32, because bf16 and fp16 arithmetic is not reliable there.
    """
    flat = tensor.reshape(-1, *tensor.shape[-2:])
    if sum((n - 1) * stride for n, stride in zip(flat.shape[1:], flat.stride()[1:], strict=True)) >= 2**31:
        flat = flat.contiguous()
    return flat.float() if INTERPRETED else flat


@triton.jit
def _column(a, k, R: tl.constexpr):
    j = tl.arange(0, R)
    return tl.sum(tl.where(j[None, :] == k, a, 0.0), 1)


@triton.jit
def _row(a, k, R: tl.constexpr):
    i = tl.arange(0, R)
    return tl.sum(tl.where(i[:, None] == k, a, 0.0), 0)


@triton.jit
def _product(a, b, K: tl.constexpr):
    """Multiply `a` (M×K) by the transpose of `b` (N×K) in plain fp32, as a sum of K rank-one products.

    `tl.dot` is not used, because on whole tiles it would spill registers. With its default precision it would also
    round `a` and `b` to TF32.
    """
    c = _column(a, 0, K)[:, None] * _column(b, 0, K)[None, :]
    for k in range(1, K):
        c += _column(a, k, K)[:, None] * _column(b, k, K)[None, :]
    return c


@triton.jit
def _entry(vector, k, R: tl.constexpr):
    i = tl.arange(0, R)
    return tl.sum(tl.where(i == k, vector, 0.0), 0)


@triton.jit
def _softmax(logits_ptr, r, stride_row, stride_col, R: tl.constexpr, SYMMETRIC: tl.constexpr, half=True):
    """Return W, whether the logits are finite, and whether they are symmetric.

    If a logit is not finite, all logits are replaced by zeros before the softmax. With SYMMETRIC and `half`, W is the
    softmax of the symmetric part of the logits. Without SYMMETRIC, the symmetry is not checked, and the third result is
    True. To save registers, kernels do not keep W, but call this function wherever they need W. The loads are volatile;
    otherwise, the compiler would keep the logits in registers.
    """
    i = tl.arange(0, R)
    inside = (i[:, None] < r) & (i[None, :] < r)
    across = logits_ptr + i[:, None] * stride_row + i[None, :] * stride_col
    logit = tl.load(across, mask=inside, other=0.0, volatile=True).to(tl.float32)
    finite = tl.sum(tl.sum(tl.where(tl.abs(logit) < float("inf"), 0, 1), 1), 0) == 0
    logit = tl.where(finite, logit, 0.0)
    symmetric = True
    if SYMMETRIC:
        down = logits_ptr + i[None, :] * stride_row + i[:, None] * stride_col
        t = tl.load(down, mask=inside, other=0.0, volatile=True).to(tl.float32)
        t = tl.where(finite, t, 0.0)
        skew = tl.max(tl.max(tl.abs(logit - t), 1), 0)
        symmetric = skew <= (1.0 + tl.max(tl.max(tl.abs(logit), 1), 0)) * SYMMETRY_TOLERANCE
        logit = tl.where(half, 0.5 * (logit + t), logit)
    e = tl.where(
        inside, tl.exp(logit - tl.max(tl.where(i[None, :] < r, logit, float("-inf")), 1)[:, None]), 0.0
    )
    return tl.where(inside, e / tl.maximum(tl.sum(e, 1), 1e-37)[:, None], 0.0), finite, symmetric


@triton.jit
def _system(
    logits_ptr, r, stride_row, stride_col, ridge, R: tl.constexpr, SYMMETRIC: tl.constexpr, half=True
):
    """Return A = W + λI, padded with the identity.

    The function returns three values: A, whether the logits are finite, and whether they are symmetric (see
    `_softmax`).
    """
    W, finite, symmetric = _softmax(logits_ptr, r, stride_row, stride_col, R, SYMMETRIC, half)
    i = tl.arange(0, R)
    diagonal = i[:, None] == i[None, :]
    lam = ridge * tl.sum(tl.sum(tl.where(diagonal, W, 0.0), 1), 0) / r
    return W + tl.where(diagonal, tl.where(i < r, lam, 1.0)[:, None], 0.0), finite, symmetric


@triton.jit
def _load(ptr, r, d, stride_row, stride_col, R: tl.constexpr, D: tl.constexpr):
    i, c = tl.arange(0, R), tl.arange(0, D)
    inside = (i[:, None] < r) & (c[None, :] < d)
    at = ptr + i[:, None] * stride_row + c[None, :] * stride_col
    return tl.load(at, mask=inside, other=0.0, volatile=True).to(tl.float32)


@triton.jit
def _eliminate(a, b, r, R: tl.constexpr, PIVOTING: tl.constexpr):
    """Factorise P a = L U, and return U, L⁻¹ P b, the smallest pivot and the largest pivot.

    U is on and above the diagonal of the first returned matrix; the entries below the diagonal have no meaning. With
    PIVOTING, P is a permutation, and the two returned pivots are absolute values. Without PIVOTING, P is the identity,
    the returned pivots keep their sign, and a pivot that is NaN or +∞ counts as −1.
    """
    i = tl.arange(0, R)
    smallest = float("inf")
    largest = 0.0
    for k in range(R):
        column = _column(a, k, R)
        top = _row(a, k, R)
        b_top = _row(b, k, R)
        if PIVOTING:
            p = tl.argmax(tl.where(i >= k, tl.abs(column), -1.0), 0)
            picked = _row(a, p, R)
            b_picked = _row(b, p, R)
            a = tl.where(i[:, None] == p, top[None, :], a)
            b = tl.where(i[:, None] == p, b_top[None, :], b)
            a = tl.where(i[:, None] == k, picked[None, :], a)
            b = tl.where(i[:, None] == k, b_picked[None, :], b)
            first, pivot = _entry(column, k, R), _entry(column, p, R)
            column = tl.where(i == k, pivot, tl.where(i == p, first, column))
            top, b_top = picked, b_picked
            size = tl.abs(pivot)
        else:
            pivot = _entry(column, k, R)
            size = tl.where(pivot < float("inf"), pivot, -1.0)
        smallest = tl.where(k < r, tl.minimum(smallest, size), smallest)
        largest = tl.where(k < r, tl.maximum(largest, size), largest)
        factor = tl.where(i > k, column / pivot, 0.0)
        a = tl.where(i[None, :] > k, a - factor[:, None] * top[None, :], a)
        b = b - factor[:, None] * b_top[None, :]
    return a, b, smallest, largest


@triton.jit
def _back_substitute(lu, b, R: tl.constexpr):
    """Return U⁻¹ b."""
    i = tl.arange(0, R)
    for step in range(R):
        k = R - 1 - step
        column = _column(lu, k, R)
        x = _row(b, k, R) / _entry(column, k, R)
        b = tl.where(i[:, None] == k, x[None, :], b)
        b = tl.where(i[:, None] < k, b - column[:, None] * x[None, :], b)
    return b


@triton.jit
def _solve_forward_kernel(
    logits_ptr, rhs_ptr, x_ptr, used_ptr, r, d, ridge, stride_logits, stride_logits_row, stride_logits_col,
    stride_rhs, stride_rhs_row, stride_rhs_col, RIDGED: tl.constexpr, PIVOTING: tl.constexpr, R: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Compute X and the `Solver` of one matrix; the tensors at `x_ptr` and `used_ptr` are contiguous.

    Without PIVOTING, the kernel first computes A from the symmetric part of the logits, and factorises A without
    pivoting. This attempt fails if a pivot is not positive or the logits are not symmetric. After a failure or with
    PIVOTING, the kernel computes A from the logits, and factorises A with pivoting.
    """
    matrix = tl.program_id(0).to(tl.int64)
    logits_ptr += matrix * stride_logits
    rhs_ptr += matrix * stride_rhs
    x_ptr += matrix * r * d
    _W, finite, _symmetric = _softmax(logits_ptr, r, stride_logits_row, stride_logits_col, R, False)
    used = tl.full((), LU, tl.int64)
    done = False
    lu = tl.zeros([R, R], tl.float32)
    b = tl.zeros([R, D], tl.float32)
    regular = True
    if not PIVOTING:
        A, _finite, symmetric = _system(logits_ptr, r, stride_logits_row, stride_logits_col, ridge, R, True)
        g = _load(rhs_ptr, r, d, stride_rhs_row, stride_rhs_col, R, D)
        lu, b, smallest, _largest = _eliminate(A, g, r, R, False)
        done = symmetric & (smallest > 0)
        used = tl.where(done, CHOLESKY, used)
    if not done:
        A, _finite, _symmetric = _system(logits_ptr, r, stride_logits_row, stride_logits_col, ridge, R, False)
        g = _load(rhs_ptr, r, d, stride_rhs_row, stride_rhs_col, R, D)
        lu, b, smallest, largest = _eliminate(A, g, r, R, True)
        if not RIDGED:
            # Rounding leaves a small last pivot in a singular matrix. Without this check, the solution looks valid.
            regular = smallest > r * EPS * largest
    i, c = tl.arange(0, R), tl.arange(0, D)
    x = tl.where(finite & regular, _back_substitute(lu, b, R), float("nan"))
    tl.store(x_ptr + i[:, None] * d + c[None, :], x, mask=(i[:, None] < r) & (c[None, :] < d))
    tl.store(used_ptr + matrix, used)


@triton.jit
def _solve_backward_kernel(
    logits_ptr, x_ptr, used_ptr, dx_ptr, d_logits_ptr, d_rhs_ptr, r, d, ridge, stride_logits, stride_logits_row,
    stride_logits_col, stride_dx, stride_dx_row, stride_dx_col, SYMMETRIC: tl.constexpr, RIDGED: tl.constexpr,
    R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the logits and right-hand side of one matrix; zeros if a logit is not finite.

    The kernel solves a system with Aᵀ, where A is the matrix of the forward pass. If the forward pass used `cholesky`
    for this matrix, A is computed from the symmetric part of the logits, and Aᵀ is factorised without pivoting. If the
    forward pass used `lu`, A is computed from the logits, and Aᵀ is factorised with pivoting. If the factorisation
    without pivoting fails, it is repeated with pivoting.
    """
    matrix = tl.program_id(0).to(tl.int64)
    logits_ptr += matrix * stride_logits
    dx_ptr += matrix * stride_dx
    x_ptr += matrix * r * d
    half = tl.load(used_ptr + matrix) == CHOLESKY
    A, finite, _symmetric = _system(
        logits_ptr, r, stride_logits_row, stride_logits_col, ridge, R, SYMMETRIC, half
    )
    dx = _load(dx_ptr, r, d, stride_dx_row, stride_dx_col, R, D)
    d_g = tl.zeros([R, D], tl.float32)
    smallest = -1.0
    if SYMMETRIC:  # noqa: SIM102
        if half:
            lu, b, smallest, _largest = _eliminate(tl.trans(A), dx, r, R, False)
            d_g = _back_substitute(lu, b, R)
    if not smallest > 0:
        A, finite, _symmetric = _system(
            logits_ptr, r, stride_logits_row, stride_logits_col, ridge, R, SYMMETRIC, half
        )
        dx = _load(dx_ptr, r, d, stride_dx_row, stride_dx_col, R, D)
        lu, b, smallest, largest = _eliminate(tl.trans(A), dx, r, R, True)
        d_g = _back_substitute(lu, b, R)
        if not RIDGED:
            d_g = tl.where(smallest > r * EPS * largest, d_g, float("nan"))
    x = _load(x_ptr, r, d, d, 1, R, D)
    d_W = -_product(d_g, tl.where(finite, x, 0.0), D)
    i, c = tl.arange(0, R), tl.arange(0, D)
    square = (i[:, None] < r) & (i[None, :] < r)
    diagonal = i[:, None] == i[None, :]
    W, finite, _symmetric = _softmax(logits_ptr, r, stride_logits_row, stride_logits_col, R, SYMMETRIC, half)
    trace = tl.sum(tl.sum(tl.where(diagonal & square, d_W, 0.0), 1), 0)
    d_W = tl.where(square, d_W + tl.where(diagonal, ridge / r * trace, 0.0), 0.0)
    d_l = W * (d_W - tl.sum(d_W * W, 1)[:, None])
    if SYMMETRIC:
        d_l = tl.where(half, 0.5 * (d_l + tl.trans(d_l)), d_l)
    d_l = tl.where(finite, d_l, 0.0)
    d_rhs = tl.where(finite, d_g, 0.0)
    d_logits_ptr += matrix * r * r
    tl.store(d_logits_ptr + i[:, None] * r + i[None, :], d_l.to(d_logits_ptr.dtype.element_ty), mask=square)
    d_rhs_ptr += matrix * r * d
    inside = (i[:, None] < r) & (c[None, :] < d)
    tl.store(d_rhs_ptr + i[:, None] * d + c[None, :], d_rhs.to(d_rhs_ptr.dtype.element_ty), mask=inside)
