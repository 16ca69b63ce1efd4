"""Test `landmark_solve`, X = W_λ⁻¹ (R V): every solver is compared with an fp64 solve.

In fp64, X satisfies `oracle.agree` with a relative tolerance of 1e-10. In fp32, the error of X can be large if κ is
large. The tests in fp32 therefore check two other quantities:

- L·X satisfies `oracle.agree`, with plain `torch.linalg` in fp32 as the baseline.
- The normwise backward error ‖A X − G‖ / (‖A‖‖X‖ + ‖G‖) of the system A X = G is at most 10 r eps.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import tokens
from torch import Tensor

from srm_kernels import Solver, checks, landmark_solve
from srm_kernels.conditioning import SOLVERS

DIRECT = ("cholesky", "lu", "svd", "auto")
FAMILIES = ("random", "duplicated", "smooth")


def problem(
    family: str, r: int = 16, d: int = 24, b: int = 2, h: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return the logits (b, h, r, r) of normalised landmark keys, and a right-hand side (b, h, r, d)."""
    keys = oracle.landmark_family(family, 7, b, h, r, d)
    return (keys @ keys.mT / math.sqrt(d)).to(dtype), tokens(8, b, h, r, d, dtype=dtype)


def uniform_logits(offset: float, r: int) -> Tensor:
    """Return logits (r, r) whose softmax is W = (1 − a) I + (a/r) 11ᵀ, with the coefficient a from `spread`.

    The spectral radius of I − αW_λ is then a/(1 + λ).
    """
    return torch.diag(torch.full((r,), offset, dtype=torch.float64))


def spread(offset: float, r: int) -> float:
    """Return the coefficient a of `uniform_logits`."""
    return r / (math.exp(offset) + r - 1)


