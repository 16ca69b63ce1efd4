"""Test how the operators work with PyTorch: opcheck, compile, export, fake tensors, vmap and FLOP counters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from oracle import tokens
from torch import Tensor, library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode

from srm_kernels import (
    PooledLinks,
    adaptive_pool,
    biased_gelu,
    dyt,
    full_attention,
    gate_logits,
    gate_losses,
    gated_fusion,
    landmark_side,
    landmark_solve,
    merge_links,
    nystrom_attention,
    pooled_links,
    project_sources,
    ridge_leverage_scores,
    rms_scale,
    select_landmarks,
    tau_loss,
)
from srm_kernels.landmarks import LANDMARK_METHODS

# Only backend="triton" calls this operator. test_triton_attention.py tests it.
KERNEL_ONLY = {"srm::landmark_attention"}


def attention(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(tokens(i, 2, 2, n, 8, dtype=dtype) for i, n in enumerate((10, 7, 7)))


def solve(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    keys = oracle.landmark_family("random", 3, 2, 2, 4, 8)
    return (keys @ keys.mT / math.sqrt(8)).to(dtype), tokens(4, 2, 2, 4, 8, dtype=dtype)


def fusion(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tokens(5, 2, 3, 4, 3, 3, dtype=dtype), tokens(6, 2, 3, dtype=dtype)


def dyt_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return (
        tokens(7, 2, 5, 4, dtype=dtype),
        torch.tensor(0.5, dtype=dtype),
        tokens(8, 4, dtype=dtype),
        tokens(9, 4, dtype=dtype),
    )


def pooled(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = (2, 3, 5, 4), (8, 3), (8,), (8, 8), (2, 2, 3, 4), (1,), (8,), (8,)
    return tuple(tokens(30 + i, *s, dtype=wide if i == 4 else dtype) for i, s in enumerate(shapes))


def given(like: Tensor) -> Tensor:
    """Return landmark indices of shape (2, 2, 4) on the device of `like`. The values of `like` are not used."""
    return torch.arange(4, device=like.device).expand(2, 2, 4)


CALLS: dict[str, tuple[Callable[..., Any], Callable[..., tuple[Tensor, ...]]]] = {
    "nystrom_attention": (lambda q, k, v: nystrom_attention(q, k, v, 4, qk_norm="keys"), attention),
    "nystrom_attention diagnostics": (
        lambda q, k, v: nystrom_attention(q, k, v, 4, solver="lu", equilibrate=True, diagnostics=True),
        attention,
    ),
    "nystrom_attention with landmarks": (
        lambda q, k, v: nystrom_attention(q, k, v, 4, landmarks=given(q)),
        attention,
    ),
    "nystrom_attention heads last": (
        lambda q, k, v: nystrom_attention(
            q.transpose(1, 2).contiguous().transpose(1, 2), k.mT.contiguous().mT, v, 4
        ),
        attention,
    ),
    "landmark_solve": (lambda a, b: landmark_solve(a, b).x, solve),
    "landmark_solve diagnostics": (
        lambda a, b: landmark_solve(a, b, solver="neumann", diagnostics=True),
        solve,
    ),
    "full_attention": (full_attention, attention),
    "ridge_leverage_scores": (ridge_leverage_scores, lambda *a: attention(*a)[1:2]),
    "rms_scale": (rms_scale, lambda *a: attention(*a)[:1]),
    "dyt": (dyt, dyt_inputs),
    "biased_gelu": (
        lambda x, c: biased_gelu([x, 2 * x], [c, -c]),
        lambda *a: (fusion(*a)[0][0], dyt_inputs(*a)[2]),
    ),
    "gate_logits": (
        lambda x, c, w: gate_logits([x, 2 * x], [c, -c], [(w[None], w[:1]), (c[None], c[:1])]),
        lambda *a: (fusion(*a)[0][0], *dyt_inputs(*a)[2:]),
    ),
    "gated_fusion": (lambda m, g: tuple(gated_fusion(m, g, cap=2.0)), fusion),
    "gate_losses": (
        lambda a: gate_losses(a, entropy_floor=1.0),
        lambda dtype=torch.float32: (torch.softmax(fusion(dtype)[1], -1),),
    ),
    "landmark_side": (lambda k, v: landmark_side(k, v, 4, qk_norm="keys"), lambda *a: attention(*a)[1:]),
    "landmark_side by another solver": (
        lambda k, v: landmark_side(k, v, 4, solver="lu"),
        lambda *a: attention(*a)[1:],
    ),
    "project_sources": (
        lambda t, k, v, *dyt: project_sources(t, [k, v], [v, k], shift=dyt[1], dyt=[dyt, dyt]),
        lambda *a: (attention(*a)[0][0], pooled(*a)[3], pooled(*a)[3], *pooled(*a)[5:]),
    ),
    "pooled_links": (
        lambda f, a, b, w, k, *dyt: pooled_links(
            [f, f], [(a, b)] * 2, [w] * 2, [k] * 2, [1, 0], size=2, dyt=[dyt] * 2, xs=[k] * 2
        ),
        pooled,
    ),
    "pooled_links without DyT": (
        lambda *x: pooled_links([x[0]], [x[1:3]], [x[3]], [x[4]], [0], size=2)[:2],
        lambda *a: pooled(*a)[:5],
    ),
    "merge_links": (
        lambda f, a, b, w, x: merge_links(
            PooledLinks(x.new_ones(1, 2, 2, 4, 3), f.flatten(2).mT[:, :4], None),
            [x],
            [(a, b)],
            [w],
            [0],
            [b[0]],
            thetas=[b[:2]],
        ),
        lambda *a: pooled(*a)[:5],
    ),
    "tau_loss": (
        lambda a, b: tau_loss([a], [b.abs()], reference=2.0) + 0 * b.sum(),
        lambda *a: pooled(*a)[6:],
    ),
    "adaptive_pool": (lambda x: adaptive_pool(x, 2), lambda *a: (fusion(*a)[0][0],)),
    **{
        f"select_landmarks {m}": (
            lambda k, m=m: select_landmarks(k, 3, method=m),
            lambda *a: attention(*a)[1:2],
        )
        for m in LANDMARK_METHODS
    },
}


def leaves_of(out: Any) -> list[Tensor]:
    return [x for x in tree_leaves(out) if isinstance(x, Tensor)]


def differentiable(out: Any) -> list[Tensor]:
    return [x for x in leaves_of(out) if x.requires_grad]


class Recorder(TorchDispatchMode):
    """Record the arguments of every call of this project's operators, grouped by operator overload."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "srm":
            self.calls.setdefault(func, []).append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def record(dtype: torch.dtype) -> Recorder:
    recorder = Recorder()
    with recorder:
        for function, make in CALLS.values():
            inputs = [x.requires_grad_() for x in make(dtype)]
            outs = differentiable(function(*inputs))
            if outs:
                torch.autograd.grad(sum(o.float().sum() for o in outs), inputs, allow_unused=True)
    return recorder


