"""Compare the operators on a CUDA device with the fp64 reference on the CPU.

Without a CUDA device, all tests are skipped. Unless a test uses another tolerance, the error is at most twice the
error of the same operator in the same dtype on the CPU, plus 32 eps times the largest entry of the exact result.
"""

from __future__ import annotations

import pytest
import torch
from kernel_rule import follow_the_rule
from links import inputs, results

from srm_kernels import (
    dyt,
    full_attention,
    gated_fusion,
    landmark_solve,
    nystrom_attention,
    rms_scale,
    select_landmarks,
)
from srm_kernels.neck import batched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SPREAD = torch.arange(0, 40, 5).expand(2, 2, 8).contiguous()  # landmarks for both devices


def tokens(count, seed, dtype=torch.float64):
    return torch.randn(
        2, 2, count, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def agree(found, same_on_cpu, exact, dtype):
    floor = 32 * torch.finfo(dtype).eps * exact.abs().max()
    error = (found.double().cpu() - exact).abs().max()
    return bool(error <= 2 * (same_on_cpu.double() - exact).abs().max() + floor)


OPERATORS = {
    "nystrom": lambda q, k, v, index: nystrom_attention(q, k, v, 8, landmarks=index, qk_norm="keys"),
    "nystrom reference": lambda q, k, v, index: nystrom_attention(
        q, k, v, 8, landmarks=index, qk_norm="keys", backend="reference"
    ),
    "full": lambda q, k, v, index: full_attention(q, k, v),
    "rms_scale": lambda q, k, v, index: rms_scale(q).rms,
    "dyt": lambda q, k, v, index: dyt(q, q[0, 0, 0, :1], q[0, 0, 1], q[0, 0, 2]),
    "gated_fusion": lambda q, k, v, index: (
        gated_fusion(torch.stack([k, v], 1), k[:, 0, :2, 0], cap=3.0).fused
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_values_and_gradients(name, dtype):
    operator = OPERATORS[name]
    wide = [tokens(n, seed).to(dtype).double() for seed, n in enumerate((37, 40, 40))]

    def run(device, kind):
        inputs = [t.to(device, kind).requires_grad_() for t in wide]
        result = operator(*inputs, SPREAD.to(device))
        weight = torch.linspace(-1, 1, result.numel(), device=device).view_as(result).to(result.dtype)
        gradients = torch.autograd.grad((result * weight).sum(), inputs, allow_unused=True)
        return [result, *(g for g in gradients if g is not None)]

    for found, plain, exact in zip(
        run("cuda", dtype), run("cpu", dtype), run("cpu", torch.float64), strict=True
    ):
        assert found.is_cuda
        assert agree(found.detach(), plain.detach(), exact.detach(), dtype)


@pytest.mark.parametrize("dyt", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_links_in_tiles_follow_the_rule_and_take_less_memory(dtype, dyt, monkeypatch):
    """Peak memory with tiles is at most a quarter of the peak memory of the reference backend.

    The probabilities that the reference stores take 8 MiB in fp32.
    """
    monkeypatch.setattr(batched, "POSITIONS", 256)
    f, a, bias, w, k, _, *of_dyt = inputs(1, dtype=dtype, dyt=dyt, grid=(128, 128), rank=32, device="cuda")
    call, peaks = results(4, qk_norm="keys"), {}
    follow_the_rule(call, [f, a, bias, w, k, *of_dyt], backend="torch")
    for backend in ("torch", "reference"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(f, a, bias, w, k, *of_dyt, backend=backend)
        peaks[backend] = torch.cuda.max_memory_allocated() - before
    assert peaks["torch"] <= peaks["reference"] / 4


@pytest.mark.parametrize("solver", ["cholesky", "lu", "svd", "auto", "neumann"])
def test_every_solver(solver):
    key = torch.nn.functional.normalize(tokens(32, 5), dim=-1) * 24**0.5
    logits, rhs = key @ key.mT / 24**0.5, tokens(32, 6)
    exact = landmark_solve(logits, rhs, solver=solver).x
    found = landmark_solve(logits.cuda(), rhs.cuda(), solver=solver, diagnostics=True)
    assert torch.allclose(found.x.cpu(), exact, rtol=1e-8, atol=1e-8)
    assert found.residual.max() < (1e-2 if solver == "neumann" else 1e-10)  # the series is truncated


@pytest.mark.parametrize(
    ("solver", "backend"), [("lu", "reference"), ("lu", "triton"), ("cholesky", "triton")]
)
def test_solvers_that_do_not_wait_for_the_device(solver, backend):
    key = torch.nn.functional.normalize(tokens(32, 5, torch.float32), dim=-1).cuda() * 24**0.5
    logits, rhs = key @ key.mT / 24**0.5, tokens(32, 6, torch.float32).cuda()
    options = {
        "solver": solver,
        "backend": backend,
        "diagnostics": "estimate" if backend == "reference" else False,
    }
    landmark_solve(logits, rhs, **options)  # warm-up: initialises the libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        landmark_solve(logits, rhs, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("solver", ["cholesky", "lu", "svd", "auto", "neumann"])
@pytest.mark.parametrize(("r", "d"), [(5, 7), (64, 32), (128, 128)])
def test_the_triton_solve_in_a_graph(r, d, solver):
    """Capture the forward and backward passes in a CUDA graph, and replay the graph with new input values.

    X and the gradients agree with the reference backend.
    """
    shape = (3, r, d)
    make = torch.Generator().manual_seed(r)

    def inputs():
        key = torch.nn.functional.normalize(torch.randn(shape, generator=make), dim=-1) * d**0.5
        return (key @ key.mT / d**0.5).cuda(), torch.randn(shape, generator=make).cuda()

    def solve(logits, rhs, backend):
        logits, rhs = logits.detach().requires_grad_(), rhs.detach().requires_grad_()
        x = landmark_solve(logits, rhs, solver=solver, ridge=1e-2, kappa_max=200.0, backend=backend).x
        return x, *torch.autograd.grad(x.sum(), (logits, rhs))

    static = inputs()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        solve(*static, "triton")  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        found = solve(*static, "triton")
    for old, new in zip(static, inputs(), strict=True):
        old.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    same = solve(*static, "reference")
    exact = solve(*(t.double() for t in static), "reference")
    for a, b, c in zip(found, same, exact, strict=True):
        assert agree(a.detach(), b.detach().cpu(), c.detach().cpu(), torch.float32)


@pytest.mark.parametrize("method", ["leverage", "leverage_sample", "uniform", "kmeans++", "pivoted_cholesky"])
def test_landmarks_are_the_same_on_both_devices(method):
    key = tokens(64, 7)
    assert torch.equal(
        select_landmarks(key.cuda(), 9, method=method).cpu(), select_landmarks(key, 9, method=method)
    )


def test_runs_on_a_side_stream():
    q, k, v = (tokens(n, seed, torch.float32).cuda() for seed, n in enumerate((37, 40, 40)))
    expected = nystrom_attention(q, k, v, 16, qk_norm="keys")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = nystrom_attention(q, k, v, 16, qk_norm="keys")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)
