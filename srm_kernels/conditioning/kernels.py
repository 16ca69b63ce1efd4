"""The landmark solve, one program per matrix, forward and backward (SPEC 2.1).

A program holds A (R×R) and its right-hand side (R×D) in registers, R and D being r and d rounded up to powers of two;
what lies beyond r and d is the identity and zero. Everything is decided inside: breakdown and asymmetry of `cholesky`,
both gates of `neumann`, the condition estimate of `auto` and the rotations of `svd`. Arithmetic is fp32.

What the gate of `neumann` rejects, and what `auto` finds too ill-conditioned, is solved by a second launch, whose other
programs return at once: one kernel of two solvers would spill registers.

Without pivoting, elimination on A = W + λI has the pivots of the Cholesky factorisation of the similar symmetric
S + λI squared, so that form is `cholesky`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import SolveOptions
from ..parts import INTERPRETED, on_device

LARGEST = 128  # r and d

# `Solver`, and the codes of the solver asked for
CHOLESKY: tl.constexpr = tl.constexpr(0)
LU: tl.constexpr = tl.constexpr(1)
SVD: tl.constexpr = tl.constexpr(2)
NEUMANN: tl.constexpr = tl.constexpr(3)
AUTO: tl.constexpr = tl.constexpr(4)
OPEN: tl.constexpr = tl.constexpr(-1)  # a matrix for the next launch to solve

EPS: tl.constexpr = tl.constexpr(1.1920929e-07)
EQUILIBRATION_FLOOR: tl.constexpr = tl.constexpr(1e-12)
SYMMETRY_TOLERANCE: tl.constexpr = tl.constexpr(1e-3)
POWER_ITERATIONS: tl.constexpr = tl.constexpr(20)
RADIUS_LIMIT: tl.constexpr = tl.constexpr(0.95)
RESIDUAL_LIMIT: tl.constexpr = tl.constexpr(1e-2)
PROBES: tl.constexpr = tl.constexpr(16)  # the portable path has 8
POWER_STEPS: tl.constexpr = tl.constexpr(8)
SWEEPS: tl.constexpr = tl.constexpr(20)


def landmark_solve(logits: Tensor, rhs: Tensor, options: SolveOptions) -> tuple[Tensor, Tensor]:
    """X (…, r, d) fp32 and the `Solver` (…,) that served each matrix; r, d ≤ 128, no fp64."""
    a, g = _matrices(logits), _matrices(rhs)
    count, r, d = g.shape
    x = torch.empty(rhs.shape, dtype=torch.float32, device=rhs.device)
    used = torch.empty(rhs.shape[:-2], dtype=torch.int64, device=rhs.device)
    default = "cholesky" if options.ridge > 0 else "lu"
    second = {"neumann": default if options.neumann_gate else None, "auto": "svd"}.get(options.solver)
    with on_device(a):
        for stage in (options.solver, second) if count else ():
            if stage is not None:
                _solve_forward_kernel[(count,)](
                    logits_ptr=a, rhs_ptr=g, x_ptr=x, used_ptr=used, r=r, d=d, kappa_max=options.kappa_max,
                    **_strides(logits=a, rhs=g), SOLVER=_code(stage), REST=stage != options.solver,
                    GATE=options.neumann_gate, **_form(options), **launch_options(r, d),
                )  # fmt: skip
    return x, used


def landmark_solve_backward(
    grads: Sequence[Tensor],
    results: Sequence[Tensor],
    logits: Tensor,
    rhs: Tensor,
    options: SolveOptions,
) -> list[Tensor]:
    """Gradients of logits and rhs by the implicit formula, through the polynomial where `neumann` served.

    X and who served each matrix are the forward pass's: nothing is decided again.
    """
    (grad,) = grads
    x, used = results
    a, g, dx = _matrices(logits), _matrices(rhs), _matrices(grad)
    count, r, d = g.shape
    d_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    d_rhs = torch.empty(rhs.shape, dtype=rhs.dtype, device=rhs.device)
    solver = options.solver
    forms = {"neumann": (True, False) if options.neumann_gate else (True,)}.get(solver, (False,))
    with on_device(a):
        for series in forms if count else ():
            _solve_backward_kernel[(count,)](
                logits_ptr=a, rhs_ptr=g, x_ptr=x, used_ptr=used, dx_ptr=dx, d_logits_ptr=d_logits,
                d_rhs_ptr=d_rhs, r=r, d=d, **_strides(logits=a, rhs=g, dx=dx), SERIES=series,
                SYMMETRIC=not series and solver in ("cholesky", "neumann") and options.ridge > 0,
                **_form(options), **launch_options(r, d),
            )  # fmt: skip
    return [d_logits, d_rhs]


def launch_options(r: int, d: int) -> dict[str, int]:
    """Tile sizes and warps, 16 to 64 numbers of a tile a thread; ptxas would stop at 128 registers, and spill."""
    R, D = (max(16, triton.next_power_of_2(n)) for n in (r, d))
    warps = min(16, max(2, R * max(R, D) // 512))
    return {"R": R, "D": D, "num_warps": warps, "maxnreg": 255 if warps <= 8 else 128}


def _form(options: SolveOptions) -> dict[str, Any]:
    """The ridge, and what else both directions are compiled for."""
    return {
        "ridge": options.ridge,
        "RIDGED": options.ridge > 0,
        "EQUILIBRATE": options.equilibrate,
        "ORDER": options.neumann_order,
    }


def _strides(**matrices: Tensor) -> dict[str, int]:
    """Strides of (batch, m, n) as the kernels name them."""
    return {
        f"stride_{name}{axis}": stride
        for name, matrix in matrices.items()
        for axis, stride in zip(("", "_row", "_col"), matrix.stride(), strict=True)
    }


def _code(solver: str) -> int:
    codes = {"cholesky": CHOLESKY, "lu": LU, "svd": SVD, "neumann": NEUMANN, "auto": AUTO}
    return int(codes[solver].value)


def _matrices(tensor: Tensor) -> Tensor:
    """(…, m, n) as (batch, m, n), each within reach of 32 bits, else copied.

    The interpreter gets fp32: its bf16 and fp16 arithmetic is not reliable.
    """
    flat = tensor.reshape(-1, *tensor.shape[-2:])
    if sum((n - 1) * stride for n, stride in zip(flat.shape[1:], flat.stride()[1:], strict=True)) >= 2**31:
        flat = flat.contiguous()
    return flat.float() if INTERPRETED else flat


@triton.jit
def _norm(tile):
    return tl.sqrt(tl.sum(tl.sum(tile * tile, 1), 0))


@triton.jit
def _column(a, k, R: tl.constexpr):
    """Column k of a tile, as a vector of its rows."""
    j = tl.arange(0, R)
    return tl.sum(tl.where(j[None, :] == k, a, 0.0), 1)


@triton.jit
def _row(a, k, R: tl.constexpr):
    """Row k of a tile, as a vector of its columns."""
    i = tl.arange(0, R)
    return tl.sum(tl.where(i[:, None] == k, a, 0.0), 0)


@triton.jit
def _product(a, b, K: tl.constexpr, A_MT: tl.constexpr = False, B_MT: tl.constexpr = False):
    """a (M×K) times b (K×N) in plain fp32, either given as its transpose, a rank-one update a step as in elimination.

    A dot product of whole tiles spills, and rounds to TF32 unless it is told not to.
    """
    first = _row(a, 0, K) if A_MT else _column(a, 0, K)
    second = _column(b, 0, K) if B_MT else _row(b, 0, K)
    c = first[:, None] * second[None, :]
    for k in range(1, K):
        first = _row(a, k, K) if A_MT else _column(a, k, K)
        second = _column(b, k, K) if B_MT else _row(b, k, K)
        c += first[:, None] * second[None, :]
    return c


@triton.jit
def _entry(vector, k, R: tl.constexpr):
    i = tl.arange(0, R)
    return tl.sum(tl.where(i == k, vector, 0.0), 0)


@triton.jit
def _softmax(logits_ptr, r, stride_row, stride_col, R: tl.constexpr, SYMMETRIC: tl.constexpr, half=True):
    """W and whether its logits are finite, as zero where they are not; whether they are symmetric.

    With SYMMETRIC, W is that of their symmetric part, where `half` holds.
    Logits are read anew wherever W is needed again: registers are dearer. A volatile read keeps the compiler
    from keeping it all the same.
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
def _scales(W, R: tl.constexpr, EQUILIBRATE: tl.constexpr):
    """The diagonals of D_r and D_c, ones where not equilibrated."""
    if EQUILIBRATE:
        left = tl.rsqrt(tl.sqrt(tl.sum(W * W, 1)) + EQUILIBRATION_FLOOR)
        right = tl.rsqrt(tl.sqrt(tl.sum(W * W, 0)) + EQUILIBRATION_FLOOR)
    else:
        left = tl.full([R], 1.0, tl.float32)
        right = tl.full([R], 1.0, tl.float32)
    return left, right


