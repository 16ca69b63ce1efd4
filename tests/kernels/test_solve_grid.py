"""Compare every solver in fp32 with exact results in fp64, for many sizes, kinds of landmarks, temperatures and ridges.

Here a temperature is a factor of the logits. The tolerances are:

- The normwise backward error ‖A X − G‖ / (‖A‖‖X‖ + ‖G‖) of the system A = W_λ is at most 8 eps for each matrix,
  whatever its κ. The largest measured errors are 1.5 eps (`cholesky` and `lu`) and 4.6 eps (`svd`).
- The relative error of X is at most 2·8·κ·eps, which follows from the first bound. X is compared only if κ < 1e3.
- The relative error of L·X is compared for normalised landmarks only. Its largest value over kinds and temperatures is
  at most twice that of plain `torch.linalg` in fp32, plus 32 eps. The bound uses the error of `torch.linalg` with LU.
  If the tested solver used the SVD for any matrix, `torch.linalg` also runs with the SVD, and the larger of its two
  errors is used. Kinds are not compared one by one, because the error of `torch.linalg` for a single kind can by
  chance be ten times smaller. L·X of landmarks that are not normalised is not compared, because its rounding error has
  no useful bound with any solver.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import oracle
import pytest
import torch
from oracle import tokens
from torch import Tensor

from srm_kernels import Solver, landmark_solve

EPS = torch.finfo(torch.float32).eps
BACKWARD = 8 * EPS
WIDTH = 16
KINDS = ("random", "smooth", "duplicated", "near duplicated", "collinear", "graded", "outlier")
TEMPERATURES = (0.02, 0.3, 1.0, 4.0)
SIZES = (1, 2, 3, 16, 31, 32, 48, 64, 100, 128)


def keys_of(kind: str, r: int, seed: int) -> Tensor:
    keys = tokens(seed, r, WIDTH)
    if kind == "smooth":
        place = torch.linspace(0, 3, r, dtype=torch.float64)[:, None]
        keys = torch.cos(place * tokens(seed + 1, 1, WIDTH) + tokens(seed + 2, 1, WIDTH))
    elif kind == "duplicated":
        keys[1::2] = keys[0 : r - r % 2 : 2]
    elif kind == "near duplicated":
        keys[1::2] = keys[0 : r - r % 2 : 2] * (1 + 1e-5 * tokens(seed + 3, r // 2, WIDTH))
    elif kind == "collinear":
        keys = tokens(seed, r, 1) * tokens(seed + 1, 1, WIDTH)
    elif kind == "graded":
        keys = keys * torch.logspace(-2, 1, r, dtype=torch.float64)[:, None]
    elif kind == "outlier":
        keys[0] *= 100
    return keys


class Grid(NamedTuple):
    """A batch of landmark systems, made from keys as in Nyström attention.

    Dimension 0 is the kind of keys. Dimension 1 has all temperatures twice: first with keys that are not normalised,
    then with normalised keys.
    """

    logits: Tensor  # (7, 8, r, r)
    rhs: Tensor
    L: Tensor


def grid_of(r: int) -> Grid:
    rows = []
    for number, kind in enumerate(KINDS):
        keys = keys_of(kind, r, 100 * r + number)
        rows.append(
            torch.stack([k * math.sqrt(t) for k in (keys, oracle.normalise(keys)) for t in TEMPERATURES])
        )
    landmarks = torch.stack(rows)  # (7, 8, r, WIDTH)
    n = landmarks.shape[:2]
    keys = torch.cat([landmarks, tokens(7, *n, 2 * r, WIDTH)], 2)
    R = oracle.softmax(landmarks @ keys.mT / math.sqrt(WIDTH))
    return Grid(
        (landmarks @ landmarks.mT / math.sqrt(WIDTH)).float(),
        (R @ tokens(8, *n, 3 * r, 6)).float(),
        oracle.softmax(tokens(9, *n, 40, WIDTH) @ landmarks.mT / math.sqrt(WIDTH)),
    )


def backward_error(logits: Tensor, rhs: Tensor, ridge: float, x: Tensor) -> Tensor:
    s = oracle.system(logits, rhs, ridge)
    size = oracle.frobenius(s.matrix) * oracle.frobenius(x) + oracle.frobenius(s.right)
    return oracle.frobenius(s.matrix @ x.double() - s.right) / size


@pytest.mark.parametrize("r", SIZES)
@pytest.mark.parametrize("ridge", [1e-5, 1e-3, 1e-1])
def test_every_solver_on_every_kind(r, ridge):
    logits, rhs, L = grid_of(r)
    exact = oracle.solve(logits, rhs, ridge)
    kappa = oracle.condition(oracle.system(logits, rhs, ridge).matrix)
    plain = {name: oracle.plain_solve(logits, rhs, ridge, solver=name).double() for name in ("lu", "svd")}
    for solver in ("cholesky", "lu", "auto", "svd"):
        found = landmark_solve(logits, rhs, ridge=ridge, solver=solver, diagnostics="estimate")
        x = found.x.double()
        assert (backward_error(logits, rhs, ridge, x) <= BACKWARD).all(), solver
        relative = oracle.frobenius(x - exact) / oracle.frobenius(exact)
        well = kappa < 1e3
        assert (relative <= 2 * BACKWARD * kappa)[well].all(), solver
        yardsticks = ["lu", *(["svd"] if (found.solver == Solver.SVD).any() else [])]
        error = product_error(L, x, exact)
        assert error <= 2 * max(product_error(L, plain[name], exact) for name in yardsticks) + 32 * EPS, (
            solver
        )


def product_error(L: Tensor, x: Tensor, exact: Tensor) -> float:
    """Return the largest relative error of L·X over all systems with normalised landmarks.

    The error of a system is relative to the largest entry of its exact L·X.
    """
    L, x, exact = (t[:, len(TEMPERATURES) :] for t in (L, x, exact))
    wanted = (L @ exact).abs().amax((-2, -1))
    return float(((L @ (x - exact)).abs().amax((-2, -1)) / wanted).max())


@pytest.mark.parametrize("r", [2, 16, 31, 64])
def test_no_ridge_where_there_is_an_inverse(r):
    """With logits multiplied by 4, random landmarks are so far apart that W has κ < 1e3 without a ridge."""
    keys = oracle.normalise(tokens(r, 3, r, 32)) * 2
    logits, rhs = (keys @ keys.mT / math.sqrt(32)).float(), tokens(1, 3, r, 5, dtype=torch.float32)
    assert (oracle.condition(oracle.softmax(logits)) < 1e3).all()
    for solver in ("lu", "auto", "svd", "neumann"):
        result = landmark_solve(logits, rhs, ridge=0.0, solver=solver, diagnostics="estimate")
        if solver == "neumann" and (result.solver == Solver.NEUMANN).any():
            continue
        assert (backward_error(logits, rhs, 0.0, result.x) <= BACKWARD).all(), solver


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("r", [2, 3, 16, 32, 64, 128])
@pytest.mark.parametrize("solver", ["lu", "neumann"])
def test_no_ridge_and_duplicates_are_told_and_stay_alone(solver, r, dtype):
    """X is NaN for matrices with duplicated landmarks; these matrices do not change the bits of X for the others.

    In two of five matrices, every second landmark is a copy of the landmark before it.
    """
    keys = oracle.normalise(tokens(r, 5, r, 150)) * 2
    rhs = tokens(1, 5, r, 5, dtype=dtype)
    untouched = landmark_solve((keys @ keys.mT / math.sqrt(150)).to(dtype), rhs, ridge=0.0, solver=solver).x
    keys[1::2, 1::2] = keys[1::2, 0 : r - r % 2 : 2]
    found = landmark_solve((keys @ keys.mT / math.sqrt(150)).to(dtype), rhs, ridge=0.0, solver=solver).x
    assert found[1::2].isnan().all()
    assert untouched.isfinite().all()
    assert torch.equal(found[0::2], untouched[0::2])


@pytest.mark.parametrize("kind", ["graded", "outlier"])
@pytest.mark.parametrize("temperature", [0.02, 0.3, 1.0])
def test_row_sums_beyond_the_range_of_the_symmetric_form(kind, temperature):
    """`cholesky` falls back to LU if S_ij = √(W_ij W_ji) can underflow.

    One of W_ij and W_ji can be so small that S_ij underflows, although the other is significant. Without the fallback,
    the error of X was larger than X itself for some matrices with κ below 10, and no diagnostic showed this error.
    """
    for r in (2, 3, 16, 32):
        keys = keys_of(kind, r, 100 * r + KINDS.index(kind)) * math.sqrt(temperature)
        logits, rhs = (keys @ keys.mT / math.sqrt(WIDTH)).float(), tokens(1, r, 5, dtype=torch.float32)
        rows = logits.logsumexp(-1)
        found = landmark_solve(logits, rhs, diagnostics=True)
        wide = bool(rows.amax() - rows.amin() > 88)
        assert (backward_error(logits, rhs, 1e-3, found.x) <= BACKWARD).all()
        assert not (wide and found.solver == Solver.CHOLESKY)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_how_often_the_series_may_be_used(qk_norm):
    """The Neumann series solves only matrices that pass the residual and radius checks: fewer than half of all."""
    logits, rhs, _ = grid_of(16)
    logits, rhs = (t[:, 4:] if qk_norm else t[:, :4] for t in (logits, rhs))
    found = landmark_solve(logits, rhs, solver="neumann", diagnostics=True)
    s = oracle.system(logits, rhs, 1e-3)
    alpha = 1 / (1 + s.ridge)
    step = torch.eye(16, dtype=torch.float64) - alpha[..., None, None] * s.matrix
    radius = torch.linalg.eigvals(step).abs().amax(-1)
    z = oracle.neumann(logits, rhs)
    residual = oracle.frobenius(s.matrix @ z - s.right) / (oracle.frobenius(s.right) + 1e-12)
    served = found.solver == Solver.NEUMANN
    assert (residual[served] < 1e-2 * 1.001).all()
    # The solver requires a radius below 0.95. Its estimate, from twenty power iterations, can be below the exact
    # radius, so the bound here is 1.
    assert (radius[served] < 1).all()
    clear = (residual > 1.01e-2) | (radius > 1 + 1e-6)
    assert not served[clear].any()
    assert 0 <= served.double().mean() < 0.5
