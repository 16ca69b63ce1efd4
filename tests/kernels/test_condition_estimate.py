"""Tests of the estimate of κ by `estimate_condition`, and tests of which solvers read values on the host."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from oracle import tokens
from torch import Tensor

from srm_kernels import Solver, landmark_solve
from srm_kernels.conditioning import reference
from srm_kernels.conditioning.estimate import normal_probes
from srm_kernels.options import SolveOptions

LOWEST = 0.5  # lowest accepted estimate/κ₂; the lowest of 100,000 matrices was 0.53 (smooth, r = 128)


def keys_of(family: str, r: int, d: int, count: int) -> Tensor:
    keys = tokens(r + d, count, r, d)
    if family == "duplicated":
        keys[:, r // 2 :] = keys[:, : r - r // 2].clone()
    elif family == "one pair":
        for index, matrix in enumerate(keys):
            matrix[index % r] = matrix[(index + 1 + index // r) % r]
    elif family == "collinear":
        keys = tokens(r, count, r, 1) * tokens(d, count, 1, d)
    elif family == "outlier":
        keys[:, 0] *= 100
    elif family == "graded":
        keys = keys * torch.logspace(-2, 1, r, dtype=torch.float64)[:, None]
    elif family == "smooth":
        keys = torch.cos(torch.linspace(0, 3, r, dtype=torch.float64)[:, None] * tokens(d, count, 1, d))
    return keys


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("equilibrate", [False, True])
@pytest.mark.parametrize(
    "family", ["random", "duplicated", "one pair", "collinear", "outlier", "graded", "smooth"]
)
def test_the_estimate_is_within_its_band(family, equilibrate, dtype):
    """The estimate is between κ₂/2 and κ₂, except for the rounding error of the solves in the estimate.

    The relative rounding error is about r·eps·κ. Only matrices with r·eps·κ below 0.5 are compared.
    """
    compared = 0
    for r, d, scale in ((2, 8, 0.3), (16, 8, 1.0), (64, 32, 0.3), (128, 32, 2.0)):
        for ridge in (1e-5, 1e-1):
            keys = oracle.normalise(keys_of(family, r, d, 6))
            if family in ("outlier", "graded"):
                keys = keys_of(family, r, d, 6)
            logits = (keys @ keys.mT * scale / math.sqrt(d)).to(dtype)
            kappa = oracle.condition(oracle.system(logits, keys, ridge, equilibrate).matrix)
            found = landmark_solve(
                logits,
                keys.to(dtype),
                ridge=ridge,
                solver="lu",
                equilibrate=equilibrate,
                diagnostics="estimate",
            ).kappa
            rounding = r * torch.finfo(dtype).eps * kappa
            ratio = (found.double() / kappa)[rounding < 0.5]
            slack = rounding[rounding < 0.5]
            compared += len(ratio)
            assert (ratio >= LOWEST * (1 - slack)).all()
            assert (ratio <= 1 + slack + 1e-6).all()
    assert compared >= 6


def test_no_pair_of_duplicated_landmarks_is_missed():
    """For each of the 2,016 pairs of 64 landmarks, there is one matrix in which the two landmarks have equal keys.

    With start vectors of random signs, the estimate would be too low for two landmarks with equal signs in all vectors.
    """
    r, d = 64, 32
    first, second = torch.triu_indices(r, r, 1)
    keys = oracle.normalise(tokens(1, r, d)).repeat(len(first), 1, 1)
    keys[torch.arange(len(first)), second] = keys[torch.arange(len(first)), first]
    logits, rhs = (keys @ keys.mT / math.sqrt(d)).float(), keys[..., :1].float()
    found = landmark_solve(logits, rhs, solver="lu", diagnostics="estimate").kappa
    # Two equal columns of W give W + λI the eigenvalue λ, so κ is at least 1/λ.
    lam = oracle.system(logits, rhs, 1e-3).ridge
    assert (found.double() >= LOWEST / lam).all()


def test_the_probes_are_standard_normal_and_independent():
    probes = normal_probes(128, torch.float64, torch.device("cpu"))
    assert abs(probes.mean()) < 3 / math.sqrt(1024)
    assert abs(probes.var() - 1) < 3 * math.sqrt(2 / 1024)
    correlation = torch.corrcoef(probes)
    assert (correlation - torch.eye(128, dtype=torch.float64)).abs().max() < 0.999
    assert torch.linalg.svdvals(probes)[-1] > 128**0.5 - 8**0.5 - 4


def test_a_singular_matrix_without_a_ridge_is_estimated_infinite():
    logits = torch.zeros(2, 4, 4, dtype=torch.float64)
    logits[1] = 5 * torch.eye(4)
    found = landmark_solve(logits, tokens(2, 2, 4, 3), ridge=0.0, solver="lu", diagnostics="estimate")
    assert found.kappa[0] == math.inf
    assert found.kappa[1] < 1.2
    assert found.x[0].isnan().all()


def test_a_non_finite_logit_is_estimated_nan_beside_untouched_neighbours():
    logits, rhs = torch.eye(5).repeat(3, 1, 1), torch.ones(3, 5, 2)
    untouched = landmark_solve(logits, rhs, diagnostics="estimate").kappa
    logits[1, 0, 3] = math.nan
    found = landmark_solve(logits, rhs, diagnostics="estimate").kappa
    assert found[1].isnan()
    assert torch.equal(found[[0, 2]], untouched[[0, 2]])


def test_diagnostics_takes_no_other_word():
    with pytest.raises(ValueError, match="estimate"):
        landmark_solve(torch.eye(3), torch.ones(3, 2), diagnostics="exact")


@pytest.mark.parametrize("solver", ["cholesky", "lu", "neumann"])
@pytest.mark.parametrize("equilibrate", [False, True])
def test_these_solvers_ask_the_host_nothing(solver, equilibrate):
    """Meta tensors have no values, so a solver that reads a value on the host would raise an error."""
    logits, rhs = torch.empty(2, 8, 8, device="meta"), torch.empty(2, 8, 4, device="meta")
    x, used = reference.landmark_solve(logits, rhs, SolveOptions(solver=solver, equilibrate=equilibrate))
    reference.landmark_diagnostics(logits, rhs, x, used, 1e-3, equilibrate, True)
    assert (x.shape, used.shape) == (rhs.shape, (2,))


def test_auto_asks_the_host_which_matrices_need_an_svd():
    logits, rhs = torch.empty(2, 8, 8, device="meta"), torch.empty(2, 8, 4, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        reference.landmark_solve(logits, rhs, SolveOptions(solver="auto"))


def test_auto_takes_the_svd_of_the_flagged_matrices_only(monkeypatch):
    """Only one of the five matrices has κ above κ_max, and only this matrix is solved by SVD.

    The results of the other matrices are bit-equal to those of LU.
    """
    keys = oracle.normalise(tokens(3, 5, 8, 16))
    keys[2, 1] = keys[2, 0]
    logits, rhs = (keys @ keys.mT / 4).float(), tokens(4, 5, 8, 3).float()
    kappa = oracle.condition(oracle.system(logits, rhs, 1e-3).matrix)
    limit = float(kappa[[0, 1, 3, 4]].max()) * 2
    assert kappa[2] > 4 * limit
    seen = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda A: seen.append(A.shape) or svd(A))
    found = landmark_solve(logits, rhs, solver="auto", kappa_max=limit, diagnostics="estimate")
    assert seen == [(1, 8, 8)]
    assert found.solver.tolist() == [Solver.LU, Solver.LU, Solver.SVD, Solver.LU, Solver.LU]
    keep = [0, 1, 3, 4]
    assert torch.equal(found.x[keep], landmark_solve(logits, rhs, solver="lu").x[keep])
    L = oracle.softmax(tokens(5, 5, 20, 8))
    plain = oracle.plain_solve(logits, rhs, 1e-3, solver="svd")
    oracle.agree((L @ found.x.double()).float(), L @ oracle.solve(logits, rhs), L @ plain.double())