@triton.jit
def _system(
    logits_ptr,
    r,
    stride_row,
    stride_col,
    ridge,
    R: tl.constexpr,
    EQUILIBRATE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    half=True,
):
    """A = W̃ + λI, the identity beyond r; λ; the diagonals of D_r and D_c as columns; finite; symmetric."""
    W, finite, symmetric = _softmax(logits_ptr, r, stride_row, stride_col, R, SYMMETRIC, half)
    left, right = _scales(W, R, EQUILIBRATE)
    A = left[:, None] * W * right[None, :]
    i = tl.arange(0, R)
    diagonal = i[:, None] == i[None, :]
    lam = ridge * tl.sum(tl.sum(tl.where(diagonal, A, 0.0), 1), 0) / r
    A += tl.where(diagonal, tl.where(i < r, lam, 1.0)[:, None], 0.0)
    return A, lam, left, tl.sum(tl.where(diagonal, right[None, :], 0.0), 1), finite, symmetric


@triton.jit
def _load(ptr, r, d, stride_row, stride_col, R: tl.constexpr, D: tl.constexpr):
    i, c = tl.arange(0, R), tl.arange(0, D)
    inside = (i[:, None] < r) & (c[None, :] < d)
    at = ptr + i[:, None] * stride_row + c[None, :] * stride_col
    return tl.load(at, mask=inside, other=0.0, volatile=True).to(tl.float32)


