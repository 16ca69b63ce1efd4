"""Test the Triton kernels for landmark selection, on a GPU or in Triton's interpreter on the CPU.

Scores follow the rule of `srm_kernels.numerics`. Rounding can change the order of nearly equal scores. The exact score
of the i-th selected landmark may therefore differ from the i-th largest exact score by up to 1e-4.
"""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from kernel_rule import within
from oracle import tokens
from torch import Tensor

pytest.importorskip("triton")
from srm_kernels import ridge_leverage_scores, select_landmarks
from srm_kernels.attention.key_kernels import _largest_kernel
from srm_kernels.parts import padded

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16) if DEVICE == "cpu" else (torch.float32, torch.float16, torch.bfloat16)
CLOSE = 1e-4


def keys(seed: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return tokens(seed, 2, 2, n, d, dtype=dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "d"), [(1, 8), (7, 24), (70, 40), (130, 59), (20, 64), (50, 64), (33, 64), (20, 32)]
)
def test_leverage_scores(n, d, dtype):
    """Some cases have fewer keys than dimensions, so KᵀK is singular, and only γ makes KᵀK + γI positive definite."""
    key = keys(n, n, d, dtype)
    found = ridge_leverage_scores(key, backend="triton").cpu()
    plain = ridge_leverage_scores(key.cpu(), backend="reference")
    within(found, plain, oracle.leverage(key.cpu()))
    assert found.min() >= 0


def test_leverage_scores_of_many_keys_in_a_few_directions():
    key = (keys(9, 60, 5) @ keys(10, 5, 40)) / 5**0.5
    found = ridge_leverage_scores(key, gamma=1e-2, backend="triton").cpu()
    plain = ridge_leverage_scores(key.cpu(), gamma=1e-2, backend="reference")
    exact = ridge_leverage_scores(key.cpu().double(), gamma=1e-2, backend="reference")
    within(found, plain, exact)


def test_a_gram_matrix_that_breaks_down_gets_the_ridge_of_its_rounding():
    key = keys(1, 4, 32) * 1e4
    score = ridge_leverage_scores(key, gamma=1e-6, backend="triton")
    assert score.isfinite().all()
    assert score.max() <= 1 + 1e-3


def test_the_gradient_of_the_scores_is_the_references():
    key = keys(2, 20, 8).requires_grad_()
    found, expected = (
        torch.autograd.grad(ridge_leverage_scores(key, gamma=0.1, backend=b).square().sum(), key)[0]
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "r"), [(70, 24, 20), (150, 40, 33), (5, 8, 5)])
def test_the_largest_scores_in_descending_order(n, d, r, dtype):
    key = keys(3, n, d, dtype)
    found = select_landmarks(key, r, backend="triton").cpu()
    scores = oracle.leverage(key.cpu())
    best = scores.sort(-1, descending=True).values[..., :r]
    torch.testing.assert_close(scores.gather(-1, found), best, rtol=0, atol=CLOSE)
    assert all(len(set(row)) == r for row in found.flatten(0, 1).tolist())


@pytest.mark.parametrize(
    ("n", "r"), [(1, 1), (33, 9), (40, 40), (256, 64), (1000, 128), (1024, 5), (1025, 64), (2500, 17)]
)
def test_the_largest_are_those_of_a_stable_sort(n, r):
    """The scores contain many ties, zeros, infinities, NaN and subnormal numbers.

    NaN counts as infinity. In one row, all scores are NaN and therefore equal.
    """
    make = torch.Generator().manual_seed(n)
    scores = torch.rand(6, n, generator=make)
    scores[1] = torch.randint(0, 4, (n,), generator=make) / 4
    scores[2] = (scores[2] > 0.999).float()
    scores[3, torch.rand(n, generator=make) < 0.1] = math.inf
    scores[3, torch.rand(n, generator=make) < 0.1] = math.nan
    scores[4] = torch.randint(0, 50, (n,), generator=make) * 2.0**-149
    scores[5] = math.nan
    expected = (
        scores.nan_to_num(math.inf, posinf=math.inf).sort(dim=-1, descending=True, stable=True).indices[:, :r]
    )
    found = torch.full((7, r), -1, device=DEVICE)  # the kernel must not write to the last row
    _largest_kernel[(6,)](scores.to(DEVICE), found, n, rank=r, R=padded(r), num_warps=8)
    assert torch.equal(found[:6].cpu(), expected)
    assert bool((found[6] == -1).all())


@pytest.mark.parametrize(("n", "r"), [(1, 1), (5, 4), (40, 40), (257, 64), (70_000, 128)])
def test_uniform_landmarks_are_those_of_the_reference(n, r):
    key = torch.zeros(1, 1, 1, 8, device=DEVICE).expand(2, 3, n, 8)
    found = select_landmarks(key, r, method="uniform", backend="triton")
    assert torch.equal(found, select_landmarks(key, r, method="uniform", backend="reference"))


def test_ties_go_to_the_lower_index():
    """Every key occurs twice. Both copies have bitwise equal scores, so the copy with the lower index comes first."""
    key = keys(4, 20, 8).repeat(1, 1, 2, 1)
    found = select_landmarks(key, 40, backend="triton").cpu()
    assert torch.equal(found[..., 1::2], found[..., ::2] + 20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "r"), [(30, 24, 30), (130, 8, 20)])
def test_pivoted_cholesky_is_greedy(n, d, r, dtype):
    """Every selected key has the largest entry on the diagonal of the residual, within the tolerance.

    The test computes the residual in fp64. The tolerance is 1e-4 times the largest entry, plus 1e-6.
    """
    key = keys(5, n, d, dtype)
    found = select_landmarks(key, r, method="pivoted_cholesky", backend="triton").cpu()
    for row, tensor in zip(found.flatten(0, 1).tolist(), key.cpu().double().flatten(0, 1), strict=True):
        logits = tensor @ tensor.T / math.sqrt(d)
        residual = torch.exp(logits - logits.max())
        assert len(set(row)) == r
        for pick in row:
            diagonal = residual.diagonal()
            assert diagonal[pick] >= diagonal.max() * (1 - CLOSE) - CLOSE * 1e-2
            column = residual[:, pick].clone()
            residual = residual - torch.outer(column, column) / max(float(diagonal[pick]), 1e-300)


@pytest.mark.parametrize("method", ["leverage", "pivoted_cholesky"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_indices_are_distinct_and_in_range_whatever_the_keys_hold(method, bad):
    key = keys(6, 20, 8)
    expected = select_landmarks(key, 12, method=method, backend="triton")
    key[0, 1, 4, 2] = bad
    found = select_landmarks(key, 12, method=method, backend="triton")
    assert all(
        len(set(row)) == 12 and min(row) >= 0 and max(row) < 20 for row in found.flatten(0, 1).tolist()
    )
    assert torch.equal(found[1], expected[1])


def test_duplicated_keys_stay_distinct_landmarks_when_every_residual_is_spent():
    key = keys(7, 6, 8).repeat(1, 1, 2, 1)
    found = select_landmarks(key, 12, method="pivoted_cholesky", backend="triton")
    assert all(len(set(row)) == 12 for row in found.flatten(0, 1).tolist())


@pytest.mark.parametrize("method", ["leverage_sample", "kmeans++"])
def test_methods_without_a_kernel_are_refused_with_the_reason(method):
    with pytest.raises(NotImplementedError, match=r"triton.*leverage, uniform and pivoted_cholesky"):
        select_landmarks(keys(8, 9, 8), 4, method=method, backend="triton")
