"""Tests of first derivatives by `gradcheck` in fp64, and of the reference's second derivatives by `gradgradcheck`."""

from __future__ import annotations

import math
from collections.abc import Callable

import oracle
import pytest
import torch
from oracle import tokens
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import srm_kernels
from srm_kernels import (
    Solver,
    biased_gelu,
    dyt,
    full_attention,
    gate_logits,
    gate_losses,
    gated_fusion,
    landmark_solve,
    nystrom_attention,
    ridge_leverage_scores,
    rms_scale,
    select_landmarks,
)
from srm_kernels.conditioning import SOLVERS
from srm_kernels.landmarks import LANDMARK_METHODS

QK_NORMS = (None, "keys", "both")


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() for x in tensors)


def attention_inputs(nq: int = 4, nk: int = 6, d: int = 3) -> tuple[tuple[Tensor, ...], Tensor]:
    q, k, v = leaves(tokens(0, 1, 2, nq, d), tokens(1, 1, 2, nk, d), tokens(2, 1, 2, nk, d))
    return (q, k, v), select_landmarks(k.detach(), 3)


def solve_inputs(family: str = "random") -> tuple[Tensor, ...]:
    if family == "orthogonal":  # W is close to the identity, so the Neumann series converges fast
        keys = 3 * torch.eye(4, 5, dtype=torch.float64).expand(1, 2, 4, 5)
    else:
        keys = oracle.landmark_family(family, 3, 1, 2, 4, 5)
    return leaves(keys @ keys.mT / math.sqrt(5), tokens(4, 1, 2, 4, 3))


def fusion_inputs() -> tuple[Tensor, ...]:
    """Return inputs of two images: the norm of the first fused map is below a cap of 3, that of the second above 3."""
    maps = tokens(5, 2, 3, 2, 2, 2) * torch.tensor([0.2, 4.0], dtype=torch.float64)[:, None, None, None, None]
    return leaves(maps, tokens(6, 2, 3))


@pytest.mark.parametrize("equilibrate", [False, True])
@pytest.mark.parametrize("family", ["random", "duplicated", "orthogonal"])
@pytest.mark.parametrize(("solver", "gate"), [*((s, True) for s in SOLVERS), ("neumann", False)])
def test_landmark_solve(solver, gate, family, equilibrate):
    """With its gate, `neumann` uses the series for orthogonal keys only; without its gate, for all keys."""
    options = {"ridge": 0.05, "solver": solver, "equilibrate": equilibrate, "neumann_gate": gate}

    def x(logits: Tensor, rhs: Tensor) -> Tensor:
        return landmark_solve(logits, rhs, **options).x

    inputs = solve_inputs(family)
    used = landmark_solve(*inputs, **options, diagnostics=True).solver
    by_series = solver == "neumann" and (family == "orthogonal" or not gate)
    assert ((used == Solver.NEUMANN) == by_series).all()
    assert gradcheck(x, inputs)


@pytest.mark.parametrize("solver", SOLVERS)
def test_landmark_solve_with_asymmetric_logits(solver):
    """With `cholesky`, LU solves the matrix, because the asymmetry of the logits exceeds the tolerance.

    The derivative of LU treats l_ij and l_ji as separate variables.
    """
    logits, rhs = solve_inputs()
    with torch.no_grad():
        logits[0, 0, 0, 1] += 0.3

    def x(logits: Tensor, rhs: Tensor) -> Tensor:
        return landmark_solve(logits, rhs, ridge=0.05, solver=solver, neumann_gate=False).x

    assert gradcheck(x, (logits, rhs))


@pytest.mark.parametrize("solver", ["lu", "auto"])
def test_landmark_solve_without_a_ridge(solver):
    """The matrix is invertible. `svd` is not tested, because it has to be differentiable for λ0 > 0 only."""
    assert gradcheck(lambda a, b: landmark_solve(a, b, ridge=0.0, solver=solver).x, solve_inputs())