@triton.jit
def _eliminate(a, b, r, R: tl.constexpr, PIVOTING: tl.constexpr):
    """L and U in one tile, b → L⁻¹ P b, the order P of the rows, the smallest and the largest pivot.

    Without pivoting the smallest keeps its sign, and is −1 where any pivot is not finite.
    """
    i = tl.arange(0, R)
    order = tl.arange(0, R)
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
            at_k = tl.sum(tl.where(i == k, order, 0), 0)
            at_p = tl.sum(tl.where(i == p, order, 0), 0)
            order = tl.where(i == k, at_p, tl.where(i == p, at_k, order))
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
        a = tl.where((i[None, :] == k) & (i[:, None] > k), factor[:, None], a)
        b = b - factor[:, None] * b_top[None, :]
    return a, b, order, smallest, largest


@triton.jit
def _back_substitute(lu, b, R: tl.constexpr):
    """U⁻¹ b."""
    i = tl.arange(0, R)
    for step in range(R):
        k = R - 1 - step
        column = _column(lu, k, R)
        x = _row(b, k, R) / _entry(column, k, R)
        b = tl.where(i[:, None] == k, x[None, :], b)
        b = tl.where(i[:, None] < k, b - column[:, None] * x[None, :], b)
    return b


@triton.jit
def _forward_substitute(lu, b, R: tl.constexpr):
    """L⁻¹ b."""
    i = tl.arange(0, R)
    for k in range(R):
        factor = tl.where(i > k, _column(lu, k, R), 0.0)
        b = b - factor[:, None] * _row(b, k, R)[None, :]
    return b


@triton.jit
def _solve_transposed(lu, order, h, R: tl.constexpr):
    """A⁻ᵀ h from P A = L U: Uᵀ, then Lᵀ, then the rows back in their places."""
    i = tl.arange(0, R)
    t = tl.trans(lu)
    for k in range(R):
        column = _column(t, k, R)
        y = _row(h, k, R) / _entry(column, k, R)
        h = tl.where(i[:, None] == k, y[None, :], h)
        h = tl.where(i[:, None] > k, h - column[:, None] * y[None, :], h)
    for step in range(R):
        k = R - 1 - step
        column = tl.where(i < k, _column(t, k, R), 0.0)
        h = h - column[:, None] * _row(h, k, R)[None, :]
    place = tl.sum(tl.where(i[:, None] == order[None, :], i[None, :], 0), 1)
    return tl.gather(h, tl.broadcast_to(place[:, None], h.shape), 0)


