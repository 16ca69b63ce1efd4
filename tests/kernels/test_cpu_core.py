"""Tests of the C++ library for the default solve on the CPU: its accuracy, and which matrices the reference solves.

The fixture `core` builds the library if it is not installed. The tolerances in fp32 are those of test_solve_grid.py:

- The normwise backward error is at most 8 eps for every κ.
- If κ < 1e3, the relative error of X is at most 2·8·κ·eps, which follows from the bound of the backward error.
- For normalised landmarks, the relative error of L·X is at most twice the error of plain `torch.linalg`, plus 32 eps.

In fp64, X satisfies `oracle.agree` with its default relative tolerance of 1e-10.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import oracle
import pytest
import torch
from kernel_rule import follow_the_rule
from oracle import tokens
from test_solve_grid import BACKWARD, SIZES, backward_error, grid_of, product_error
from torch import Tensor, library

from srm_kernels import Solver, landmark_side, landmark_solve, native, nystrom_attention
from srm_kernels.conditioning import cpu, reference
from srm_kernels.options import SolveOptions

DTYPES = (torch.float32, torch.float64)


pytestmark = pytest.mark.usefixtures("core")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the test fail if the reference is called."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference was asked")

    monkeypatch.setattr(reference, "landmark_solve", refuse)


def solve(logits: Tensor, rhs: Tensor, ridge: float = 1e-3) -> tuple[Tensor, Tensor]:
    return cpu.landmark_solve(logits, rhs, SolveOptions(ridge))


def problem(r: int, batch: int, dtype: torch.dtype, d: int = 7) -> tuple[Tensor, Tensor]:
    keys = oracle.normalise(tokens(r, batch, r, 16))
    return (keys @ keys.mT / 4).to(dtype), tokens(8, batch, r, d, dtype=dtype)


@pytest.mark.parametrize("ridge", [1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("r", SIZES)
def test_every_kind_of_landmarks_in_fp32(r, ridge):
    logits, rhs, L = grid_of(r)
    exact = oracle.solve(logits, rhs, ridge)
    kappa = oracle.condition(oracle.system(logits, rhs, ridge).matrix)
    x, used = solve(logits, rhs, ridge)
    x = x.double()
    assert (used == Solver.CHOLESKY).double().mean() > 0.8
    assert (backward_error(logits, rhs, ridge, x) <= BACKWARD).all()
    relative = oracle.frobenius(x - exact) / oracle.frobenius(exact)
    assert (relative <= 2 * BACKWARD * kappa)[kappa < 1e3].all()
    plain = product_error(L, oracle.plain_solve(logits, rhs, ridge).double(), exact)
    assert product_error(L, x, exact) <= 2 * plain + 4 * BACKWARD


@pytest.mark.parametrize("family", ["random", "smooth", "duplicated"])
@pytest.mark.parametrize("r", SIZES)
def test_normalised_landmarks_in_fp64(alone, r, family):
    keys = oracle.landmark_family(family, 7, 2, 3, r, 24)
    logits, rhs = keys @ keys.mT / math.sqrt(24), tokens(8, 2, 3, r, 5)
    x, used = solve(logits, rhs)
    assert x.dtype == torch.float64
    oracle.agree(x, oracle.solve(logits, rhs))
    assert (used == Solver.CHOLESKY).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_it_does_not_serve_goes_to_the_reference_and_disturbs_no_one(dtype):
    """The reference solves the matrices that the C++ library cannot solve.

    X of each matrix is bit-equal to its X when the matrix is solved alone.
    """
    r = 16
    logits, rhs = problem(r, 9, dtype)
    untouched, _ = solve(logits, rhs)
    logits[1, 2, 5] += 0.5  # asymmetric
    logits[2, 0, 3] = math.nan
    logits[3, 3, 0] = -math.inf
    logits[6, 9, 2] = math.nan
    logits[4] = 0
    logits[4, 0, 1] = logits[4, 1, 0] = 3  # indefinite
    logits[5, 2, 7] = logits[5, 7, 2] = -math.inf
    logits[7] = torch.diag(torch.linspace(0, 2000, r))  # logsumexp of the rows too far apart
    good = torch.ones(9, dtype=torch.bool)
    good[1:8] = False
    x, used = solve(logits, rhs)
    assert torch.equal(x[good], untouched[good])
    wanted, served = reference.landmark_solve(logits, rhs, SolveOptions())
    assert torch.equal(used, served)
    assert served.tolist() == [0, Solver.LU, 0, 0, Solver.LU, 0, 0, Solver.LU, 0]
    assert torch.equal(x[~good].nan_to_num(7), wanted[~good].nan_to_num(7))
    assert x.isnan().flatten(1).all(1).tolist() == [n in (2, 3, 5, 6) for n in range(9)]
    for number in range(9):
        one, by = solve(logits[number], rhs[number])
        assert torch.equal(one.nan_to_num(7), x[number].nan_to_num(7))
        assert by == used[number]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("share", "by"), [(0.9, Solver.CHOLESKY), (1.1, Solver.LU)])
def test_it_ends_where_the_reference_ends(share, by, dtype):
    """The C++ library and the reference have the same limits.

    There is a limit for the asymmetry of the logits, and one for the differences between the rows' logsumexp. The
    logits `skewed` are 10 % below or above the first limit, and the logits `far` are 10 % below or above the second.
    """
    logits, rhs = problem(8, 2, dtype)
    limit = 1e-3 * (1 + float(logits.abs().max()))
    skewed = logits.clone()
    skewed[:, 1, 4] += share * limit / 2
    skewed[:, 4, 1] -= share * limit / 2
    numbers = torch.finfo(dtype)
    spread = math.log((1e-3 * numbers.eps) ** 2 / numbers.tiny)
    far = torch.zeros(2, 8, 8, dtype=dtype)
    far[:, 0, 0] = share * spread + math.log(8)
    for case in (skewed, far):
        x, used = solve(case, rhs)
        assert (used == by).all()
        assert torch.equal(used, reference.landmark_solve(case, rhs, SolveOptions())[1])
        symmetric = (case + case.mT) / 2 if by == Solver.CHOLESKY else case
        backward = backward_error(symmetric, rhs, 1e-3, x) / numbers.eps
        assert (backward <= BACKWARD / torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_that_underflow_are_zero(alone, dtype):
    """The logits are g·I, so W differs from I only by terms of the order of e^−g.

    For large g, e^−g underflows.
    """
    gaps = torch.tensor([60, 86, 87, 88, 90, 104, 130, 400, 700, 708, 750, 2000], dtype=dtype)
    logits, rhs = gaps[:, None, None] * torch.eye(8, dtype=dtype), problem(8, len(gaps), dtype)[1]
    x, used = solve(logits, rhs)
    assert (used == Solver.CHOLESKY).all()
    assert (x - rhs / 1.001).abs().max() <= 4 * torch.finfo(dtype).eps * rhs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_solved_in_fp32(alone, dtype):
    logits, rhs = problem(12, 3, dtype)
    x, _ = solve(logits, rhs)
    assert x.dtype == torch.float32
    assert torch.equal(x, solve(logits.float(), rhs.float())[0])


def test_strides_leading_axes_and_an_empty_batch(alone):
    logits, rhs = problem(12, 6, torch.float32)
    wanted, _ = solve(logits, rhs)
    kept = rhs.clone()
    assert torch.equal(solve(logits.mT.contiguous().mT, rhs.mT.contiguous().mT)[0], wanted)
    assert torch.equal(rhs, kept)
    nested, used = solve(
        logits.unflatten(0, (2, 3)).transpose(0, 1), rhs.unflatten(0, (2, 3)).transpose(0, 1)
    )
    assert torch.equal(nested.transpose(0, 1).flatten(0, 1), wanted)
    assert used.shape == (3, 2)
    expanded = logits[:1].expand(6, -1, -1)
    assert torch.equal(solve(expanded, rhs)[0], solve(expanded.contiguous(), rhs)[0])
    assert torch.equal(solve(logits[2], rhs[2])[0], wanted[2])
    empty, used = solve(logits[:0], rhs[:0])
    assert (empty.shape, used.shape) == ((0, 12, 7), (0,))


def test_one_thread_and_two_give_the_same_bits(alone):
    # The solve takes 20 ms, long enough for two threads to overlap.
    logits, rhs = (t.repeat(50, 1, 1) for t in problem(32, 40, torch.float32))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(solve(logits, rhs)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_gradients_are_the_references():
    """Even if gradients are needed, the C++ library computes the forward pass; the reference computes the gradients."""
    logits, rhs = (t.requires_grad_() for t in problem(6, 3, torch.float64, d=2))
    upstream = tokens(9, 3, 6, 2)
    results = [landmark_solve(logits, rhs, backend=name).x for name in ("torch", "reference")]
    assert torch.equal(results[0], solve(logits.detach(), rhs.detach())[0])
    found, wanted = (torch.autograd.grad(x, (logits, rhs), upstream) for x in results)
    assert all(map(torch.equal, found, wanted))
    recorded, _ = solve(logits, rhs)
    assert all(map(torch.equal, torch.autograd.grad(recorded, (logits, rhs), upstream), wanted))

    def of_symmetric(half: Tensor, rhs: Tensor) -> Tensor:
        return landmark_solve(half + half.mT, rhs, backend="torch").x

    half = (logits.detach() / 2).requires_grad_()
    assert torch.autograd.gradcheck(of_symmetric, (half, rhs))
    assert torch.autograd.gradgradcheck(of_symmetric, (half, rhs))


def test_the_operators_pass_opcheck():
    logits, rhs = problem(5, 2, torch.float32)
    leaves = logits.clone().requires_grad_(), rhs.clone().requires_grad_()
    arguments = (*leaves, *SolveOptions().flat(), "torch")
    library.opcheck(torch.ops.srm.landmark_solve, arguments)
    solve(logits, rhs)  # loads the library
    served = torch.empty(2, dtype=torch.bool)
    core = torch.ops.srm_cpu.symmetric_solve.default
    library.opcheck(core, (logits, rhs.clone(), served, 1e-3), test_utils="test_schema")
    for bad in (rhs.double(), rhs.mT.contiguous().mT, rhs[:1]):
        with pytest.raises(ValueError, match="contiguous"):
            core(logits, bad, served, 1e-3)


def test_attention_takes_it(alone):
    query, key, value = (tokens(i, 1, 2, n, 8, dtype=torch.float32) for i, n in enumerate((40, 30, 30)))
    for backend in (None, "torch"):
        nystrom_attention(query, key, value, 16, backend=backend)
        landmark_side(key, value, 16, backend=backend)
    for call in (partial(nystrom_attention, query), landmark_side):
        with pytest.raises(AssertionError, match="reference was asked"):
            call(key, value, 16, backend="reference")


def test_the_key_side_of_a_link_follows_the_rule():
    arguments = [tokens(i, 2, 2, 30, 8, dtype=torch.float32) for i in (1, 2)]
    follow_the_rule(partial(landmark_side, rank=16, qk_norm="keys"), arguments, backend="torch")


@pytest.mark.parametrize("case", ["not built", "equilibrated", "another solver", "too large"])
def test_all_else_is_the_reference(monkeypatch, case):
    logits, rhs = problem(cpu.LARGEST + 1 if case == "too large" else 8, 2, torch.float32)
    if case == "not built":
        monkeypatch.setattr(native, "BUILT", False)
    solver = "lu" if case == "another solver" else "cholesky"
    options = SolveOptions(solver=solver, equilibrate=case == "equilibrated")
    found, wanted = (f(logits, rhs, options) for f in (cpu.landmark_solve, reference.landmark_solve))
    assert all(map(torch.equal, found, wanted))
