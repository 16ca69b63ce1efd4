"""The solvers of the landmark system in plain PyTorch (docs/METHOD.md §2.1; section 3.4 of the article).

The inputs are the logits l = K̃K̃ᵀs (…, r, r) and G = R V (…, r, d):

    W = softmax(l)    A = W + λI,  λ = λ₀ tr(W)/r    X = A⁻¹ G

Let ℓ_i be the logsumexp of row i of l, and E = diag(e^{ℓ/2}). W is similar to the symmetric matrix S = E W E⁻¹. The
entries of S are S_ij = exp(l_ij − (ℓ_i + ℓ_j)/2) = (W_ij W_ji)^½. The solver `cholesky` solves (S + λI) (E X) = E G.

Equilibration replaces W by W̃ = D_r W D_c, G by D_r G, and X by Z = D_c⁻¹ X. W̃ is also similar to a symmetric matrix
S, but with another E: S = E W̃ E⁻¹ is symmetric for E = (D_c D_r⁻¹)^½ diag(e^{ℓ/2}).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..checks import nowhere, transforming, wide_dtype
from ..options import SolveOptions
from .estimate import estimate_condition

EQUILIBRATION_FLOOR = 1e-12
SYMMETRY_TOLERANCE = 1e-3
POWER_ITERATIONS = 20
RADIUS_LIMIT = 0.95
RESIDUAL_LIMIT = 1e-2
TRANSFORMED_ORDERS = 3  # order up to which derivatives are exact under torch.func and in forward mode


class Solver(IntEnum):
    """The solver that was used for a matrix."""

    CHOLESKY = 0
    LU = 1
    SVD = 2
    NEUMANN = 3


# All solvers: configs, the command line, reports, studies and checks use this list.
SOLVERS = {
    "cholesky": "Cholesky of the similar symmetric system; LU where it fails",
    "lu": "LU with partial pivoting",
    "svd": "pseudo-inverse by an SVD",
    "auto": "LU below kappa_max, SVD above",
    "neumann": "truncated Neumann series where it converges, else the default solver",
}


class System(NamedTuple):
    """The system A Z = rhs, where X = D_c Z.

    `left` and `right` are the diagonals of D_r and D_c. Without equilibration, they are None, and Z = X.
    """

    matrix: Tensor  # A, (…, r, r)
    rhs: Tensor  # (…, r, d)
    ridge: Tensor  # λ, (…,)
    left: Tensor | None
    right: Tensor | None


def landmark_solve(logits: Tensor, rhs: Tensor, options: SolveOptions) -> tuple[Tensor, Tensor]:
    """Return X (…, r, d) and the `Solver` (…,) of each matrix."""
    logits, rhs = logits.to(wide_dtype(logits.dtype)), rhs.to(wide_dtype(rhs.dtype))
    finite = logits.abs().amax((-2, -1)).isfinite()
    spoiled = not nowhere(~finite)
    if spoiled:
        logits = torch.where(finite[..., None, None], logits, 0)
    system, factors, used = _factorise(logits, rhs, options)
    X = _unscaled(system, _solved(system, factors))
    if options.solver == "neumann":
        series_system = _system(logits, rhs, options.ridge, options.equilibrate)
        series = _neumann(series_system, options.neumann_order)
        gated = options.neumann_gate
        accepted = _neumann_accepts(series_system, series) if gated else torch.ones_like(finite)
        X = torch.where(accepted[..., None, None], _unscaled(series_system, series), X)
        used = torch.where(accepted, int(Solver.NEUMANN), used)
    return torch.where(finite[..., None, None], X, torch.nan) if spoiled else X, used


def landmark_diagnostics(
    logits: Tensor, rhs: Tensor, x: Tensor, used: Tensor, ridge: float, equilibrate: bool, estimate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return κ, ρ and the gain of each matrix. Each of the three results has the shape (…,).

    κ is σ_max/σ_min of A, ρ is ‖A Z − G‖_F/(‖G‖_F + 1e-12), and the gain is ‖X‖_F/‖R V‖_F. With `estimate`, κ is
    computed by `estimate_condition` and not from singular values.
    """
    logits, rhs = logits.to(x.dtype), rhs.to(x.dtype)
    finite = logits.isfinite().all(-1).all(-1)
    logits = torch.where(finite[..., None, None], logits, 0)
    system = _system(_acted_on(logits, used), rhs, ridge, equilibrate)
    if estimate:
        kappa = estimate_condition(system.matrix, _lu(system.matrix, ridge)).nan_to_num(nan=torch.inf)
    else:
        sigma = torch.linalg.svdvals(system.matrix)
        kappa = sigma[..., 0] / sigma[..., -1]
    kappa = torch.where(finite, kappa, torch.nan)
    Z = x if system.right is None else x / system.right[..., None]
    return kappa, _residual(system, Z), _norm(x) / _norm(rhs)


def _acted_on(logits: Tensor, used: Tensor) -> Tensor:
    """Return the logits from which W was computed: for Cholesky, the symmetric part of `logits`, otherwise `logits`."""
    symmetric = (used == Solver.CHOLESKY)[..., None, None]
    return torch.where(symmetric, (logits + logits.mT) / 2, logits)


