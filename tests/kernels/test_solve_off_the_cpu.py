"""The portable solve where asking a tensor would wait for the device, shown on the CPU: it then keeps LU ready for
matrices that may need it, and of normalised keys for a few only.

`nowhere` answers as it does for a tensor on a GPU; LU factorisations are counted by the matrices that they are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from srm_kernels import landmark_solve, nystrom_attention
from srm_kernels.conditioning import reference
from srm_kernels.conditioning.reference import Solver

B, H, R, D = 4, 8, 6, 8  # 32 matrices, of which LU is kept ready for two
ARGUMENTS = (1e-3, "cholesky", False, 1e6, 3, True)


@pytest.fixture
def factorised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Matrices of every LU factorisation, with `nowhere` as on a GPU."""
    counts: list[int] = []
    plain = torch.linalg.lu_factor_ex

    def counted(A: Tensor) -> object:
        counts.append(A.shape[:-2].numel())
        return plain(A)

    monkeypatch.setattr(torch.linalg, "lu_factor_ex", counted)
    monkeypatch.setattr(reference, "nowhere", lambda mask: False)
    return counts


def problem() -> tuple[Tensor, Tensor]:
    """Logits of normalised keys, (32, R, R), and right-hand sides."""
    draw = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(B * H, R, D, generator=draw), dim=-1) * math.sqrt(D)
    return keys @ keys.mT / math.sqrt(D), torch.randn(B * H, R, D, generator=draw)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(("qk_norm", "count"), [("keys", 2), ("both", 2), (None, B * H)])
def test_attention_of_normalised_keys_factorises_few_matrices_twice(factorised, backend, qk_norm, count):
    draw = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(B, H, 40, D, generator=draw).requires_grad_() for _ in range(3))
    options = {"qk_norm": qk_norm, "backend": backend}
    found = nystrom_attention(q, k, v, 20, **options)
    torch.autograd.grad(found.sum(), (q, k, v))
    assert set(factorised) == {count}


def test_a_ridge_near_rounding_keeps_lu_ready_for_all(factorised):
    logits, rhs = problem()
    reference.landmark_solve(logits, rhs, 1e-6, *ARGUMENTS[1:], normalised=True)
    assert factorised == [B * H]


def test_what_a_caller_gives_may_need_pivoting_everywhere(factorised):
    logits, rhs = problem()
    landmark_solve(logits, rhs, backend="reference")
    assert factorised == [B * H]


def broken(places: list[int]) -> Callable[..., object]:
    """`_cholesky` that reports a breakdown at these matrices."""
    plain = reference._cholesky

    def cholesky(*arguments: object) -> tuple[Tensor, object]:
        good, solve = plain(*arguments)
        good = good.clone()
        good[places] = False
        return good, solve

    return cholesky


def test_a_few_matrices_that_break_down_are_solved_by_pivoting(factorised, monkeypatch):
    """Values, gradients and the solver of each are those of the path that has LU of every matrix."""
    logits, rhs = problem()
    monkeypatch.setattr(reference, "_cholesky", broken([3, 20]))
    found = []
    for normalised in (False, True):
        leaves = logits.clone().requires_grad_(), rhs.clone().requires_grad_()
        x, used = reference.landmark_solve(*leaves, *ARGUMENTS, normalised=normalised)
        assert used.tolist() == [Solver.LU if i in (3, 20) else Solver.CHOLESKY for i in range(B * H)]
        found.append((x, *torch.autograd.grad(x.sin().sum(), leaves)))
    assert factorised == [B * H, 2]
    for few, every in zip(*found, strict=True):
        torch.testing.assert_close(few, every, rtol=1e-5, atol=1e-6)


def test_more_than_a_few_give_nan_and_never_a_plausible_number(factorised, monkeypatch):
    logits, rhs = problem()
    monkeypatch.setattr(reference, "_cholesky", broken([3, 20, 21]))
    x, _ = reference.landmark_solve(logits, rhs, *ARGUMENTS, normalised=True)
    assert x[21].isnan().all()
    assert x[[i for i in range(B * H) if i != 21]].isfinite().all()


def test_one_matrix_alone_has_its_lu(factorised, monkeypatch):
    logits, rhs = (t[0] for t in problem())
    monkeypatch.setattr(reference, "_cholesky", broken(...))
    x, used = reference.landmark_solve(logits, rhs, *ARGUMENTS, normalised=True)
    assert used == Solver.LU
    torch.testing.assert_close(x, landmark_solve(logits, rhs, solver="lu", backend="reference").x)