@pytest.mark.parametrize("qk_norm", QK_NORMS)
@pytest.mark.parametrize("equilibrate", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_nystrom_attention(solver, equilibrate, qk_norm):
    tensors, landmarks = attention_inputs()

    def y(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nystrom_attention(
            q,
            k,
            v,
            3,
            landmarks=landmarks,
            ridge=0.02,
            solver=solver,
            equilibrate=equilibrate,
            qk_norm=qk_norm,
        )

    assert gradcheck(y, tensors)


@pytest.mark.parametrize("solve_dtype", ["fp32", "model"])
@pytest.mark.parametrize("method", LANDMARK_METHODS)
def test_nystrom_attention_with_its_own_landmarks(method, solve_dtype):
    tensors, _ = attention_inputs()
    assert gradcheck(
        lambda q, k, v: nystrom_attention(q, k, v, 3, method=method, qk_norm="keys", solve_dtype=solve_dtype),
        tensors,
    )


def test_nystrom_attention_with_one_landmark_every_landmark_and_a_scale():
    tensors, _ = attention_inputs()
    for rank in (1, 6):
        assert gradcheck(lambda q, k, v: nystrom_attention(q, k, v, rank, ridge=0.1, scale=0.3), tensors)  # noqa: B023


@pytest.mark.parametrize(("solver", "qk_norm"), [("cholesky", "keys"), ("lu", None), ("svd", "both")])
def test_nystrom_attention_through_fused_attention(solver, qk_norm):
    """With 16 or more landmarks, torch's fused attention computes R V and L X."""
    tensors, _ = attention_inputs(nq=3, nk=18, d=2)
    assert gradcheck(
        lambda q, k, v: nystrom_attention(q, k, v, 16, ridge=0.1, solver=solver, qk_norm=qk_norm), tensors
    )


@pytest.mark.parametrize("nk", [6, 16])
@pytest.mark.parametrize("qk_norm", QK_NORMS)
def test_full_attention(qk_norm, nk):
    tensors, _ = attention_inputs(nk=nk)
    assert gradcheck(lambda q, k, v: full_attention(q, k, v, qk_norm=qk_norm, scale=0.4), tensors)


def test_leverage_scores():
    assert gradcheck(lambda k: ridge_leverage_scores(k, gamma=0.1), leaves(tokens(7, 1, 2, 6, 3)))


def test_rms_statistic():
    assert gradcheck(rms_scale, leaves(tokens(8, 2, 2, 4, 3) + 1))


def test_dyt():
    x, alpha, weight, bias = (
        tokens(9, 2, 3, 4),
        torch.tensor(0.6, dtype=torch.float64),
        tokens(10, 4),
        tokens(11, 4),
    )
    assert gradcheck(dyt, leaves(x, alpha, weight, bias))


@pytest.mark.parametrize("cap", [None, 3.0])
def test_gated_fusion(cap):
    maps, logits = fusion_inputs()
    if cap:
        assert (gated_fusion(maps, logits, cap=cap).gain < 1).tolist() == [False, True]
    assert gradcheck(lambda m, g: tuple(gated_fusion(m, g, cap=cap, temperature=0.7)), (maps, logits))


def test_gate_losses():
    """The entropy of one image is below the floor, that of the other above; neither is near the kink at the floor."""
    weights = torch.tensor([[0.9, 0.05, 0.05], [0.3, 0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda a: gate_losses(a, entropy_floor=0.7), (weights,))


# Half and single precision gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", ["cholesky", "lu", "svd"])
def test_attention_gradients_in_lower_dtypes(solver, dtype):
    """The gradients satisfy `oracle.agree`.

    `plain` contains the gradients that autograd computes through plain PyTorch in the same storage dtype, with
    intermediate results in fp32.
    """
    tensors = [tokens(seed, 2, 2, n, 16, dtype=dtype) for seed, n in ((20, 40), (21, 30), (22, 30))]
    weight = tokens(23, 2, 2, 40, 16, dtype=dtype)
    landmarks = select_landmarks(oracle.normalise(tensors[1].float()), 16)

    def gradients(f: Callable[..., Tensor], upcast: bool) -> tuple[Tensor, ...]:
        inputs = leaves(*(x.double() if upcast else x for x in tensors))
        return torch.autograd.grad(f(*inputs), inputs, weight.double() if upcast else weight)

    found = gradients(
        lambda q, k, v: nystrom_attention(q, k, v, 16, landmarks=landmarks, qk_norm="keys", solver=solver),
        False,
    )
    plain = gradients(
        lambda q, k, v: oracle.plain_nystrom(
            q, k, v, landmarks, qk_norm="keys", solver="svd" if solver == "svd" else "lu"
        ),
        False,
    )
    exact = gradients(lambda q, k, v: oracle.nystrom(q, k, v, landmarks, qk_norm="keys"), True)
    for f, e, p in zip(found, exact, plain, strict=True):
        assert f.dtype == dtype
        oracle.agree(f, e, p)


def test_gradients_of_some_inputs_are_those_of_all():
    tensors, landmarks = attention_inputs()
    y = nystrom_attention(*tensors, 3, landmarks=landmarks)
    expected = torch.autograd.grad(y.square().sum(), tensors)
    for i in range(3):
        only = [x.detach().requires_grad_(j == i) for j, x in enumerate(tensors)]
        y = nystrom_attention(*only, 3, landmarks=landmarks)
        (found,) = torch.autograd.grad(y.square().sum(), only[i])
        oracle.agree(found, expected[i])


def test_expanded_inputs_receive_the_sum():
    (q, k, v), landmarks = attention_inputs()
    (shared,) = leaves(k[:, :1])
    y = nystrom_attention(q, shared.expand_as(k), v, 3, landmarks=landmarks)
    (found,) = torch.autograd.grad(y.square().sum(), shared)
    (full,) = leaves(shared.detach().expand_as(k))
    (per_head,) = torch.autograd.grad(
        nystrom_attention(q, full, v, 3, landmarks=landmarks).square().sum(), full
    )
    oracle.agree(found, per_head.sum(1, keepdim=True))


def test_the_gradient_flows_through_the_landmark_keys():
    """The gradient of the keys equals that of the oracle, which also differentiates through the landmark keys."""
    (q, k, v), _ = attention_inputs()
    landmarks = torch.zeros(1, 2, 2, dtype=torch.int64) + torch.tensor([0, 1])
    y = nystrom_attention(q, k, v, 2, landmarks=landmarks)
    (grad,) = torch.autograd.grad(y.square().sum(), k)
    (exact,) = leaves(k)
    (expected,) = torch.autograd.grad(
        oracle.nystrom(q.detach(), exact, v.detach(), landmarks).square().sum(), exact
    )
    oracle.agree(grad, expected)


# Second derivatives

TWICE: dict[str, tuple[Callable[..., object], Callable[[], tuple[Tensor, ...]]]] = {
    "nystrom_attention": (
        lambda q, k, v, **kw: nystrom_attention(q, k, v, 2, ridge=0.1, qk_norm="keys", **kw),
        lambda: attention_inputs(nq=2, nk=3, d=2)[0],
    ),
    "landmark_solve": (lambda a, b, **kw: landmark_solve(a, b, ridge=0.1, **kw).x, solve_inputs),
    "landmark_solve_equilibrated": (
        lambda a, b, **kw: landmark_solve(a, b, ridge=0.1, equilibrate=True, **kw).x,
        solve_inputs,
    ),
    "landmark_solve_lu": (
        lambda a, b, **kw: landmark_solve(a, b, ridge=0.1, solver="lu", **kw).x,
        solve_inputs,
    ),
    "landmark_solve_svd": (
        lambda a, b, **kw: landmark_solve(a, b, ridge=0.1, solver="svd", **kw).x,
        solve_inputs,
    ),
    "landmark_solve_neumann": (
        lambda a, b, **kw: landmark_solve(a, b, solver="neumann", neumann_gate=False, **kw).x,
        solve_inputs,
    ),
    "full_attention": (full_attention, lambda: attention_inputs(nq=2, nk=3, d=2)[0]),
    "ridge_leverage_scores": (
        lambda k, **kw: ridge_leverage_scores(k, gamma=0.1, **kw),
        lambda: leaves(tokens(7, 1, 1, 4, 2)),
    ),
    "rms_scale": (rms_scale, lambda: leaves(tokens(8, 2, 1, 3, 2) + 1)),
    "dyt": (
        dyt,
        lambda: leaves(tokens(9, 2, 3), torch.tensor(0.6, dtype=torch.float64), tokens(10, 3), tokens(11, 3)),
    ),
    "gated_fusion": (lambda m, g, **kw: tuple(gated_fusion(m, g, cap=3.0, **kw)), fusion_inputs),
    "biased_gelu": (
        lambda x, y, b, **kw: biased_gelu([x, y], [b, 2 * b], **kw),
        lambda: leaves(tokens(12, 1, 2, 2, 2), tokens(13, 1, 2, 2, 2), tokens(14, 2)),
    ),
    "gate_logits": (
        lambda x, b, w, v, **kw: gate_logits([x, 2 * x], [b, b], [(w, v), (2 * w, v)], **kw),
        lambda: leaves(tokens(15, 2, 2, 2, 2), tokens(16, 2), tokens(17, 1, 2), tokens(18, 1)),
    ),
    "gate_losses": (
        lambda a, **kw: gate_losses(a, entropy_floor=0.7, **kw),
        lambda: leaves(torch.tensor([[0.9, 0.05, 0.05], [0.3, 0.3, 0.4]], dtype=torch.float64)),
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives_through_the_reference(name):
    function, make = TWICE[name]
    assert gradgradcheck(lambda *x: function(*x, backend="reference"), make())


def twice(name: str, backend: str | None) -> tuple[Tensor, ...]:
    function, make = TWICE[name]
    inputs = make()
    out = function(*inputs, backend=backend)
    outs = out if isinstance(out, tuple) else (out,)
    first = torch.autograd.grad(sum(o.square().sum() for o in outs), inputs, create_graph=True)
    assert all(g.requires_grad for g in first)
    return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)


@pytest.mark.parametrize("name", [name for name in TWICE if name != "full_attention"])
def test_second_derivatives_of_the_chosen_backend_are_the_references(name):
    for found, expected in zip(twice(name, None), twice(name, "reference"), strict=True):
        oracle.agree(found, expected)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_torchs_own_attention_says_that_it_has_no_second_derivative(backend):
    """There are 16 keys, because with fewer keys the reference would run instead of torch's fused kernel."""
    inputs, _ = attention_inputs(nk=16)
    (first,) = torch.autograd.grad(
        full_attention(*inputs, backend=backend).sum(), inputs[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="derivative"):
        torch.autograd.grad(first.square().sum(), inputs)


def test_indices_and_backends_carry_no_gradient():
    (key,) = leaves(tokens(12, 1, 1, 8, 3))
    for method in LANDMARK_METHODS:
        assert not srm_kernels.select_landmarks(key, 4, method=method).requires_grad