@triton.jit
def _hash(x):
    """MurmurHash3's finaliser."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _unit_columns(u):
    return u / tl.maximum(tl.sqrt(tl.sum(u * u, 0)), 1e-37)[None, :]


@triton.jit
def _inverse_growth(lu, order, r, R: tl.constexpr):
    """1/σ_min from below, as `estimate_condition` has it, from 16 normal probes."""
    i = tl.arange(0, R)
    p = tl.arange(0, PROBES)
    counter = (i[:, None] * PROBES + p[None, :] + 1).to(tl.uint32)
    radius = (_hash(counter).to(tl.float32) + 0.5) * 2.3283064e-10
    # cos(2πt) = 1 − 2 sin²(πt) by four terms; tl.cos keeps a table on the stack for angles that do not occur.
    angle = (_hash(counter + R * PROBES).to(tl.float32) * 2.3283064e-10 - 0.5) * 3.1415927
    square = angle * angle
    sine = angle * (1.0 - square * (0.16666667 - square * (0.0083333333 - square * 0.0001984127)))
    u = tl.sqrt(-2.0 * tl.log(tl.minimum(radius, 1.0))) * (1.0 - 2.0 * sine * sine)
    u = _unit_columns(tl.where(i[:, None] < r, u, 0.0))
    rows = tl.broadcast_to(order[:, None], [R, PROBES])
    u = _forward_substitute(lu, tl.gather(u, rows, 0), R)
    u = _unit_columns(_back_substitute(lu, u, R))
    u = _unit_columns(_solve_transposed(lu, order, u, R))
    u = _forward_substitute(lu, tl.gather(u, rows, 0), R)
    u = _back_substitute(lu, u, R)
    return tl.max(tl.sqrt(tl.sum(u * u, 0)), 0)


@triton.jit
def _growth(A, r, R: tl.constexpr):
    """σ_max from below, as `estimate_condition` has it; beyond r A is the identity, which v does not meet."""
    i = tl.arange(0, R)
    v = tl.where(i < r, tl.rsqrt(r * 1.0), 0.0)
    growth = 1.0
    for _ in range(POWER_STEPS // 2):
        v = tl.sum(A * v[None, :], 1)
        v = v / tl.sqrt(tl.sum(v * v, 0))
        v = tl.sum(A * v[:, None], 0)
        growth = tl.sqrt(tl.sum(v * v, 0))
        v = v / growth
    return growth


@triton.jit
def _spectral_radius(A, alpha, r, R: tl.constexpr):
    """Of I − αA, by power iterations from seeded signs less their mean."""
    i = tl.arange(0, R)
    hashed = (i + 1).to(tl.uint32) * 2654435761
    signs = tl.where(((hashed >> 15) & 1) == 1, -1.0, 1.0)
    v = tl.where(i < r, signs - tl.sum(tl.where(i < r, signs, 0.0), 0) / r, 0.0)
    radius = 0.0
    for _ in range(POWER_ITERATIONS):
        v = v / tl.maximum(tl.sqrt(tl.sum(v * v, 0)), 1.1754944e-38)
        v = tl.where(i < r, v - alpha * tl.sum(A * v[None, :], 1), 0.0)
        radius = tl.sqrt(tl.sum(v * v, 0))
    return radius


@triton.jit
def _series(A, g, alpha, terms, R: tl.constexpr, A_MT: tl.constexpr = False):
    """α Σ_{k=0..terms} (I − αA)^k g, or of Aᵀ, by Horner's rule."""
    z = alpha * g
    for _ in range(terms):
        z = z - alpha * _product(A, z, R, A_MT=A_MT) + alpha * g
    return z


@triton.jit
def _series_accepted(A, g, z, alpha, r, R: tl.constexpr):
    residual = _norm(_product(A, z, R) - g) / (_norm(g) + 1e-12)
    return (_spectral_radius(A, alpha, r, R) < RADIUS_LIMIT) & (residual < RESIDUAL_LIMIT)


