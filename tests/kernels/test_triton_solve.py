"""Compare the Triton kernels of the landmark solve with the reference: values, gradients and the solver that was used.

The tests run on a GPU or in Triton's interpreter. Errors of L·X and of the gradients are measured against fp64. Each
bound is a multiple of the error of plain PyTorch in fp32, plus a multiple of eps times the largest exact value. The
matrices are small, because the interpreter takes about one second per matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import oracle
import pytest
import torch
from oracle import tokens
from torch import Tensor, library

from srm_kernels import Solver, backends, landmark_solve
from srm_kernels.conditioning import SOLVERS_OF_KERNELS

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy: 1/0 in masked lanes of the interpreter
    pytest.mark.skipif(not backends()["triton"].available, reason="neither a GPU nor the interpreter"),
]


def problem(r: int, d: int, *, count: int = 2, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return logits and right-hand sides for random landmarks. The last matrix has two equal landmarks."""
    keys = oracle.normalise(tokens(r + d, count, r, d)) * scale
    if r > 1:
        keys[-1, 1] = keys[-1, 0]
    return (keys @ keys.mT / math.sqrt(d)).float(), tokens(r + d + 1, count, r, d, dtype=torch.float32)


def run(
    logits: Tensor, rhs: Tensor, backend: str, grad: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """Return X and the solver that was used; if `grad` is given, also the gradients of `logits` and `rhs`."""
    device = DEVICE if backend == "triton" else "cpu"
    inputs = [t.detach().clone().to(device).requires_grad_(grad is not None) for t in (logits, rhs)]
    found = landmark_solve(*inputs, backend=backend, diagnostics=True, **options)
    gradients = torch.autograd.grad(found.x, inputs, grad.to(found.x)) if grad is not None else ()
    return [t.detach().cpu() for t in (found.x, found.solver, *gradients)]


def check(logits: Tensor, rhs: Tensor, **options: Any) -> Tensor:
    """Compare values and gradients of the kernel with the reference; return the solver that was used."""
    grad = tokens(99, *rhs.shape, dtype=torch.float32)
    x, used, *gradients = run(logits, rhs, "triton", grad, **options)
    wide = [t.double() for t in (logits, rhs, grad)]
    exact_x, exact_used, *exact = run(*wide[:2], "reference", wide[2], **options)
    plain_x, _, *plain = run(logits, rhs, "reference", grad, **options)
    assert torch.equal(used, exact_used)
    assert x.dtype == torch.float32
    L = oracle.softmax(2 * tokens(5, *rhs.shape[:-2], 40, rhs.shape[-2]))
    floor = 4 * rhs.shape[-2] * torch.finfo(torch.float32).eps * exact_x.abs().max()
    lowered = (L @ x.double() - L @ exact_x).abs().max()
    assert lowered <= 4 * (L @ plain_x.double() - L @ exact_x).abs().max() + floor
    for found, other, truth in zip(gradients, plain, exact, strict=True):
        floor = 4 * rhs.shape[-2] * torch.finfo(torch.float32).eps * truth.abs().max()
        assert (found.double() - truth).abs().max() <= 4 * (other.double() - truth).abs().max() + floor
    return used


@pytest.mark.parametrize("solver", SOLVERS_OF_KERNELS)
def test_values_and_gradients(solver):
    """The sizes are not powers of two."""
    logits, rhs = problem(11, 7)
    check(logits, rhs, solver=solver, ridge=1e-2)


@pytest.mark.parametrize(("r", "d"), [(1, 3), (2, 1), (17, 18)])
@pytest.mark.parametrize("solver", ["cholesky", "lu"])
def test_sizes(solver, r, d):
    logits, rhs = problem(r, d)
    check(logits, rhs, solver=solver, ridge=1e-2)


def test_the_largest_size():
    logits, rhs = problem(128, 128, count=1)
    found = run(logits, rhs, "triton")[0]
    exact = oracle.solve(logits, rhs)
    plain = oracle.plain_solve(logits, rhs, 1e-3)
    L = oracle.softmax(tokens(3, 1, 20, 128))
    oracle.agree((L @ found.double()).float(), L @ exact, L @ plain.double())


def test_asymmetry_and_breakdown_go_to_lu_alone():
    logits, rhs = problem(5, 4, count=4)
    untouched = run(logits, rhs, "triton", solver="cholesky")[0]
    logits[1, 0, 3] += 0.4
    logits[2] = 0
    logits[2, 0, 1] = logits[2, 1, 0] = 3.0  # symmetric, indefinite
    used = check(logits, rhs)
    assert used.tolist() == [Solver.CHOLESKY, Solver.LU, Solver.LU, Solver.CHOLESKY]
    found = run(logits, rhs, "triton", solver="cholesky")[0]
    assert torch.equal(found[[0, 3]], untouched[[0, 3]])


def test_pivoting_finds_the_pivot():
    """The leading entry of W_λ is much smaller than the entries below it."""
    logits = torch.full((1, 4, 4), 0.0)
    logits[0, 0, 0] = -14.0
    logits[0, 0, 2] = 3.0
    logits[0, 1, 3] = 5.0
    logits[0, 3, 1] = 2.0
    rhs = tokens(1, 1, 4, 3, dtype=torch.float32)
    found = run(logits, rhs, "triton", solver="lu", ridge=1e-7)[0]
    oracle.agree(found, oracle.solve(logits, rhs, 1e-7), oracle.plain_solve(logits, rhs, 1e-7))


@pytest.mark.parametrize("apart", [0, 1])
def test_no_ridge_and_duplicates_are_nan(apart):
    """With `apart=1`, two rows differ by only a few rounding errors, so the last pivot is tiny instead of zero."""
    logits, rhs = problem(7, 12)
    logits[1, 0] += apart * 4e-6 * torch.linspace(-1, 1, 7)
    plain = landmark_solve(logits, rhs, solver="lu", ridge=0.0, backend="reference").x
    assert plain[1].isnan().all()
    grad = torch.ones_like(rhs)
    x, _, d_logits, d_rhs = run(logits, rhs, "triton", grad, solver="lu", ridge=0.0)
    for found in (x, d_logits, d_rhs):
        assert found[1].isnan().any()
        assert found[0].isfinite().all()
    assert x[1].isnan().all()


@pytest.mark.parametrize(
    ("solver", "bad"),
    [("cholesky", math.nan), ("lu", math.inf), ("lu", -math.inf)],
)
def test_a_non_finite_logit_is_its_own_matrix_alone(solver, bad):
    logits, rhs = problem(3, 2, count=3)
    grad = torch.ones_like(rhs)
    untouched = run(logits, rhs, "triton", grad, solver=solver)
    logits[1, 2, 0] = bad
    found = run(logits, rhs, "triton", grad, solver=solver)
    assert found[0][1].isnan().all()
    for a, b in zip(found, untouched, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    assert found[2][1].abs().max() == found[3][1].abs().max() == 0


def test_strides_leading_axes_and_half_precision():
    logits, rhs = problem(6, 5, count=4)
    check(logits.mT.contiguous().mT.view(2, 2, 6, 6), rhs.view(2, 2, 6, 5).transpose(0, 1))
    half = [t.half() for t in (logits, rhs)]
    x, _, d_logits, d_rhs = run(*half, "triton", torch.ones_like(rhs))
    assert (x.dtype, d_logits.dtype, d_rhs.dtype) == (torch.float32, torch.float16, torch.float16)
    wide = [t.float() for t in half]
    found, plain, exact = (
        x.double(),
        *(run(*t, "reference")[0].double() for t in (wide, [w.double() for w in wide])),
    )
    L = oracle.softmax(2 * tokens(5, 4, 40, 6))
    oracle.agree((L @ found).float(), L @ exact, L @ plain)


def test_it_is_launched_on_the_device_of_its_tensors(monkeypatch):
    """Triton launches on the current device, so forward and backward both switch to the device of their tensors."""
    from srm_kernels.conditioning import kernels

    entered = []

    @contextmanager
    def on_device(tensor: Tensor) -> Iterator[None]:
        entered.append(tensor.device)
        yield

    monkeypatch.setattr(kernels, "on_device", on_device)
    logits, rhs = problem(3, 2)
    run(logits, rhs, "triton", torch.ones_like(rhs))
    assert [device.type for device in entered] == [DEVICE, DEVICE]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    logits, rhs = (t.cuda() for t in problem(9, 5))
    expected = landmark_solve(logits, rhs, backend="triton").x
    found = landmark_solve(logits.to("cuda:1"), rhs.to("cuda:1"), backend="triton").x
    assert torch.equal(found.to("cuda:0"), expected)


@pytest.mark.parametrize(
    "options", [{"solver": "svd"}, {"solver": "auto"}, {"solver": "neumann"}, {"equilibrate": True}]
)
def test_a_solver_without_a_kernel_is_refused(options):
    logits, rhs = (t.to(DEVICE) for t in problem(4, 2))
    with pytest.raises(
        NotImplementedError, match="it has kernels for cholesky and lu without equilibration, not for"
    ):
        landmark_solve(logits, rhs, backend="triton", **options)


def test_what_it_has_no_form_for_is_refused():
    for r, dtype in ((129, torch.float32), (4, torch.float64)):
        logits = torch.eye(r, dtype=dtype, device=DEVICE)
        with pytest.raises(NotImplementedError, match="triton"):
            landmark_solve(logits, torch.ones(r, 2, dtype=dtype, device=DEVICE), backend="triton")


@pytest.mark.parametrize(
    ("stride", "kept"), [((1 << 30, 1), False), ((1, 1 << 30), False), ((1 << 29, 7), True)]
)
def test_a_matrix_that_32_bits_do_not_span_is_copied(stride, kept):
    from srm_kernels.conditioning.kernels import _matrices

    found = _matrices(torch.empty_strided((5, 3, 3), (1 << 33, *stride), device="meta"))
    assert found.stride() == ((1 << 33, *stride) if kept else (9, 3, 1))


def test_it_is_a_registered_operator():
    """`opcheck` tests schema, fake tensors and autograd registration of the operator with the Triton backend."""
    logits, rhs = (t.to(DEVICE).requires_grad_() for t in problem(3, 2))
    arguments = (logits, rhs, 1e-3, "cholesky", False, 1e6, 3, True, "triton")
    library.opcheck(torch.ops.srm.landmark_solve.default, arguments)


@pytest.mark.parametrize("kind", ["graded", "outlier"])
def test_elimination_needs_no_range(kind):
    """The backward error is at most 8 eps, although row sums of exp(logits) can differ by a factor above e⁸⁸.

    The number e⁸⁸ is near the largest number of fp32.
    """
    for r in (2, 7):
        keys = tokens(100 * r, 2, r, 16) * math.sqrt(0.3)
        if kind == "graded":
            keys = keys * torch.logspace(-2, 1, r, dtype=torch.float64)[:, None]
        else:
            keys[:, 0] *= 100
        logits, rhs = (keys @ keys.mT / 4).float(), tokens(1, 2, r, 5, dtype=torch.float32)
        rows = logits.logsumexp(-1)
        assert (rows.amax(-1) - rows.amin(-1) > 88).any()
        x, _ = run(logits, rhs, "triton")
        s = oracle.system(logits, rhs, 1e-3)
        size = oracle.frobenius(s.matrix) * oracle.frobenius(x) + oracle.frobenius(s.right)
        error = oracle.frobenius(s.matrix @ x.double() - s.right) / size
        assert (error <= 8 * torch.finfo(torch.float32).eps).all()