@pytest.mark.parametrize("equilibrate", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("solver", DIRECT)
@pytest.mark.parametrize("ridge", [1e-3, 1e-1])
def test_solvers_in_fp64(solver, family, equilibrate, ridge):
    logits, rhs = problem(family)
    result = landmark_solve(logits, rhs, ridge=ridge, solver=solver, equilibrate=equilibrate)
    assert result.x.dtype == torch.float64
    oracle.agree(result.x, oracle.solve(logits, rhs, ridge, equilibrate))
    assert result[1:] == (None, None, None, None)


@pytest.mark.parametrize(("r", "d"), [(1, 5), (2, 1), (5, 59), (33, 40), (64, 32)])
@pytest.mark.parametrize("solver", DIRECT)
def test_any_size(solver, r, d):
    logits, rhs = problem("random", r=r, d=d)
    oracle.agree(landmark_solve(logits, rhs, solver=solver).x, oracle.solve(logits, rhs))


@pytest.mark.parametrize("equilibrate", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("solver", DIRECT)
def test_solvers_in_fp32(solver, family, equilibrate):
    """Solve sixty systems like those of attention: G = R V, and the 96 keys of R are 32 landmarks and 64 others."""
    b, h, r, d = 20, 3, 32, 24
    landmarks = oracle.landmark_family(family, 7, b, h, r, d)
    keys = torch.cat([landmarks, oracle.normalise(tokens(8, b, h, 64, d))], 2)
    logits = (landmarks @ landmarks.mT / math.sqrt(d)).float()
    rhs = (oracle.softmax(landmarks @ keys.mT / math.sqrt(d)) @ tokens(9, b, h, 96, d)).float()
    x = landmark_solve(logits, rhs, solver=solver, equilibrate=equilibrate).x
    assert x.dtype == torch.float32

    L = oracle.softmax(2 * tokens(10, b, h, 50, r))
    exact = oracle.solve(logits, rhs, 1e-3, equilibrate)
    plain = oracle.plain_solve(logits, rhs, 1e-3, equilibrate, "svd" if solver == "svd" else "lu")
    oracle.agree((L @ x.double()).float(), L @ exact, (L @ plain.double()).float())

    s = oracle.system(logits, rhs, 1e-3, equilibrate)
    z = x.double() / s.scale
    residual = oracle.frobenius(s.matrix @ z - s.right)
    size = oracle.frobenius(s.matrix) * oracle.frobenius(z) + oracle.frobenius(s.right)
    assert (residual / size).max() <= 10 * r * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", DIRECT)
def test_half_precision_input_is_solved_in_fp32(solver, dtype):
    """Logits that are rounded to bf16 or fp16 stay symmetric, and X is in fp32."""
    logits, rhs = problem("random", dtype=dtype)
    x = landmark_solve(logits, rhs, solver=solver).x
    assert x.dtype == torch.float32
    plain = oracle.plain_solve(logits, rhs, 1e-3, solver="svd" if solver == "svd" else "lu")
    oracle.agree(x, oracle.solve(logits, rhs), plain)


@pytest.mark.parametrize("solver", DIRECT)
def test_leading_dimensions_and_strides(solver):
    logits, rhs = problem("random")
    exact = oracle.solve(logits, rhs)
    oracle.agree(landmark_solve(logits[0, 0], rhs[0, 0], solver=solver).x, exact[0, 0])
    oracle.agree(landmark_solve(logits[0], rhs[0], solver=solver).x, exact[0])
    column_major = rhs.mT.contiguous().mT
    oracle.agree(
        landmark_solve(logits.transpose(0, 1), column_major.transpose(0, 1), solver=solver).x,
        exact.mT.mT.transpose(0, 1),
    )
    expanded = landmark_solve(logits[:1, :1].expand(2, 3, 16, 16), rhs, solver=solver).x
    oracle.agree(expanded, oracle.solve(logits[:1, :1].expand(2, 3, 16, 16), rhs))


@pytest.mark.parametrize("equilibrate", [False, True])
@pytest.mark.parametrize("solver", ["svd", "auto"])
def test_no_ridge_and_duplicated_landmarks_give_the_minimum_norm_solution(solver, equilibrate):
    logits, rhs = problem("duplicated", r=8)
    x = landmark_solve(logits, rhs, ridge=0.0, solver=solver, equilibrate=equilibrate).x
    exact = oracle.pseudo_inverse_solve(logits, rhs, 0.0, torch.finfo(torch.float64).eps, equilibrate)
    oracle.agree(x, exact)
    if not equilibrate:
        torch.testing.assert_close(x[..., :4, :], x[..., 4:, :], rtol=1e-8, atol=1e-8)


def test_no_ridge_in_fp32_drops_the_singular_values_that_are_rounding():
    logits, rhs = problem("duplicated", r=8, dtype=torch.float32)
    x = landmark_solve(logits, rhs, ridge=0.0, solver="svd").x
    exact = oracle.pseudo_inverse_solve(logits, rhs, 0.0, torch.finfo(torch.float32).eps)
    kept = torch.linalg.svdvals(oracle.softmax(logits))[..., 3]  # the other four are rounding errors
    assert ((x.double() - exact).abs().amax((-2, -1)) <= 64 * 1.2e-7 / kept**2 * rhs.abs().max()).all()


@pytest.mark.parametrize("solver", ["lu", "svd", "auto"])
def test_no_ridge_is_the_plain_inverse_where_there_is_one(solver):
    logits, rhs = problem("random", r=6)
    oracle.agree(landmark_solve(logits, rhs, ridge=0.0, solver=solver).x, oracle.solve(logits, rhs, 0.0))


def test_cholesky_needs_a_ridge():
    logits, rhs = problem("random")
    with pytest.raises(ValueError, match="ridge"):
        landmark_solve(logits, rhs, ridge=0.0)


# Asymmetric, indefinite and non-finite matrices


@pytest.mark.parametrize("equilibrate", [False, True])
def test_an_asymmetric_matrix_alone_goes_to_lu(equilibrate):
    logits, rhs = problem("random")
    untouched = landmark_solve(logits, rhs, equilibrate=equilibrate)
    logits[1, 2, 0, 3] += 0.5
    result = landmark_solve(logits, rhs, equilibrate=equilibrate, diagnostics=True)
    oracle.agree(result.x, oracle.solve(logits, rhs, equilibrate=equilibrate))
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[1, 2] = False
    assert torch.equal(result.x[keep], untouched.x[keep])
    assert (result.solver == Solver.CHOLESKY).equal(keep)
    assert result.solver[1, 2] == Solver.LU


@pytest.mark.parametrize(("capturing", "made"), [(False, 0), (True, 1)])
def test_on_a_gpu_lu_is_made_only_where_it_is_needed_or_nobody_may_ask(monkeypatch, capturing, made):
    logits, rhs = problem("random")
    monkeypatch.setattr(checks, "may_ask", lambda _: False)  # as for a tensor on a GPU
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(checks, "_on_cuda", lambda _: True)
    calls = []
    plain = torch.linalg.lu_factor_ex
    monkeypatch.setattr(torch.linalg, "lu_factor_ex", lambda A: calls.append(A.shape) or plain(A))
    found = landmark_solve(logits, rhs, backend="reference").x
    assert len(calls) == made
    monkeypatch.undo()
    assert torch.equal(found, landmark_solve(logits, rhs, backend="reference").x)


def test_asymmetry_within_the_tolerance_is_symmetrised():
    """If |l_ij − l_ji| ≤ 1e-3 (1 + max|l|), `cholesky` uses the symmetric part of the logits."""
    logits, rhs = problem("random")
    noise = 1e-4 * tokens(10, 2, 3, 16, 16)
    skew = noise - noise.mT
    result = landmark_solve(logits + skew, rhs, diagnostics=True)
    assert (result.solver == Solver.CHOLESKY).all()
    oracle.agree(result.x, oracle.solve(logits, rhs))


def test_an_indefinite_matrix_alone_goes_to_lu():
    """The logits of one matrix are symmetric but not a Gram matrix.

    Two of their off-diagonal entries are larger than the diagonal entries. S is therefore indefinite, and its Cholesky
    factorisation fails.
    """
    logits, rhs = problem("random", r=4)
    untouched = landmark_solve(logits, rhs)
    logits[0, 1] = torch.zeros(4, 4)
    logits[0, 1, 0, 1] = logits[0, 1, 1, 0] = 3.0
    result = landmark_solve(logits, rhs, diagnostics=True)
    oracle.agree(result.x, oracle.solve(logits, rhs))
    expected = torch.full((2, 3), int(Solver.CHOLESKY))
    expected[0, 1] = int(Solver.LU)
    assert torch.equal(result.solver.long(), expected)
    keep = expected == Solver.CHOLESKY
    assert torch.equal(result.x[keep], untouched.x[keep])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("diagnostics", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_non_finite_logit_makes_its_own_matrix_nan_and_no_other(solver, diagnostics, bad):
    logits, rhs = problem("random", dtype=torch.float32)
    untouched = landmark_solve(logits, rhs, solver=solver, diagnostics=diagnostics)
    logits[0, 1, 4, 2] = bad
    result = landmark_solve(logits, rhs, solver=solver, diagnostics=diagnostics)
    assert result.x[0, 1].isnan().all()
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[0, 1] = False
    assert torch.equal(result.x[keep], untouched.x[keep])
    if diagnostics:
        assert torch.equal(result.kappa[keep], untouched.kappa[keep])
        assert torch.equal(result.solver[keep], untouched.solver[keep])
        assert result.gain[0, 1].isnan()


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_beside_a_non_finite_matrix_are_untouched(solver):
    def gradients(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits, right = logits.clone().requires_grad_(), rhs.clone().requires_grad_()
        x = landmark_solve(logits, right, solver=solver).x
        weight = torch.zeros_like(x)
        weight[1] = 1
        weight[0, 0] = 2
        return torch.autograd.grad((x * weight)[keep].sum(), (logits, right))

    logits, rhs = problem("random")
    keep = torch.ones(2, 3, dtype=torch.bool)
    keep[0, 1] = False
    expected = gradients(logits)
    logits[0, 1, 0, 0] = math.nan
    for found, wanted in zip(gradients(logits), expected, strict=True):
        assert found[keep].isfinite().all()
        assert torch.equal(found[keep], wanted[keep])


# Choice of the solver for each matrix


def test_auto_takes_lu_below_kappa_max_and_svd_above():
    random, rhs = problem("random", r=8, b=1, h=1)
    duplicated, _ = problem("duplicated", r=8, b=1, h=1)
    logits = torch.cat([random, duplicated, random], 1)
    rhs = rhs.expand(1, 3, 8, 24)
    kappa = oracle.condition(oracle.system(logits, rhs, 1e-3).matrix)
    limit = math.sqrt(kappa[0, 0] * kappa[0, 1])
    assert kappa[0, 1] > 10 * kappa[0, 0]
    result = landmark_solve(logits, rhs, solver="auto", kappa_max=limit, diagnostics=True)
    assert result.solver.tolist() == [[Solver.LU, Solver.SVD, Solver.LU]]
    oracle.agree(result.x, oracle.solve(logits, rhs))
    everything = landmark_solve(
        logits, rhs, solver="auto", kappa_max=float(kappa.min() / 2), diagnostics=True
    )
    assert (everything.solver == Solver.SVD).all()


def test_auto_and_equilibration_judge_the_equilibrated_matrix():
    """With `equilibrate`, `auto` compares an estimate of κ of the equilibrated matrix with κ_max.

    The estimate is between 0.5 κ and κ, so it certainly exceeds κ_max only if κ > 2 κ_max. Every matrix for which the
    test expects the SVD has such a κ.
    """
    keys = (
        oracle.normalise(tokens(7, 1, 2, 8, 24))
        * torch.tensor([1.0, 0.2], dtype=torch.float64)[:, None, None]
    )
    keys[0, 0, 0] *= 6
    logits, rhs = keys @ keys.mT / math.sqrt(24), tokens(8, 1, 2, 8, 24)
    kappa, raw = (oracle.condition(oracle.system(logits, rhs, 1e-3, e).matrix)[0] for e in (True, False))
    limit = math.sqrt(kappa[0] * kappa[1])
    assert kappa[0] < limit < 0.5 * kappa[1]
    result = landmark_solve(logits, rhs, solver="auto", equilibrate=True, kappa_max=limit, diagnostics=True)
    assert result.solver.tolist() == [[Solver.LU, Solver.SVD]]
    between = math.sqrt(kappa[0] * raw[0])
    assert kappa[0] < between < 0.5 * raw[0]
    for equilibrate, expected in ((True, Solver.LU), (False, Solver.SVD)):
        result = landmark_solve(
            logits, rhs, solver="auto", equilibrate=equilibrate, kappa_max=between, diagnostics=True
        )
        assert result.solver[0, 0] == expected


@pytest.mark.parametrize("equilibrate", [False, True])
@pytest.mark.parametrize("order", [1, 3, 6])
def test_neumann_without_its_gate_is_the_polynomial(order, equilibrate):
    logits, rhs = problem("random")
    result = landmark_solve(
        logits,
        rhs,
        solver="neumann",
        neumann_order=order,
        neumann_gate=False,
        equilibrate=equilibrate,
        diagnostics=True,
    )
    oracle.agree(result.x, oracle.neumann(logits, rhs, order=order, equilibrate=equilibrate))
    assert (result.solver == Solver.NEUMANN).all()


def test_the_series_is_that_of_the_logits_as_they_are():
    """The Neumann series and its scaling D_c are computed from the logits, not from their symmetric part.

    The logits are so slightly asymmetric that `cholesky` would accept them and use their symmetric part.
    """
    logits, rhs = problem("random")
    logits = 6 * torch.eye(16) + 1e-4 * tokens(10, 2, 3, 16, 16)
    result = landmark_solve(logits, rhs, solver="neumann", equilibrate=True, diagnostics=True)
    assert (result.solver == Solver.NEUMANN).all()
    oracle.agree(result.x, oracle.neumann(logits, rhs, equilibrate=True))


def test_the_neumann_gate_judges_each_matrix():
    """Only the first two of four matrices use the series.

    The spectral radii are about 0.003, 0.2, 0.8 and 0.97. For the third matrix, the residual of the series exceeds its
    limit, 1e-2. For the fourth matrix, the radius exceeds its limit, 0.95.
    """
    r = 8
    offsets = (8.0, 3.5, 1.2, 0.2)
    radii = [spread(o, r) for o in offsets]
    assert radii[1] ** 4 < 1e-2 < radii[2] ** 4
    assert radii[2] < 0.95 < radii[3]
    logits = torch.stack([uniform_logits(o, r) for o in offsets])[None]
    rhs = tokens(11, 1, 4, r, 5)
    result = landmark_solve(logits, rhs, solver="neumann", diagnostics=True)
    assert result.solver.tolist() == [[Solver.NEUMANN, Solver.NEUMANN, Solver.CHOLESKY, Solver.CHOLESKY]]
    oracle.agree(result.x[:, :2], oracle.neumann(logits, rhs)[:, :2])
    oracle.agree(result.x[:, 2:], oracle.solve(logits, rhs)[:, 2:])
    error = (result.x - oracle.solve(logits, rhs)).abs().amax((-2, -1))
    assert error[0, 1] > 1e-4  # X is the truncated series


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_neumann_gate_does_not_start_from_the_vector_that_is_annihilated(dtype):
    """The gate detects that the spectral radius of I − αW_λ is 0.985.

    W is row-stochastic, so I − αW_λ maps the vector of ones to 0. With W = 11ᵀ/4, the result is exactly 0, without
    rounding errors. A power iteration that starts from this vector would estimate a radius of 0. The columns of G are
    vectors of ones, so the residual is small, and only the estimate of the radius can reject the series.
    """
    logits, rhs = torch.zeros(1, 1, 4, 4, dtype=dtype), torch.ones(1, 1, 4, 3, dtype=dtype)
    options = {"ridge": 1 / 16, "solver": "neumann", "diagnostics": True}
    assert landmark_solve(logits, rhs, neumann_gate=False, **options).residual < 1e-6
    assert landmark_solve(logits, rhs, **options).solver.item() == Solver.CHOLESKY


# Diagnostics


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("equilibrate", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_diagnostics(solver, equilibrate, dtype):
    """κ, gain and residual agree with their definitions in fp64.

    The relative tolerance of κ is 1e-5 + r·eps·κ with the eps of fp32, because the error of the smallest singular value
    can be r·eps·σ_max. The relative tolerance of the gain is 1e-5.
    """
    r = 16
    logits, rhs = problem("smooth" if solver != "neumann" else "random", r=r, dtype=dtype)
    result = landmark_solve(
        logits,
        rhs,
        solver=solver,
        equilibrate=equilibrate,
        neumann_gate=False,
        kappa_max=1e9,
        diagnostics=True,
    )
    s = oracle.system(logits, rhs, 1e-3, equilibrate)
    kappa = oracle.condition(s.matrix)
    assert (result.kappa.double() / kappa - 1).abs().max() <= 1e-5 + r * 1.2e-7 * kappa.max()
    assert (
        (result.gain.double() * oracle.frobenius(rhs)) / oracle.frobenius(result.x) - 1
    ).abs().max() <= 1e-5
    z = result.x.double() / s.scale
    residual = oracle.frobenius(s.matrix @ z - s.right) / (oracle.frobenius(s.right) + 1e-12)
    eps = 1.2e-7 if dtype == torch.float32 else 2e-16
    floor = r * eps * (oracle.frobenius(s.matrix) * oracle.frobenius(z) / oracle.frobenius(s.right) + 1)
    assert ((result.residual.double() - residual).abs() <= 1e-5 * residual + floor).all()
    names = {
        "cholesky": Solver.CHOLESKY,
        "lu": Solver.LU,
        "svd": Solver.SVD,
        "auto": Solver.LU,
        "neumann": Solver.NEUMANN,
    }
    assert (result.solver == names[solver]).all()
    assert not result.solver.dtype.is_floating_point
    if dtype == torch.float32:
        assert result.kappa.dtype == result.residual.dtype == result.gain.dtype == torch.float32
    assert result.kappa.shape == result.residual.shape == result.gain.shape == result.solver.shape == (2, 3)


def test_diagnostics_do_not_change_the_solution():
    logits, rhs = problem("smooth", dtype=torch.float32)
    for solver in SOLVERS:
        plain = landmark_solve(logits, rhs, solver=solver).x
        assert torch.equal(landmark_solve(logits, rhs, solver=solver, diagnostics=True).x, plain)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    r=st.integers(1, 24),
    d=st.integers(1, 20),
    ridge=st.floats(1e-4, 0.3),
    outlier=st.floats(1, 1e3),
    copies=st.integers(1, 4),
)
def test_the_condition_number_is_bounded_for_normalised_keys(seed, r, d, ridge, outlier, copies):
    """For normalised keys, κ₂(S + λI) ≤ (1 + λ)/λ, κ₂(W_λ) ≤ r (1 + λ)/λ, and λ ≥ λ0/r.

    The bounds also hold for keys with outliers and duplicates.
    """
    keys = tokens(seed, 1, 1, r, d)
    keys[:, :, 0] *= outlier
    keys = oracle.normalise(keys[:, :, torch.arange(r) // copies])
    logits = keys @ keys.mT / math.sqrt(d)
    result = landmark_solve(logits, tokens(seed + 1, 1, 1, r, d), ridge=ridge, diagnostics=True)
    lam = oracle.system(logits, keys, ridge).ridge
    slack = 1 + 1e-5
    assert (lam >= ridge / r * (1 - 1e-9)).all()
    assert (result.kappa.double() <= slack * r * (1 + lam) / lam).all()
    rows = torch.logsumexp(logits, -1)
    S = torch.exp(logits - (rows[..., :, None] + rows[..., None, :]) / 2)
    assert (
        oracle.condition(S + lam[..., None, None] * torch.eye(r, dtype=torch.float64))
        <= slack * (1 + lam) / lam
    ).all()


def test_large_logits_of_keys_that_are_not_normalised():
    """L·X agrees with the fp64 solve even if the row maxima of the logits differ by hundreds.

    Nothing overflows, and L·X satisfies `oracle.agree`, with plain `torch.linalg` as the baseline.
    """
    keys = tokens(13, 1, 2, 16, 24, scale=2.0)
    keys[0, 0, 3] *= 8
    logits = (keys @ keys.mT / math.sqrt(24)).float()
    rhs = tokens(14, 1, 2, 16, 24, dtype=torch.float32)
    assert logits.max() > 500
    x = landmark_solve(logits, rhs).x
    exact, plain = oracle.solve(logits, rhs), oracle.plain_solve(logits, rhs, 1e-3)
    L = oracle.softmax(tokens(15, 1, 2, 40, 16) * 2)
    oracle.agree((L @ x.double()).float(), L @ exact, (L @ plain.double()).float())