def _system(logits: Tensor, rhs: Tensor, ridge: float, equilibrate: bool) -> System:
    W = logits.softmax(-1)
    left = right = None
    if equilibrate:
        left = (W.square().sum(-1).sqrt() + EQUILIBRATION_FLOOR).rsqrt()
        right = (W.square().sum(-2).sqrt() + EQUILIBRATION_FLOOR).rsqrt()
        W = left[..., None] * W * right[..., None, :]
        rhs = left[..., None] * rhs
    r = W.shape[-1]
    lam = ridge * W.diagonal(dim1=-2, dim2=-1).sum(-1) / r
    A = W + lam[..., None, None] * torch.eye(r, dtype=W.dtype, device=W.device)
    return System(A, rhs, lam, left, right)


def _unscaled(system: System, Z: Tensor) -> Tensor:
    return Z if system.right is None else system.right[..., None] * Z


Solve = Callable[[Tensor, bool], Tensor]  # (right-hand side, transposed) → solution


class _Factors:
    """The factors of a batch of matrices.

    `parts` is a list of pairs (mask, solve). The mask (…,) selects matrices; None selects all matrices. The function
    `solve` solves the systems of the selected matrices. Where masks overlap, the later pair is used.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor | None, Solve]] = []

    def solve(self, rhs: Tensor, transposed: bool) -> Tensor:
        result = torch.zeros_like(rhs)
        for mask, solve in self.parts:
            part = solve(rhs, transposed)
            result = part if mask is None else torch.where(mask[..., None, None], part, result)
        return result


def _solved(system: System, factors: _Factors) -> Tensor:
    """Return Z = A⁻¹ G, differentiable in A and G."""
    A, G = system.matrix, system.rhs
    if not transforming():
        return cast(Tensor, _ImplicitSolve.apply(A, G, factors, False))
    # The factors have no derivative. Each step of iterative refinement makes the derivatives of one more order exact.
    Z = factors.solve(G.detach(), False).detach()
    for _ in range(TRANSFORMED_ORDERS):
        Z = Z + factors.solve(G - A @ Z, False)
    return Z


class _ImplicitSolve(torch.autograd.Function):
    """Compute Z = A⁻¹ G or A⁻ᵀ G from given factors, with implicit differentiation to any order."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, G: Tensor, factors: _Factors, transposed: bool) -> Tensor:
        Z = factors.solve(G, transposed)
        ctx.save_for_backward(A, Z)
        ctx.factors, ctx.transposed = factors, transposed
        return Z

    @staticmethod
    def backward(ctx: Any, dZ: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        A, Z = ctx.saved_tensors
        dG = _ImplicitSolve.apply(A, dZ, ctx.factors, not ctx.transposed)
        dA = -(Z @ dG.mT) if ctx.transposed else -(dG @ Z.mT)
        return dA, dG, None, None


def _factorise(logits: Tensor, rhs: Tensor, options: SolveOptions) -> tuple[System, _Factors, Tensor]:
    """Return the system, its factors and the `Solver` of each matrix; for "neumann", those of its fallback solver."""
    ridge, equilibrate, solver = options.ridge, options.equilibrate, options.solver
    if solver == "neumann":
        solver = "cholesky" if ridge > 0 else "lu"
    factors = _Factors()
    used = torch.full(logits.shape[:-2], int(Solver.LU), dtype=torch.int64, device=logits.device)
    rest: Tensor | None = None  # the matrices that LU solves; None means all
    if solver == "cholesky":
        symmetric = (logits + logits.mT) / 2
        system = _system(symmetric, rhs, ridge, equilibrate)
        good, solve = _cholesky(logits.detach(), symmetric.detach(), system)
        factors.parts.append((good, solve))
        used = torch.where(good, int(Solver.CHOLESKY), used)
        if nowhere(~good, wait=True):  # waiting costs less than LU of all matrices
            return system, factors, used
        rest = ~good
        system = _system(_acted_on(logits, used), rhs, ridge, equilibrate)
    else:
        system = _system(logits, rhs, ridge, equilibrate)
    A = system.matrix.detach()
    if solver == "svd":
        factors.parts.append((None, _svd(A, ridge, None)))
        return system, factors, torch.full_like(used, int(Solver.SVD))
    if solver == "auto":
        lu = _lu(A, ridge)
        factors.parts.append((None, lu))
        high = ~(estimate_condition(A, lu) < options.kappa_max)
        factors.parts.append((high, _svd(A, ridge, high)))
        return system, factors, torch.where(high, int(Solver.SVD), used)
    factors.parts.append((rest, _lu(A, ridge)))
    return system, factors, used


@torch.no_grad()
def _cholesky(logits: Tensor, symmetric: Tensor, system: System) -> tuple[Tensor, Solve]:
    largest = logits.abs().amax((-2, -1))
    good = (logits - symmetric).abs().amax((-2, -1)) <= SYMMETRY_TOLERANCE / 2 * (1 + largest)
    lse = symmetric.logsumexp(-1)
    half = (lse - (lse.amax(-1, keepdim=True) + lse.amin(-1, keepdim=True)) / 2) / 2  # log E, centred
    if system.left is not None and system.right is not None:
        half = half + (system.right / system.left).log() / 2
    A = system.matrix.detach()
    factor, info = torch.linalg.cholesky_ex((A * A.mT).sqrt())  # S + λI = (A ∘ Aᵀ)^½
    # Beyond this spread W_ij W_ji = W_ij² e^(ℓ_i − ℓ_j) underflows while W_ij is still significant.
    numbers = torch.finfo(A.dtype)
    in_range = lse.amax(-1) - lse.amin(-1) <= math.log((1e-3 * numbers.eps) ** 2 / numbers.tiny)
    good = good & in_range & (info == 0) & half.isfinite().all(-1)
    E = half.exp()[..., None]

    def solve(rhs: Tensor, transposed: bool) -> Tensor:
        if transposed:
            return torch.cholesky_solve(rhs / E, factor) * E
        return torch.cholesky_solve(rhs * E, factor) / E

    return good, solve


def _lu(A: Tensor, ridge: float) -> Solve:
    factor, pivots, _ = torch.linalg.lu_factor_ex(A)
    poison = torch.zeros_like(A[..., :1, :1])
    if ridge == 0:
        # Rounding leaves a small last pivot in a singular matrix. Without this check, the solution looks valid.
        pivot = factor.diagonal(dim1=-2, dim2=-1).abs()
        limit = A.shape[-1] * torch.finfo(A.dtype).eps * pivot.amax(-1)
        poison = torch.where(pivot.amin(-1) > limit, 0.0, torch.nan).to(A.dtype)[..., None, None]

    def solve(rhs: Tensor, transposed: bool) -> Tensor:
        return torch.linalg.lu_solve(factor, pivots, rhs, adjoint=transposed) + poison

    return solve


def _svd(A: Tensor, ridge: float, mask: Tensor | None) -> Solve:
    """Factorise the matrices that `mask` selects; None selects all matrices.

    The returned function `solve` gives solutions for the selected matrices. Its result also has entries for the
    matrices that are not selected, but the caller does not use these entries.
    """
    if mask is not None and not transforming():
        # An SVD waits for the device in any case and costs far more than reading the mask.
        if not mask.any():
            return lambda rhs, _: torch.zeros_like(rhs)
        return _within(mask, _svd(A[mask], ridge, None))
    U, sigma, Vh = torch.linalg.svd(A)
    inverse = 1 / sigma
    if ridge == 0:
        limit = A.shape[-1] * torch.finfo(A.dtype).eps * sigma[..., :1]
        inverse = torch.where(sigma > limit, inverse, 0)

    def solve(rhs: Tensor, transposed: bool) -> Tensor:
        if transposed:
            return U @ (inverse[..., None] * (Vh @ rhs))
        return Vh.mT @ (inverse[..., None] * (U.mT @ rhs))

    return solve


def _within(mask: Tensor, solve: Solve) -> Solve:
    def scattered(rhs: Tensor, transposed: bool) -> Tensor:
        result = torch.zeros_like(rhs)
        result[mask] = solve(rhs[mask], transposed)
        return result

    return scattered


def _neumann(system: System, order: int) -> Tensor:
    """Return α Σ_{k=0..m} (I − αA)^k G with m = `order` and α = 1/(1 + λ), by Horner's rule."""
    alpha = (1 / (1 + system.ridge))[..., None, None]
    first = alpha * system.rhs
    Z = first
    for _ in range(order):
        Z = Z - alpha * (system.matrix @ Z) + first
    return Z


@torch.no_grad()
def _neumann_accepts(system: System, series: Tensor) -> Tensor:
    """Return the mask (…,) of the matrices for which the Neumann series is used.

    The spectral radius of I − αA is estimated by power iteration. The start is a fixed vector of entries ±1, minus
    their mean. A vector of equal entries would not be suitable, because without equilibration, I − αA maps it to zero.
    """
    A = system.matrix
    r = A.shape[-1]
    alpha = (1 / (1 + system.ridge))[..., None, None]
    hashed = (torch.arange(1, r + 1, device=A.device) * 2654435761) % 2**32
    signs = 1 - 2 * ((hashed >> 15) & 1).to(A.dtype)
    v = (signs - signs.mean())[:, None].expand(*A.shape[:-1], 1)
    radius = torch.zeros_like(system.ridge)
    for _ in range(POWER_ITERATIONS):
        v = v / _norm(v).clamp(min=torch.finfo(A.dtype).tiny)[..., None, None]
        v = v - alpha * (A @ v)
        radius = _norm(v)
    return (radius < RADIUS_LIMIT) & (_residual(system, series) < RESIDUAL_LIMIT)


def _norm(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=(-2, -1))


def _residual(system: System, Z: Tensor) -> Tensor:
    return _norm(system.matrix @ Z - system.rhs) / (_norm(system.rhs) + 1e-12)