def test_every_registered_operator_is_reached_by_the_public_functions_and_passes_opcheck(fresh_import):
    """opcheck tests the schema, fake tensors, autograd registration and AOT dispatch of every operator.

    Backward operators are tested without gradients, because second derivatives use the reference.
    `srm::landmark_system` is tested without gradients, because only diagnostics call it, and they carry no gradient.
    """
    recorder = record(torch.float64)
    reached = {op.name().split(".")[0] for op in recorder.calls}
    registered = {name.split(".")[0] for name in fresh_import["operators"]}
    assert reached == {name for name in registered if name.removesuffix("_backward") not in KERNEL_ONLY}
    for op, calls in recorder.calls.items():
        args, kwargs = calls[0]
        name = op.name().split(".")[0]
        constant = name.endswith("_backward") or name == "srm::landmark_system"
        copies = tree_map(
            lambda x: (
                x.detach().clone().requires_grad_(x.requires_grad and not constant)  # noqa: B023
                if isinstance(x, Tensor)
                else x
            ),
            args,
        )
        library.opcheck(op, copies, kwargs)


@pytest.mark.parametrize("name", [n for n in CALLS if n != "full_attention"])
def test_every_public_function_goes_through_a_registered_operator(name):
    """`full_attention` is not tested, because it is the baseline and calls an operator of torch."""
    function, make = CALLS[name]
    with Recorder() as recorder:
        function(*make())
    assert recorder.calls


