"""Test the Triton kernels on a CUDA device; all tests are skipped without one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from srm_kernels import nystrom_attention, select_landmarks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
METHODS = ("leverage", "uniform", "pivoted_cholesky")


def inputs(
    b: int = 2, h: int = 4, nq: int = 300, nk: int = 200, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    draw = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(b, h, n, 32, generator=draw, device="cuda").to(dtype) for n in (nq, nk, nk)]


def forward_and_backward(
    tensors: list[Tensor], method: str = "leverage", solver: str = "cholesky"
) -> list[Tensor]:
    y = nystrom_attention(*tensors, 32, method=method, solver=solver, qk_norm="keys", backend="triton")
    return [y, *torch.autograd.grad(y.float().square().sum(), tensors)]


@pytest.mark.parametrize("solver", ["cholesky", "lu"])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_the_device(method, solver):
    tensors = [x.requires_grad_() for x in inputs()]

    def run() -> None:
        forward_and_backward(tensors, method, solver)
        nystrom_attention(*tensors, 32, solver=solver, diagnostics="estimate", backend="triton")

    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rank", "d"), [(128, 128), (65, 64), (32, 128), (128, 8)])
def test_the_largest_tiles_run_and_are_the_references(rank, d, dtype):
    """The error is at most twice that of the reference in the same dtype, plus 32 eps times the largest exact entry."""
    draw = torch.Generator("cuda").manual_seed(0)
    tensors = [torch.randn(1, 2, n, d, generator=draw, device="cuda").to(dtype) for n in (300, 200, 200)]
    index = select_landmarks(tensors[1], rank, method="uniform")

    def run(backend: str, kind: torch.dtype) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in tensors]
        y = nystrom_attention(*leaves, rank, landmarks=index, qk_norm="both", backend=backend)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    exact = run("reference", torch.float64)
    for found, plain, e in zip(run("triton", dtype), run("reference", dtype), exact, strict=True):
        floor = 32 * torch.finfo(dtype).eps * e.abs().max()
        assert (found.double() - e).abs().max() <= 2 * (plain.double() - e).abs().max() + floor


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("nk", [200, 2000])
def test_a_graph_is_captured_and_replayed_with_changed_inputs(nk, method):
    tensors = [x.requires_grad_() for x in inputs(nk=nk)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_and_backward(tensors, method)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_and_backward(tensors, method)
    with torch.no_grad():
        for x in tensors:
            x.copy_(0.5 * x.flip(2))
    graph.replay()
    for found, expected in zip(captured, forward_and_backward(tensors, method), strict=True):
        assert torch.equal(found, expected)


def test_a_side_stream_gives_the_same():
    tensors = [x.requires_grad_() for x in inputs()]
    expected = forward_and_backward(tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = forward_and_backward(tensors)
    torch.cuda.current_stream().wait_stream(stream)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one():
    tensors = inputs()
    expected = nystrom_attention(*tensors, 32, backend="triton")
    found = nystrom_attention(*(x.to("cuda:1") for x in tensors), 32, backend="triton")
    assert torch.equal(found.to("cuda:0"), expected)


def test_more_heads_than_a_grid_axis_holds():
    """The results of the first and the last of 70,000 pairs (b, h) are correct.

    CUDA limits the size of grid axes y and z to 65,535.
    """
    one = inputs(b=1, h=1, nq=16, nk=16)
    many = [x.expand(70_000, 1, -1, -1) for x in one]
    y = nystrom_attention(*many, 8, backend="triton")
    assert torch.equal(y[[0, -1]], nystrom_attention(*one, 8, backend="triton").expand(2, -1, -1, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_are_taken_by_name_and_by_none_not_yet(dtype):
    tensors = inputs(dtype=dtype)
    names = {}
    for backend in ("triton", None):
        nystrom_attention(*tensors, 32, backend=backend)  # compiles
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            nystrom_attention(*tensors, 32, backend=backend)
            torch.cuda.synchronize()
        names[backend] = " ".join(event.key for event in profile.key_averages())
    assert "_context_kernel" in names["triton"]
    assert "_forward_kernel" in names["triton"]
    assert "_context_kernel" not in names[None]


def test_landmarks_agree_with_the_reference_where_scores_do_not_tie():
    """At least 99 % of the landmarks agree, because at most 1 % of random keys have scores that tie within rounding."""
    key = torch.randn(4, 8, 1000, 32, device="cuda", dtype=torch.float32)
    for method in METHODS:
        found = select_landmarks(key, 32, method=method, backend="triton")
        expected = select_landmarks(key, 32, method=method, backend="reference")
        pairs = zip(found.flatten(0, 1).tolist(), expected.flatten(0, 1).tolist(), strict=True)
        same = [len(set(f) & set(e)) for f, e in pairs]
        assert sum(same) >= 0.99 * 32 * len(same)


def test_memory_beyond_the_output_does_not_grow_with_the_queries():
    """The extra memory is at most 16 r (r + d) fp32 numbers per head, for 4,096 queries and for 65,536."""
    extra = []
    for nq in (4096, 65_536):
        tensors = inputs(b=1, nq=nq)
        nystrom_attention(*tensors, 32, backend="triton")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = nystrom_attention(*tensors, 32, backend="triton")
        extra.append(torch.cuda.max_memory_allocated() - before - math.prod(y.shape) * y.element_size())
    assert max(extra) <= 4 * 16 * 32 * (32 + 32) * 4
    assert abs(extra[1] - extra[0]) <= 2**16