@triton.jit
def _halves(tile, R: tl.constexpr, C: tl.constexpr):
    """The upper and the lower half of a tile's rows, (R/2, C) each."""
    return tl.split(tl.permute(tl.reshape(tile, [2, R // 2, C]), (1, 2, 0)))


@triton.jit
def _next_pairs(top, bottom, H: tl.constexpr, C: tl.constexpr):
    """A step of the round-robin tournament: the first row stays, all others move on by one place."""
    i = tl.arange(0, H)
    before = tl.broadcast_to(tl.maximum(i - 1, 0)[:, None], [H, C])
    after = tl.broadcast_to(tl.minimum(i + 1, H - 1)[:, None], [H, C])
    moved = tl.where(i[:, None] == 1, tl.gather(bottom, before, 0), tl.gather(top, before, 0))
    return (
        tl.where(i[:, None] == 0, top, moved),
        tl.where(i[:, None] == H - 1, top, tl.gather(bottom, after, 0)),
    )


@triton.jit
def _pseudo_inverse(A, g, r, R: tl.constexpr, D: tl.constexpr, RIDGED: tl.constexpr):
    """A⁺ g by one-sided Jacobi rotations of the rows of [A | g] until those of A are orthogonal.

    Then A is Σ Vᵀ and g is Uᵀ g. Without a ridge σ ≤ r·eps·σ_max is dropped.
    """
    H: tl.constexpr = R // 2
    i = tl.arange(0, R)
    top, bottom = _halves(tl.where((i[:, None] < r) & (i[None, :] < r), A, 0.0), R, R)
    g_top, g_bottom = _halves(g, R, D)
    sweep = 0
    widest = 1.0  # the largest cosine between two rows that the last sweep met
    while (sweep < SWEEPS) & (widest > 1e-5):
        widest = 0.0
        for _ in range(R - 1):
            aa = tl.sum(top * top, 1)
            bb = tl.sum(bottom * bottom, 1)
            ab = tl.sum(top * bottom, 1)
            cosine = tl.abs(ab) / tl.sqrt(tl.maximum(aa * bb, 1e-37))
            turn = cosine > EPS
            zeta = (bb - aa) / (2.0 * tl.where(turn, ab, 1.0))
            tangent = tl.where(zeta < 0, -1.0, 1.0) / (tl.abs(zeta) + tl.sqrt(1.0 + zeta * zeta))
            tangent = tl.where(turn, tangent, 0.0)
            c = (1.0 / tl.sqrt(1.0 + tangent * tangent))[:, None]
            s = c * tangent[:, None]
            top, bottom = c * top - s * bottom, s * top + c * bottom
            g_top, g_bottom = c * g_top - s * g_bottom, s * g_top + c * g_bottom
            top, bottom = _next_pairs(top, bottom, H, R)
            g_top, g_bottom = _next_pairs(g_top, g_bottom, H, D)
            widest = tl.maximum(widest, tl.max(cosine, 0))
        sweep += 1
    squares_top, squares_bottom = tl.sum(top * top, 1), tl.sum(bottom * bottom, 1)
    limit = 0.0
    if not RIDGED:
        largest = tl.maximum(tl.max(squares_top, 0), tl.max(squares_bottom, 0))
        limit = r * EPS * r * EPS * largest
    inverse_top = tl.where(squares_top > limit, 1.0 / squares_top, 0.0)
    inverse_bottom = tl.where(squares_bottom > limit, 1.0 / squares_bottom, 0.0)
    x = _product(top, inverse_top[:, None] * g_top, H, A_MT=True)
    return x + _product(bottom, inverse_bottom[:, None] * g_bottom, H, A_MT=True)


@triton.jit
def _factored(
    logits_ptr,
    g_ptr,
    r,
    d,
    stride_row,
    stride_col,
    stride_g_row,
    stride_g_col,
    ridge,
    R: tl.constexpr,
    D: tl.constexpr,
    RIDGED: tl.constexpr,
    EQUILIBRATE: tl.constexpr,
    PIVOTING: tl.constexpr,
):
    """L U, L⁻¹ P D_r g, P, D_c, the `Solver`, and whether A is regular.

    Without `PIVOTING` the symmetric part is tried first; where it breaks down, pivoting has the logits as they are.
    """
    used = tl.full((), LU, tl.int64)
    done = False
    lu = tl.zeros([R, R], tl.float32)
    b = tl.zeros([R, D], tl.float32)
    order = tl.arange(0, R)
    right = tl.full([R], 1.0, tl.float32)
    regular = True
    if RIDGED and not PIVOTING:
        A, _, left, right, _, symmetric = _system(
            logits_ptr, r, stride_row, stride_col, ridge, R, EQUILIBRATE, True
        )
        g = _load(g_ptr, r, d, stride_g_row, stride_g_col, R, D)
        lu, b, order, smallest, largest = _eliminate(A, left[:, None] * g, r, R, False)
        done = symmetric & (smallest > 0)
        used = tl.where(done, CHOLESKY, used)
    if not done:
        A, _, left, right, _, _ = _system(logits_ptr, r, stride_row, stride_col, ridge, R, EQUILIBRATE, False)
        g = _load(g_ptr, r, d, stride_g_row, stride_g_col, R, D)
        lu, b, order, smallest, largest = _eliminate(A, left[:, None] * g, r, R, True)
        if not RIDGED:
            # A singular matrix leaves a last pivot of rounding size, and a solution that looks like one.
            regular = smallest > r * EPS * largest
    return lu, b, order, right, used, regular


@triton.jit
def _solve_forward_kernel(
    logits_ptr,
    rhs_ptr,
    x_ptr,
    used_ptr,
    r,
    d,
    ridge,
    kappa_max,
    stride_logits,
    stride_logits_row,
    stride_logits_col,
    stride_rhs,
    stride_rhs_row,
    stride_rhs_col,
    SOLVER: tl.constexpr,
    REST: tl.constexpr,
    RIDGED: tl.constexpr,
    EQUILIBRATE: tl.constexpr,
    ORDER: tl.constexpr,
    GATE: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
):
    """X of one matrix, where REST of one that was left open; x and used are contiguous.

    `neumann` leaves open what its gate rejects, `auto` what is not well enough conditioned.
    """
    matrix = tl.program_id(0).to(tl.int64)
    if REST:  # noqa: SIM102
        if tl.load(used_ptr + matrix) != OPEN:
            return
    logits_ptr += matrix * stride_logits
    rhs_ptr += matrix * stride_rhs
    x_ptr += matrix * r * d
    _, finite, _ = _softmax(logits_ptr, r, stride_logits_row, stride_logits_col, R, False)
    if (SOLVER == NEUMANN) or (SOLVER == SVD):  # noqa: SIM109
        A, lam, left, right, _, _ = _system(
            logits_ptr, r, stride_logits_row, stride_logits_col, ridge, R, EQUILIBRATE, False
        )
        g = left[:, None] * _load(rhs_ptr, r, d, stride_rhs_row, stride_rhs_col, R, D)
        used = tl.full((), SOLVER, tl.int64)
        if SOLVER == SVD:
            z = _pseudo_inverse(A, g, r, R, D, RIDGED)
        else:
            alpha = 1.0 / (1.0 + lam)
            z = _series(A, g, alpha, ORDER, R)
            if GATE:
                used = tl.where(_series_accepted(A, g, z, alpha, r, R), used, OPEN)
        _store(x_ptr, right[:, None] * z, finite, r, d, R, D)
    else:
        lu, b, order, right, used, regular = _factored(
            logits_ptr,
            rhs_ptr,
            r,
            d,
            stride_logits_row,
            stride_logits_col,
            stride_rhs_row,
            stride_rhs_col,
            ridge,
            R,
            D,
            RIDGED,
            EQUILIBRATE,
            SOLVER != CHOLESKY,
        )
        z = _back_substitute(lu, b, R)
        _store(x_ptr, right[:, None] * z, finite & regular, r, d, R, D)
        if SOLVER == AUTO:
            kappa = _inverse_growth(lu, order, r, R)
            A, _, _, _, _, _ = _system(
                logits_ptr, r, stride_logits_row, stride_logits_col, ridge, R, EQUILIBRATE, False
            )
            kappa *= _growth(A, r, R)
            used = tl.where((kappa < kappa_max) & regular, used, OPEN)
    tl.store(used_ptr + matrix, used)


@triton.jit
def _store(x_ptr, x, good, r, d, R: tl.constexpr, D: tl.constexpr):
    """The tile, or NaN where it is not good; contiguous."""
    i, c = tl.arange(0, R), tl.arange(0, D)
    x = tl.where(good, x, float("nan"))
    tl.store(x_ptr + i[:, None] * d + c[None, :], x, mask=(i[:, None] < r) & (c[None, :] < d))


@triton.jit
def _series_backward(A, g, dz, alpha, R: tl.constexpr, D: tl.constexpr, ORDER: tl.constexpr):
    """dG, dA and dλ of Z = α Σ_{k≤m} (I − αA)^k G, α = 1/(1 + λ), of which dZ/dα is (m + 1) (I − αA)^m G."""
    d_A = tl.zeros([R, R], tl.float32)
    step = dz
    for back in range(ORDER):
        # z_{k+1} = z_k + α (g − A z_k), k = m − 1 − back; earlier terms are made anew.
        earlier = _series(A, g, alpha, ORDER - 1 - back, R)
        d_A -= alpha * _product(step, earlier, D, B_MT=True)
        step = step - alpha * _product(A, step, R, A_MT=True)
    d_alpha = (ORDER + 1) * tl.sum(tl.sum(step * g, 1), 0)
    return _series(A, dz, alpha, ORDER, R, A_MT=True), d_A, -alpha * alpha * d_alpha


@triton.jit
def _solve_backward_kernel(
    logits_ptr,
    rhs_ptr,
    x_ptr,
    used_ptr,
    dx_ptr,
    d_logits_ptr,
    d_rhs_ptr,
    r,
    d,
    ridge,
    stride_logits,
    stride_logits_row,
    stride_logits_col,
    stride_rhs,
    stride_rhs_row,
    stride_rhs_col,
    stride_dx,
    stride_dx_row,
    stride_dx_col,
    SYMMETRIC: tl.constexpr,
    SERIES: tl.constexpr,
    RIDGED: tl.constexpr,
    EQUILIBRATE: tl.constexpr,
    ORDER: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
):
    """Gradients of one matrix that the series served, or of one that it did not; zero where logits are not finite.

    The system is that of the solver that served: `cholesky` had the symmetric part of the logits. Its transpose is
    eliminated without pivoting there, and with it elsewhere, for an SVD's matrix too: with a ridge it has an inverse.
    """
    matrix = tl.program_id(0).to(tl.int64)
    logits_ptr += matrix * stride_logits
    rhs_ptr += matrix * stride_rhs
    dx_ptr += matrix * stride_dx
    used = tl.load(used_ptr + matrix)
    if (used == NEUMANN) != SERIES:
        return
    half = used == CHOLESKY
    A, lam, left, right, finite, _symmetric = _system(
        logits_ptr, r, stride_logits_row, stride_logits_col, ridge, R, EQUILIBRATE, SYMMETRIC, half
    )
    dz = right[:, None] * _load(dx_ptr, r, d, stride_dx_row, stride_dx_col, R, D)
    d_lam = 0.0
    if SERIES:
        g = left[:, None] * _load(rhs_ptr, r, d, stride_rhs_row, stride_rhs_col, R, D)
        d_g, d_A, d_lam = _series_backward(A, g, dz, 1.0 / (1.0 + lam), R, D, ORDER)
    else:
        d_g = tl.zeros([R, D], tl.float32)
        smallest = -1.0
        if SYMMETRIC:  # noqa: SIM102
            if half:
                lu, b, _order, smallest, largest = _eliminate(tl.trans(A), dz, r, R, False)
                d_g = _back_substitute(lu, b, R)
        if not smallest > 0:
            A, lam, left, right, finite, _symmetric = _system(
                logits_ptr, r, stride_logits_row, stride_logits_col, ridge, R, EQUILIBRATE, SYMMETRIC, half
            )
            dz = right[:, None] * _load(dx_ptr, r, d, stride_dx_row, stride_dx_col, R, D)
            lu, b, _order, smallest, largest = _eliminate(tl.trans(A), dz, r, R, True)
            d_g = _back_substitute(lu, b, R)
            if not RIDGED:
                d_g = tl.where(smallest > r * EPS * largest, d_g, float("nan"))
        z = _load(x_ptr + matrix * r * d, r, d, d, 1, R, D) / right[:, None]
        d_A = -_product(d_g, tl.where(finite, z, 0.0), D, B_MT=True)
    _store_gradients(
        logits_ptr,
        rhs_ptr,
        x_ptr + matrix * r * d,
        dx_ptr,
        d_logits_ptr + matrix * r * r,
        d_rhs_ptr + matrix * r * d,
        d_g,
        d_A,
        d_lam,
        half,
        r,
        d,
        ridge,
        stride_logits_row,
        stride_logits_col,
        stride_rhs_row,
        stride_rhs_col,
        stride_dx_row,
        stride_dx_col,
        R,
        D,
        EQUILIBRATE,
        SYMMETRIC,
    )


@triton.jit
def _store_gradients(
    logits_ptr,
    rhs_ptr,
    x_ptr,
    dx_ptr,
    d_logits_ptr,
    d_rhs_ptr,
    d_g,
    d_A,
    d_lam,
    half,
    r,
    d,
    ridge,
    stride_logits_row,
    stride_logits_col,
    stride_rhs_row,
    stride_rhs_col,
    stride_dx_row,
    stride_dx_col,
    R: tl.constexpr,
    D: tl.constexpr,
    EQUILIBRATE: tl.constexpr,
    SYMMETRIC: tl.constexpr,
):
    """From the gradients of the system A Z = D_r G to those of the logits and of G."""
    i, c = tl.arange(0, R), tl.arange(0, D)
    square = (i[:, None] < r) & (i[None, :] < r)
    diagonal = i[:, None] == i[None, :]
    W, finite, _ = _softmax(logits_ptr, r, stride_logits_row, stride_logits_col, R, SYMMETRIC, half)
    left, right = _scales(W, R, EQUILIBRATE)
    trace = tl.sum(tl.sum(tl.where(diagonal & square, d_A, 0.0), 1), 0) + d_lam
    d_W = d_A + tl.where(diagonal, ridge / r * trace, 0.0)
    if EQUILIBRATE:
        g = _load(rhs_ptr, r, d, stride_rhs_row, stride_rhs_col, R, D)
        dx = _load(dx_ptr, r, d, stride_dx_row, stride_dx_col, R, D)
        d_left = tl.sum(d_g * g, 1) + tl.sum(tl.where(square, d_W * W * right[None, :], 0.0), 1)
        d_right = tl.sum(tl.where(square, d_W * left[:, None] * W, 0.0), 0)
        x = _load(x_ptr, r, d, d, 1, R, D)  # D_c Z
        d_right += tl.sum(tl.where(diagonal, tl.sum(dx * x, 1)[:, None], 0.0), 0) / right
        row_norm, column_norm = tl.sqrt(tl.sum(W * W, 1)), tl.sqrt(tl.sum(W * W, 0))
        row_part = -0.5 * left * left * left * d_left / tl.where(row_norm > 0, row_norm, 1.0)
        column_part = -0.5 * right * right * right * d_right / tl.where(column_norm > 0, column_norm, 1.0)
        d_W = left[:, None] * d_W * right[None, :] + (row_part[:, None] + column_part[None, :]) * W
    d_W = tl.where(square, d_W, 0.0)
    d_l = W * (d_W - tl.sum(d_W * W, 1)[:, None])
    if SYMMETRIC:
        d_l = tl.where(half, 0.5 * (d_l + tl.trans(d_l)), d_l)
    d_l = tl.where(finite, d_l, 0.0)
    d_rhs = tl.where(finite, left[:, None] * d_g, 0.0)
    tl.store(d_logits_ptr + i[:, None] * r + i[None, :], d_l.to(d_logits_ptr.dtype.element_ty), mask=square)
    inside = (i[:, None] < r) & (c[None, :] < d)
    tl.store(d_rhs_ptr + i[:, None] * d + c[None, :], d_rhs.to(d_rhs_ptr.dtype.element_ty), mask=inside)
