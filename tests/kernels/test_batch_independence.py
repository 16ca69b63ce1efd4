"""Tests that the output and the gradients of a sample do not depend on the other samples of its batch.

- If all other samples are replaced and the batch size stays the same, the results of the sample are bit-equal.
- The gradients of its output with respect to the other samples are exactly zero.
- Its results in the batch differ from its results in a batch of one by at most 16 eps of the largest value. They need
  not be bit-equal, because BLAS kernels can round differently for another batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import oracle
import pytest
import torch
from oracle import tokens
from torch import Tensor

from srm_kernels import (
    biased_gelu,
    dyt,
    full_attention,
    gate_logits,
    gated_fusion,
    landmark_solve,
    nystrom_attention,
    ridge_leverage_scores,
)

Case = tuple[Callable[..., Tensor], Callable[[int, torch.dtype], list[Tensor]]]


def attention_tokens(seed: int, dtype: torch.dtype) -> list[Tensor]:
    return [tokens(seed + i, 5, 2, n, 24, dtype=dtype) for i, n in enumerate((33, 24, 24))]


def solve_tensors(seed: int, dtype: torch.dtype) -> list[Tensor]:
    keys = oracle.landmark_family("random", seed, 5, 2, 12, 24)
    return [(keys @ keys.mT / math.sqrt(24)).to(dtype), tokens(seed, 5, 2, 12, 24, dtype=dtype)]


def fusion_tensors(seed: int, dtype: torch.dtype) -> list[Tensor]:
    return [tokens(seed, 5, 3, 4, 4, 4, dtype=dtype), tokens(seed + 1, 5, 3, dtype=dtype)]


CASES: dict[str, Case] = {
    **{
        f"nystrom-{solver}-{method}": (
            lambda q, k, v, s=solver, m=method: nystrom_attention(
                q, k, v, 16, qk_norm="keys", solver=s, method=m
            ),
            attention_tokens,
        )
        for solver, method in (
            ("cholesky", "leverage"),
            ("lu", "leverage_sample"),
            ("svd", "uniform"),
            ("auto", "kmeans++"),
            ("neumann", "pivoted_cholesky"),
        )
    },
    "nystrom-equilibrated": (
        lambda q, k, v: nystrom_attention(q, k, v, 8, equilibrate=True),
        attention_tokens,
    ),
    "full": (full_attention, attention_tokens),
    **{
        f"solve-{solver}": (lambda a, b, s=solver: landmark_solve(a, b, solver=s).x, solve_tensors)
        for solver in ("cholesky", "lu", "svd", "auto", "neumann")
    },
    "leverage": (ridge_leverage_scores, lambda seed, dtype: [tokens(seed, 5, 2, 20, 8, dtype=dtype)]),
    "fusion": (lambda m, g: gated_fusion(m, g, cap=4.0).fused, fusion_tensors),
    "gate": (
        lambda x: gate_logits(
            biased_gelu([x, -x], [x.new_ones(4)] * 2).unbind(),
            [x.new_ones(4)] * 2,
            [(x.new_ones(1, 4), x.new_ones(1))] * 2,
        ),
        lambda seed, dtype: [tokens(seed, 5, 4, 3, 3, dtype=dtype)],
    ),
    "dyt": (
        lambda x: dyt(
            x, torch.tensor(0.5, dtype=x.dtype), torch.ones_like(x[0, 0]), torch.zeros_like(x[0, 0])
        ),
        lambda seed, dtype: [tokens(seed, 5, 9, 24, dtype=dtype)],
    ),
}


def run(name: str, tensors: list[Tensor], sample: int) -> list[Tensor]:
    """Return the output y of one sample, and the gradients of Σ y² with respect to every input."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = CASES[name][0](*leaves)[sample]
    return [
        out.detach(),
        *torch.autograd.grad(
            out.float().square().sum() if out.dtype != torch.float64 else out.square().sum(), leaves
        ),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_neighbours_do_not_matter(name, dtype):
    tensors, others = CASES[name][1](0, dtype), CASES[name][1](100, dtype)
    changed = [10 * o for o in others] if name != "solve" else others
    for x, y in zip(tensors, changed, strict=True):
        y[2] = x[2]
    found, expected = run(name, changed, 2), run(name, tensors, 2)
    assert torch.equal(found[0], expected[0])
    for f, e in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(f[2], e[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_gradients_do_not_leak_into_other_samples(name, dtype):
    _, *gradients = run(name, CASES[name][1](0, dtype), 3)
    for grad in gradients:
        assert grad[3].abs().max() > 0
        assert grad[[0, 1, 2, 4]].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_alone_and_in_a_batch(name, dtype):
    tensors = CASES[name][1](0, dtype)
    for i in (0, 4):
        together = run(name, tensors, i)
        alone = run(name, [x[i : i + 1] for x in tensors], 0)
        pairs = [
            (together[0], alone[0]),
            *((t[i], a[0]) for t, a in zip(together[1:], alone[1:], strict=True)),
        ]
        for t, a in pairs:
            assert (t - a).abs().max() <= 16 * torch.finfo(dtype).eps * t.abs().max()
