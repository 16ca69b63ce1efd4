"""Tests of all operators under torch.func and in forward mode: the derivatives equal those of `torch.autograd.grad`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from oracle import tokens
from test_operator_registration import CALLS, leaves_of
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap

from srm_kernels import full_attention, landmark_solve, nystrom_attention, ridge_leverage_scores
from srm_kernels.conditioning import SOLVERS

DIFFERENTIABLE = [name for name in CALLS if "select" not in name]
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def scalar(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return a function that sums the squares of all elements of the floating-point results, each with a weight."""

    def total(*inputs: Tensor) -> Tensor:
        outs = [out for out in leaves_of(function(*inputs)) if out.is_floating_point()]
        weights = (torch.linspace(1, 2, out.numel(), dtype=out.dtype).view(out.shape) for out in outs)
        return sum(((out * weight).square().sum() for out, weight in zip(outs, weights, strict=True)), 0)

    return total


def agree(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def case(name: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], list[Tensor]]:
    function, make = CALLS[name]
    inputs = make(torch.float64)
    return scalar(function), inputs, [tokens(50 + i, x.numel()).view_as(x) for i, x in enumerate(inputs)]


def by_tape(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


def along(gradients: tuple[Tensor, ...], directions: list[Tensor]) -> Tensor:
    return torch.stack([(g * d).sum() for g, d in zip(gradients, directions, strict=True)]).sum()


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_first_derivatives(name):
    function, inputs, directions = case(name)
    numbers = tuple(range(len(inputs)))
    expected = by_tape(function, inputs)
    agree(grad(function, numbers)(*inputs), expected)
    agree(jacrev(function, numbers)(*inputs), expected)
    agree(jacfwd(function, numbers)(*inputs), expected)
    slope = along(expected, directions)
    agree(jvp(function, inputs, tuple(directions)), (function(*inputs), slope))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, d) for x, d in zip(inputs, directions, strict=True)]
        agree([forward_ad.unpack_dual(function(*duals)).tangent], [slope])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_of_every_sample(name):
    """vmap over grad gives the gradients of each sample, as if the operator were called for each sample alone."""
    function, inputs, _ = case(name)
    numbers = tuple(range(len(inputs)))
    others = tuple(0.5 * x.flip(0) if x.dim() else 0.5 * x for x in inputs)
    if name == "gate_losses":
        others = tuple(x / x.sum(-1, keepdim=True) for x in others)
    both = [torch.stack(pair) for pair in zip(inputs, others, strict=True)]
    found = vmap(grad(function, numbers))(*both)
    agree([one[0] for one in found], by_tape(function, inputs))
    agree([one[1] for one in found], by_tape(function, others))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_forward_over_reverse(name):
    """Forward mode over `grad` gives the same second derivatives as `torch.autograd.grad` applied twice.

    The second call of `torch.autograd.grad` differentiates the reference.
    """
    function, inputs, directions = case(name)
    found = jvp(grad(function, tuple(range(len(inputs)))), inputs, tuple(directions))[1]
    leaves = [x.clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    expected = torch.autograd.grad(along(first, directions), leaves, materialize_grads=True)
    agree(found, expected)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_dual_cotangent_goes_through_a_tape_that_was_recorded_before(name):
    """A tangent of 3 times the upstream gradient gives every gradient a tangent of 3 times its value.

    The backward pass is linear in the upstream gradient.
    """
    function, inputs, _ = case(name)
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = function(*leaves)
    with forward_ad.dual_level():
        seed = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 3.0))
        for gradient in torch.autograd.grad(loss, leaves, seed):
            primal, tangent = forward_ad.unpack_dual(gradient)
            torch.testing.assert_close(tangent, 3 * primal)


@pytest.mark.parametrize("equilibrate", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver(solver, equilibrate):
    keys = oracle.landmark_family("smooth", 3, 2, 1, 4, 8)
    logits, rhs = keys @ keys.mT / 8**0.5, tokens(4, 2, 1, 4, 3)

    def solve(logits: Tensor, rhs: Tensor) -> Tensor:
        found = landmark_solve(logits, rhs, solver=solver, equilibrate=equilibrate, kappa_max=20.0)
        return found.x.square().sum()

    expected = by_tape(solve, (logits, rhs))
    agree(grad(solve, (0, 1))(logits, rhs), expected)
    directions = [tokens(5, *logits.shape), tokens(6, *rhs.shape)]
    agree([jvp(solve, (logits, rhs), tuple(directions))[1]], [along(expected, directions)])
    per_sample = vmap(grad(solve, (0, 1)))(logits, rhs)
    agree(per_sample, expected)  # samples are independent of one another


def test_a_third_derivative_of_the_solve():
    keys = oracle.landmark_family("random", 3, 1, 1, 3, 8)
    logits, rhs = (keys @ keys.mT / 8**0.5)[0, 0], tokens(4, 3, 2)

    def f(t: Tensor) -> Tensor:
        return landmark_solve(logits * t, rhs).x.square().sum()

    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    expected = f(t)
    for _ in range(3):
        (expected,) = torch.autograd.grad(expected, t, create_graph=True)
    torch.testing.assert_close(jacfwd(hessian(f))(t.detach()), expected.detach(), rtol=1e-6, atol=1e-9)


def test_values_under_a_transform_are_the_operators():
    q, k, v = (tokens(i, 1, 2, n, 8) for i, n in enumerate((40, 24, 24)))
    expected = nystrom_attention(q, k, v, 16)
    value, _ = jvp(lambda q: nystrom_attention(q, k, v, 16), (q,), (torch.ones_like(q),))
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_exact_attention_in_forward_mode():
    """`backend=None` uses the reference in forward mode and for second derivatives.

    torch's fused kernel for the CPU supports neither.
    """
    q, k, v = (tokens(i, 1, 2, 20, 8) for i in range(3))
    d = tokens(4, 1, 2, 20, 8)

    def f(q: Tensor) -> Tensor:
        return full_attention(q, k, v).square().sum()

    (expected,) = by_tape(f, (q,))
    torch.testing.assert_close(jvp(f, (q,), (d,))[1], (expected * d).sum())
    assert jvp(grad(f), (q,), (d,))[1].abs().max() > 0


def test_compiled_around_a_transform():
    q, k, v = (tokens(i, 1, 2, n, 8) for i, n in enumerate((10, 7, 7)))

    def f(q: Tensor) -> Tensor:
        return nystrom_attention(q, k, v, 4).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(grad(f), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), grad(f)(q))


def test_kernels_asked_for_are_differentiated_through_the_reference():
    pytest.importorskip("triton")
    q, k, v = (tokens(i, 1, 2, n, 8, dtype=torch.float32) for i, n in enumerate((10, 7, 7)))
    d = tokens(4, 1, 2, 10, 8, dtype=torch.float32)
    found, expected = (
        jvp(lambda q, b=b: nystrom_attention(q, k, v, 4, backend=b).square().sum(), (q,), (d,))[1]
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected)


def test_linearized_functions_have_the_derivative_of_jvp():
    query, key, value = (tokens(seed, 1, 2, 20, 8) for seed in range(3))
    functions = (
        lambda k: nystrom_attention(query, k, value, rank=4, qk_norm="keys").sum(),
        lambda k: ridge_leverage_scores(k).sum(),
        lambda k: landmark_solve(k @ k.mT, value).x.sum(),
    )
    for function in functions:
        out, derivative = linearize(function, key)
        expected, tangent = jvp(function, (key,), (torch.ones_like(key),))
        agree((out, derivative(torch.ones_like(key))), (expected, tangent))