@pytest.mark.parametrize("name", [n for n in CALLS if "select" not in n])
def test_compiles_without_graph_breaks(name):
    function, make = CALLS[name]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (function, compiled):
        inputs = [x.requires_grad_() for x in make()]
        out = f(*inputs)
        outs = differentiable(out)
        grads.append(
            [*leaves_of(out), *torch.autograd.grad(sum(o.float().square().sum() for o in outs), inputs)]
        )
    for eager, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-6)


def test_landmark_selection_compiles_without_graph_breaks():
    def choose(key: Tensor) -> list[Tensor]:
        return [select_landmarks(key, 3, method=m) for m in LANDMARK_METHODS]

    torch.compiler.reset()
    key = attention()[1]
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(key), choose(key), strict=True):
        assert torch.equal(found, expected)


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(8, 8)
        self.alpha = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = dyt(q, self.alpha, torch.ones(8), torch.zeros(8))
        y = nystrom_attention(self.project(q), k, v, 4, qk_norm="keys")
        maps = y.unsqueeze(2).expand(-1, -1, 3, -1, -1)
        return gated_fusion(maps, y.mean((2, 3)), cap=2.0).fused


def test_a_small_module_exports_with_a_dynamic_batch():
    module, inputs = Small().eval(), attention()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(module, inputs, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any(name.startswith("srm.") for name in names)
    for repeat in (1, 2):
        larger = [x.repeat(repeat, 1, 1, 1) for x in inputs]
        torch.testing.assert_close(program.module()(*larger), module(*larger))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_fake_and_meta_tensors_have_the_shapes_of_real_ones(name, dtype):
    function, make = CALLS[name]
    real = leaves_of(function(*make(dtype)))
    with FakeTensorMode() as mode:
        fake = leaves_of(function(*(mode.from_tensor(x) for x in make(dtype))))
    meta = leaves_of(function(*(x.to("meta") for x in make(dtype))))
    for r, f, m in zip(real, fake, meta, strict=True):
        assert (
            (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride()) == (m.shape, m.dtype, m.stride())
        )
        assert m.device.type == "meta"


@pytest.mark.parametrize("name", CALLS)
def test_vmap_is_the_loop(name):
    function, make = CALLS[name]
    stacked = [torch.stack([x, 0.5 * x.flip(0) if x.dim() else 0.5 * x]) for x in make(torch.float64)]
    if name == "gate_losses":
        stacked = [x / x.sum(-1, keepdim=True) for x in stacked]
    expected = [leaves_of(function(*(x[i] for x in stacked))) for i in range(2)]
    found = leaves_of(torch.func.vmap(function)(*stacked))
    for i, one in enumerate(zip(*expected, strict=True)):
        for j in range(2):
            torch.testing.assert_close(found[i][j], one[j], rtol=1e-4, atol=1e-8)


def eq30(nq: int, nk: int, r: int, d: int) -> float:
    """Return the number of multiply-accumulates of a link per image and head (article, eq. 30)."""
    return 2 * nq * r * d + 2 * r * nk * d + r * r * d + 2 * nk * d * d + d**3 / 3 + r**3 / 3 + r * r * d


@pytest.mark.parametrize(("b", "h", "nq", "nk", "r", "d"), [(2, 3, 50, 20, 8, 16), (1, 8, 1000, 256, 64, 32)])
def test_the_flop_counter_sees_the_cost_of_a_link(b, h, nq, nk, r, d):
    """A multiply-accumulate counts as two floating-point operations, as in PyTorch's own formulas."""
    q, k, v = (torch.randn(b, h, n, d, device="meta") for n in (nq, nk, nk))
    with FlopCounterMode(display=False) as counter:
        nystrom_attention(q, k, v, r)
    assert counter.get_total_flops() == pytest.approx(2 * b * h * eq30(nq, nk, r, d), rel=1e-3)


def test_fvcore_counts_multiply_accumulates():
    fvcore = pytest.importorskip("fvcore.nn")
    flops = pytest.importorskip("srm_kernels.flops")

    class Link(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nystrom_attention(q, k, v, 8)

    inputs = tuple(tokens(i, 2, 3, n, 16, dtype=torch.float32) for i, n in enumerate((50, 20, 20)))
    analysis = fvcore.FlopCountAnalysis(Link(), inputs)
    for name, handle in flops.fvcore_handles().items():
        analysis.set_op_handle(name, handle)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert analysis.total() == pytest.approx(2 * 3 * eq30(50, 20, 8, 16), rel=1e-3)


def test_the_flop_counter_sees_full_attention_and_the_backward():
    """The tensors are on the meta device, because torch has no FLOP formula for its fused CPU attention kernel."""
    q, k, v = (torch.randn(2, 3, n, 16, device="meta", requires_grad=True) for n in (50, 20, 20))
    with FlopCounterMode(display=False) as counter:
        full_attention(q, k, v)
    assert counter.get_total_flops() == 2 * 2 * 3 * 2 * 50 * 20 * 16
    with FlopCounterMode(display=False) as counter:
        y = nystrom_attention(q, k, v, 8)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert counter.get_total_flops() > 2 * forward


class Called(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


RANKED: dict[str, Callable[..., Any]] = {
    "nystrom_attention": lambda q, k, v: nystrom_attention(q, k, v, k.shape[2] // 4),
    "a constant rank": lambda q, k, v: nystrom_attention(q, k, v, 16),
    "landmark_side": lambda q, k, v: landmark_side(k, v, k.shape[2] // 4),
    "its count of landmarks": lambda q, k, v: (
        lambda index: nystrom_attention(q, k, v, index.shape[-1], landmarks=index)
    )(select_landmarks(k, k.shape[2] // 2)),
    "diagnostics": lambda q, k, v: nystrom_attention(q, k, v, k.shape[2] // 4, diagnostics=True)[0],
    **{
        f"select_landmarks {m}": lambda q, k, v, m=m: select_landmarks(k, k.shape[2] // 4, method=m)
        for m in LANDMARK_METHODS
    },
}


@pytest.mark.parametrize("name", RANKED)
def test_a_rank_from_a_shape_exports_with_dynamic_tokens(name):
    module = Called(RANKED[name])
    batch, n, m = (
        torch.export.Dim(letter, min=low, max=4096) for letter, low in (("b", 1), ("n", 8), ("m", 8))
    )
    shapes = ({0: batch, 2: n}, {0: batch, 2: m}, {0: batch, 2: m})

    def made(b: int, n: int, m: int) -> tuple[Tensor, ...]:
        return tuple(tokens(i, b, 2, size, 8, dtype=torch.float32) for i, size in enumerate((n, m, m)))

    program = torch.export.export(module, made(2, 40, 24), dynamic_shapes=(shapes,)).module()
    for sizes in ((2, 40, 24), (1, 8, 9), (3, 50, 61)):
        inputs = made(*sizes)
        for found, expected in zip(leaves_of(program(*inputs)), leaves_of(module(*inputs)), strict=True):
            torch.testing.assert_close(found, expected)


def test_a_grid_from_a_shape_exports():
    module = Called(lambda x: adaptive_pool(x, x.shape[2] // 4))
    side = torch.export.Dim("side", min=8, max=512)
    x = tokens(0, 1, 2, 24, 24, dtype=torch.float32)
    program = torch.export.export(module, (x,), dynamic_shapes=(({2: side, 3: side},),)).module()
    for size in (24, 33):
        x = tokens(size, 1, 2, size, size, dtype=torch.float32)
        torch.testing.assert_close(program(x), module(x))
