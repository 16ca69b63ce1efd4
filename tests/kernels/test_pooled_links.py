"""Test the fused neck's operators: `pooled_links`, `landmark_side`, `project_sources` and `merge_links`.

The reference is compared with the definition in fp64. The Triton kernels are compared with the reference by the rule of
`kernel_rule`. Other tests check what is kept for the backward pass, and whether results depend on the batch.

The forward pass uses only kernels of this project, so an image gives the same bits alone and in a batch. The backward
pass computes the queries by matrix products of torch, whose rounding can depend on the batch size. Gradients for an
image alone can therefore differ from its gradients in a batch, by at most 16 eps of fp32 times the largest value of the
gradient.
"""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from kernel_rule import DEVICE, DTYPES, follow_the_rule, poisoned, results_and_gradients, within
from links import SHAPES, inputs, pooled, results, schedule, several
from oracle import tokens
from torch import Tensor, library
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from srm_kernels import (
    adaptive_pool,
    landmark_side,
    merge_links,
    nystrom_attention,
    pooled_links,
    project_sources,
    select_landmarks,
)
from srm_kernels.neck import PooledLinks

pytest.importorskip("triton")
from srm_kernels.neck import backward_kernels, end_kernels, forward_kernels, launch_rules
from srm_kernels.scale import kernels as scale_kernels


@pytest.fixture(autouse=True, scope="module")
def poison():
    with poisoned(forward_kernels, backward_kernels, end_kernels, scale_kernels):
        yield


# The definition, in fp64


@pytest.mark.parametrize("dyt", [False, True])
@pytest.mark.parametrize("qk_norm", [None, "keys", "both"])
def test_by_definition(qk_norm, dyt):
    f, a, bias, w, k, x, *of_dyt = inputs(1, dtype=torch.float64, dyt=dyt)
    found = pooled(f, a, bias, w, k, *of_dyt, size=4, x=x, qk_norm=qk_norm, backend="reference")
    t = F.conv2d(f, a[:, :, None, None], bias).flatten(2).mT
    if dyt:
        t = of_dyt[1] * torch.tanh(of_dyt[0] * t) + of_dyt[2]
    q = (t @ w.mT).unflatten(-1, (2, 8)).transpose(1, 2)
    q = oracle.normalise(q) if qk_norm == "both" else q
    k = oracle.normalise(k) if qk_norm else k
    y = oracle.softmax(q @ k.mT / math.sqrt(8)) @ x
    exact = F.adaptive_avg_pool2d(y.mT.flatten(1, 2).unflatten(-1, (9, 13)), 4)
    oracle.agree((found.probabilities[0] @ x).mT.flatten(1, 2), exact.flatten(2))
    for part, of_y in zip(found.scales[0], oracle.rms(y), strict=True):
        oracle.agree(part, of_y)
    oracle.agree(found.maps.mT, F.adaptive_avg_pool2d(f, 4).flatten(2))


@pytest.mark.parametrize("dyt", [False, True])
def test_gradients_in_fp64(dyt):
    f, a, bias, w, k, _, *of_dyt = inputs(
        2, b=1, d=2, channels=2, grid=(3, 2), rank=2, dtype=torch.float64, dyt=dyt
    )
    leaves = tuple(t.requires_grad_() for t in (f, a, bias, w, k, *of_dyt))
    call = results(2, qk_norm="keys")
    assert gradcheck(call, leaves)
    if not dyt:
        assert gradgradcheck(call, leaves)


@pytest.mark.parametrize("solver", ["cholesky", "lu"])
def test_both_sides_together_are_nystrom_attention_pooled(solver):
    f, a, bias, w, *_ = inputs(3, dtype=torch.float64)
    key, value = (tokens(seed, 2, 2, 20, 8) for seed in (10, 11))
    options: dict[str, Any] = {"solver": solver, "qk_norm": "keys", "method": "uniform"}
    k, x = landmark_side(key, value, 7, **options)
    found = pooled(f, a, bias, w, k, size=3, qk_norm="keys").probabilities[0] @ x
    q = (F.conv2d(f, a[:, :, None, None], bias).flatten(2).mT @ w.mT).unflatten(-1, (2, 8)).transpose(1, 2)
    y = nystrom_attention(q, key, value, 7, **options)
    exact = F.adaptive_avg_pool2d(y.mT.flatten(1, 2).unflatten(-1, (9, 13)), 3)
    oracle.agree(found.mT.flatten(1, 2), exact.flatten(2))


# Kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("qk_norm", "dyt"), [("keys", False), (None, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, qk_norm, dyt, dtype):
    f, a, bias, w, k, _, *of_dyt = inputs(4, dtype=dtype, dyt=dyt, **SHAPES[shape])
    follow_the_rule(results(4, qk_norm=qk_norm), [f, a, bias, w, k, *of_dyt])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_absorbed_projection_is_not_rounded_to_the_maps_precision(dtype):
    """The error of P̄ is at most eps/32 times the largest value of P̄, where eps is that of the maps' dtype.

    If the absorbed projection G were rounded to the maps' dtype, the error would be about eps/4, because logits are of
    order 1. Pooling would not reduce this error, because all positions of a map share the rounding of G.
    """
    f, a, bias, w, k, _ = inputs(21, dtype=dtype, channels=20)
    found = pooled(f, a, bias, w, k, size=4, qk_norm="keys", backend="triton").probabilities
    wide = (t.double() for t in (f, a, bias, w, k))
    exact = pooled(*wide, size=4, qk_norm="keys", backend="reference").probabilities
    assert (found - exact).abs().max() <= torch.finfo(dtype).eps / 32 * exact.max()


def test_normalised_queries():
    f, a, bias, w, k, _, *of_dyt = inputs(5, dtype=DTYPES[1], dyt=True)
    follow_the_rule(results(4, qk_norm="both"), [f, a, bias, w, k])
    follow_the_rule(results(4, qk_norm="both"), [f, a, bias, w, k, *of_dyt])


@pytest.mark.parametrize("dyt", [False, True])
def test_960_channels(dyt):
    f, a, bias, w, k, _, *of_dyt = inputs(
        6, b=1, heads=1, channels=960, grid=(2, 4), dtype=torch.float16, dyt=dyt
    )
    found, exact = (
        results(2)(
            *(t.to(kind) for t in (f, a, bias, w)), k.to(wide), *(t.to(kind) for t in of_dyt), backend=backend
        )
        for backend, kind, wide in (
            ("triton", torch.float16, torch.float32),
            ("reference", torch.float64, torch.float64),
        )
    )
    plain = results(2)(f, a, bias, w, k, *of_dyt, backend="reference")
    for part in range(2):
        within(found[part], plain[part], exact[part])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dyt", [False, True])
def test_links_that_share_maps_and_differ_in_rank(dyt, dtype):
    follow_the_rule(lambda *t, backend: several(*t, backend=backend)[:2], schedule(dtype, dyt=dyt))


@pytest.mark.parametrize("dyt", [False, True])
def test_all_links_at_once_are_each_alone(dyt):
    """P̄, pool(F) and the statistics from one call with three links agree with reference calls for single links.

    The last dimension of P̄ is the largest rank; entries beyond a link's own rank are 0. Results are not compared bit
    by bit, because the size of the tiles depends on the largest rank, and determines the order of the sums.
    """
    t = schedule(dyt=dyt)
    xs = [tokens(70 + i, *k.shape, dtype=torch.float32).to(k) for i, k in enumerate(t[12:15])]
    found = several(*t, backend="triton", xs=xs)
    for link, target in enumerate((0, 0, 1)):
        own = [group[link] for group in (t[3 + 3 * i : 6 + 3 * i] for i in range((len(t) - 3) // 3))]
        plain, exact = (
            pooled(
                *(x.cpu().to(dtype) for x in (t[target], *own)), size=3, qk_norm="keys",
                x=xs[link].cpu().to(dtype), backend="reference",
            )
            for dtype in (torch.float32, torch.float64)
        )  # fmt: skip
        rank = own[3].shape[2]
        within(found.probabilities[link, ..., :rank], plain.probabilities[0], exact.probabilities[0])
        assert not found.probabilities[link, ..., rank:].any()
        for part in range(2):
            within(found.scales[link][part], plain.scales[0][part], exact.scales[0][part])
    plain, exact = (
        torch.cat([adaptive_pool(m.cpu().to(dtype), 3, backend="reference").flatten(2).mT for m in t[:3]], -1)
        for dtype in (torch.float32, torch.float64)
    )
    within(found.maps, plain, exact)


def test_parameters_may_be_wider_than_the_maps():
    """With fp16 maps and fp32 parameters, as under autocast, the parameters are first rounded to fp16.

    Gradients of the parameters are in the parameters' dtype.
    """
    f, a, bias, w, k, _, *of_dyt = inputs(18, dtype=torch.float16, dyt=True)
    narrow = results_and_gradients(lambda *t: results(4)(*t, backend="triton"), [f, a, bias, w, k, *of_dyt])
    wide = results_and_gradients(
        lambda *t: results(4)(*t, backend="triton"),
        [f, *(t.float() for t in (a, bias, w)), k, *(t.float() for t in of_dyt)],
    )
    for one, other in zip(narrow, wide, strict=True):
        assert other.dtype in (one.dtype, torch.float32)
        torch.testing.assert_close(other.to(one.dtype), one, rtol=0, atol=float(one.abs().max()) * 2**-10)


@pytest.mark.parametrize("grid", [(9, 13), (3, 70), (2, 3)])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dyt", [False, True])
def test_the_statistic(dyt, offset, grid):
    """The statistic is also accurate for an X of mean 1000.

    For this X, the formula E[Y²] − E[Y]² would lose all digits in fp32. The relative tolerance of the RMS is 1e-3,
    because each term of the RMS contains the rounding error of a value near 1000.
    """
    f, a, bias, w, k, x, *of_dyt = inputs(7, grid=grid, dyt=dyt)
    x += offset
    arguments = [f, a, bias, w, k, *of_dyt]
    found = pooled(*arguments, size=4, x=x, backend="triton").scales[0]
    exact = pooled(*(t.double() for t in arguments), size=4, x=x.double(), backend="reference").scales[0]
    plain = pooled(*arguments, size=4, x=x, backend="reference").scales[0]
    if offset:
        torch.testing.assert_close(found.mean.double(), exact.mean, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.rms.double(), exact.rms, rtol=1e-3, atol=0)
    else:
        for part in range(2):
            within(found[part], plain[part], exact[part])
    assert not found.rms.requires_grad


@pytest.mark.parametrize("dyt", [False, True])
def test_channels_last_and_expanded_maps(dyt):
    f, a, bias, w, k, _, *of_dyt = inputs(8, dyt=dyt)
    call, rest = results(4), [a, bias, w, k, *of_dyt]
    follow_the_rule(call, [f.contiguous(memory_format=torch.channels_last), *rest])
    follow_the_rule(lambda m, *t, backend: call(m.expand_as(f), *t, backend=backend), [f[:1], *rest])


@pytest.mark.parametrize("dyt", [False, True])
def test_an_image_alone_and_in_a_batch(dyt):
    f, a, bias, w, k, _, *of_dyt = inputs(9, b=3, dyt=dyt)

    upstream = tokens(90, 1, 3, 2, 16, 5).float().to(DEVICE), tokens(91, 3, 16, 6).float().to(DEVICE)

    def run(f: Tensor, k: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (f, k)]
        found = results(4)(leaves[0], a, bias, w, leaves[1], *of_dyt, backend="triton")
        given = [upstream[0][:, : len(f)], upstream[1][: len(f)]]
        return [*found, *torch.autograd.grad(found, leaves, given)]

    together = run(f, k)
    other = run(torch.cat([f[:1], 2 * f[1:]]), torch.cat([k[:1], -k[1:]]))
    of_first = [lambda t: t[0, 0], *[lambda t: t[0]] * 3]  # dimension 0 of P̄ is the link
    for one, two, first in zip(together, other, of_first, strict=True):
        assert torch.equal(first(one), first(two))  # the values of other images have no influence
    alone = run(f[:1], k[:1])
    for number, (whole, one, first) in enumerate(zip(together, alone, of_first, strict=True)):
        if number < 2:
            assert torch.equal(first(whole), first(one))
        limit = 16 * torch.finfo(torch.float32).eps * first(whole).abs().max()
        assert (first(whole) - first(one)).abs().max() <= limit


@pytest.mark.parametrize("dyt", [False, True])
def test_nan_stays_in_its_image_and_head(dyt):
    f, a, bias, w, k, _, *of_dyt = inputs(10, dyt=dyt)
    expected = pooled(f, a, bias, w, k, *of_dyt, size=4, backend="triton").probabilities[0]
    f[0, 1, 2, 3] = math.nan
    k[1, 1, 2] = math.nan
    found = pooled(f, a, bias, w, k, *of_dyt, size=4, backend="triton").probabilities[0]
    assert found[0].isnan().any(-1).any(-1).all()
    assert found[1, 1].isnan().all()
    assert torch.equal(found[1, 0], expected[1, 0])


@pytest.mark.parametrize("dyt", [False, True])
def test_the_same_to_the_bit_every_time(dyt):
    f, a, bias, w, k, _, *of_dyt = inputs(11, grid=(3, 70), dyt=dyt)
    runs = [
        results_and_gradients(lambda *t: results(4)(*t, backend="triton"), [f, a, bias, w, k, *of_dyt])
        for _ in range(50 if DEVICE == "cuda" else 2)
    ]
    assert all(torch.equal(x, y) for run in runs for x, y in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dyt", [False, True])
def test_what_is_kept_for_the_backward_pass_is_the_map_and_small_things(dyt):
    """Autograd keeps F for the backward pass; the other kept tensors have at most half as many elements in total.

    The tokens, queries and probabilities of all positions are not kept.
    """
    f, a, bias, w, k, x, *of_dyt = inputs(12, b=1, grid=(24, 32), channels=8, dyt=dyt)
    leaves = [t.requires_grad_() for t in (f, a, bias, w, k, *of_dyt)]
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        results(2, x=x)(*leaves, backend="triton")
    assert f.data_ptr() in kept
    assert sum(t.numel() for t in kept.values()) <= 1.5 * f.numel()


def test_nothing_of_full_resolution_is_written_in_the_forward_pass(monkeypatch):
    """With and without DyT, the kernels write outputs and workspaces of less than a quarter of the map's size in total.

    No operator of torch returns a tensor as large as the map. T and Q would each be twice as large as the map.
    """
    sizes: list[int] = []
    plain = forward_kernels.empty

    def counted(*arguments: Any) -> Tensor:
        made = plain(*arguments)
        sizes.append(made.numel())
        return made

    monkeypatch.setattr(forward_kernels, "empty", counted)
    for dyt in (False, True):
        f, a, bias, w, k, x, *of_dyt = inputs(
            19, b=1, channels=8, heads=2, d=8, grid=(40, 48), rank=4, dyt=dyt
        )
        with torch.no_grad(), Allocations() as seen:
            pooled(f, a, bias, w, k, *of_dyt, size=2, x=x, backend="triton")
        assert sum(sizes) < f.numel() / 4
        assert seen.largest < f.numel()
        sizes.clear()


class Allocations(TorchDispatchMode):
    """Record the number of elements of the largest tensor that an operator of torch returns.

    If a matrix product of torch computed the tokens or queries of a whole map, the number would exceed the limit that
    the test sets.
    """

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple) else (made,):
            if isinstance(t, Tensor):
                self.largest = max(self.largest, t.numel())
        return made


def test_opcheck():
    f, a, bias, w, k, x, *of_dyt = (
        [t.requires_grad_()] for t in inputs(13, b=1, heads=1, grid=(5, 4), dyt=True)
    )
    operator = torch.ops.srm.pooled_links.default
    for dyt in (of_dyt, ([],) * 3):
        arguments = (f, a, bias, *dyt, w, k, [x[0].detach()], [0], 2, 0.3, "keys", "triton")
        library.opcheck(operator, arguments, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", [16, 32, 64])
@pytest.mark.parametrize("size", [1, 3, 8, 32])
def test_strips_are_whole_cells_that_fit_in_their_tiles(size, positions):
    """The number of strips is the smallest for which every strip fits in one tile.

    If a cell is wider than a tile, each strip is one cell, and several tiles cover it.
    """
    for width in (1, 2, 7, 16, 17, 31, 64, 70, 128, 300):
        strips = launch_rules.strips_of(width, size, positions)

        def widest(cells: int, width: int = width) -> int:
            starts = range(0, size, cells)
            stops = [-(-min(j + cells, size) * width // size) for j in starts]
            return max(stop - j * width // size for j, stop in zip(starts, stops, strict=True))

        assert (strips.strips - 1) * strips.cells < size <= strips.strips * strips.cells
        assert widest(strips.cells) <= strips.across * strips.columns < 2 * widest(strips.cells) + positions
        assert strips.columns <= positions
        assert strips.across == 1 or strips.cells == 1
        wider = [c for c in range(strips.cells + 1, size + 1) if -(-size // c) < strips.strips]
        assert all(widest(c) > positions for c in wider)


# The first and the last step: project_sources and merge_links


def sources(seed: int, dtype: torch.dtype = torch.float32, *, links: int = 2, b: int = 2) -> list[Tensor]:
    """Return one list: T, then W_K of all links, all W_V, all α, all weights and all biases of DyT."""
    C = 24
    shapes = [(C, C), (C, C), (1,), (C,), (C,)]
    made = [tokens(seed, b, 70, C, dtype=dtype)]
    for i, shape in enumerate(shape for shape in shapes for _ in range(links)):
        made.append(tokens(seed + 1 + i, *shape, dtype=dtype, scale=C**-0.5 if len(shape) == 2 else 0.7))
    return [t.to(DEVICE) for t in made]


def projected(*t: Tensor, shift: Tensor | None = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
    L = 2
    groups = [t[1 + L * i : 1 + L * (i + 1)] for i in range((len(t) - 1) // L)]
    return project_sources(
        t[0],
        groups[0],
        groups[1],
        shift=shift,
        dyt=list(zip(*groups[2:], strict=True)) or None,
        backend=backend,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dyt", [False, True])
def test_keys_and_values_of_all_links_of_a_source(dyt, dtype):
    made = sources(60, dtype)
    follow_the_rule(projected, made if dyt else made[:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dyt", [False, True])
def test_a_shift_of_the_tokens_is_taken_in_on_the_way(dyt, dtype):
    made = sources(64, dtype)
    shift = tokens(65, 24, dtype=dtype).to(DEVICE)

    def call(shift: Tensor, *t: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        return projected(*t, shift=shift, backend=backend)

    follow_the_rule(call, [shift, *(made if dyt else made[:5])])
    shifted = projected(made[0] + shift, *made[1:], backend="triton")
    for found, expected in zip(call(shift, *made, backend="triton"), shifted, strict=True):
        assert torch.equal(found, expected)


def test_keys_and_values_by_definition():
    t, k0, k1, v0, v1, a0, a1, w0, w1, b0, b1 = sources(61, torch.float64)
    keys, values = projected(t, k0, k1, v0, v1, a0, a1, w0, w1, b0, b1, backend="reference")
    for link, (k, v, a, w, b) in enumerate(((k0, v0, a0, w0, b0), (k1, v1, a1, w1, b1))):
        squashed = w * torch.tanh(a * t) + b
        oracle.agree(keys[link], squashed @ k.mT)
        oracle.agree(values[link], squashed @ v.mT)


def test_a_source_may_have_any_strides_and_any_batch():
    made = sources(62, b=3)
    strided = made[0].mT.contiguous().mT
    whole, other = projected(*made, backend="triton"), projected(strided, *made[1:], backend="triton")
    alone = projected(made[0][:1], *made[1:], backend="triton")
    for x, y, z in zip(whole, other, alone, strict=True):
        torch.testing.assert_close(x, y)  # for other strides, torch may use other code
        assert torch.equal(x[:, :1], z)


def merged(*t: Tensor, tau: bool = True, backend: str | None = None) -> Tensor:
    """Merge two links of different ranks into the second of two maps."""
    pooled, probabilities, x0, x1, a0, a1, b0, b1, w0, w1, beta0, beta1, *thetas = t
    return merge_links(
        PooledLinks(probabilities, pooled, None), [x0, x1], [(a0, b0), (a1, b1)], [w0, w1], [1, 1],
        [beta0, beta1], thetas=thetas if tau else None, backend=backend,
    )  # fmt: skip


def ends(
    seed: int,
    dtype: torch.dtype = torch.float32,
    *,
    b: int = 2,
    size: int = 3,
    rank: int = 5,
    tau: bool = True,
) -> list[Tensor]:
    H, d, wide = 2, 12, torch.float64 if dtype == torch.float64 else torch.float32
    C, P = H * d, size * size
    shapes = [
        (b, P, 9),
        (2, b, H, P, rank),
        (b, H, rank, d),
        (b, H, 3, d),
        (C, 4),
        (C, 5),
        (C,),
        (C,),
        (C, C),
        (C, C),
        (1,),
        (1,),
        (H,),
        (H,),
    ]
    made = [
        tokens(
            seed + i,
            *shape,
            dtype=wide if 1 <= i <= 3 else dtype,
            scale=shape[-1] ** -0.5 if len(shape) == 2 else 1,
        )
        for i, shape in enumerate(shapes)
    ]
    return [t.to(DEVICE) for t in (made if tau else made[:12])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tau", [False, True])
def test_the_merged_maps(tau, dtype):
    follow_the_rule(lambda *t, backend: merged(*t, tau=tau, backend=backend), ends(70, dtype, tau=tau))


def test_merged_maps_of_more_landmarks_than_are_read_at_once():
    follow_the_rule(merged, ends(74, DTYPES[1], b=1, rank=70))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_what_cancels_in_a_sum_over_landmarks_is_taken_in_fp32(dtype):
    """Two rows of X are nearly opposite and much larger than the product P̄ X, in which they cancel.

    If X were rounded to the maps' dtype, the error of P̄ X would be about a tenth of P̄ X.
    """
    made = ends(75, dtype)
    apart = made[2][:, :, :1] / (4 * torch.finfo(dtype).eps)
    made[2][:, :, :2] += torch.cat([apart, -apart], 2)
    made[1][0, ..., :2] = 0.5
    follow_the_rule(merged, made)


def test_the_merged_maps_by_definition():
    p, probabilities, x0, x1, a0, a1, b0, b1, w0, w1, beta0, beta1, t0, t1 = made = ends(71, torch.float64)
    found = merged(*made, backend="reference").flatten(3).mT
    oracle.agree(found[:, 0], p[..., :4] @ a0.mT + b0)
    update = 0
    for link, (x, w, theta, beta) in enumerate(((x0, w0, t0, beta0), (x1, w1, t1, beta1))):
        y = theta.exp()[:, None, None] * (probabilities[link, ..., : x.shape[2]] @ x)
        update = update + beta * (y.transpose(1, 2).flatten(2) @ w.mT)
    oracle.agree(found[:, 1], p[..., 4:] @ a1.mT + b1 + update)


def test_merged_maps_of_an_image_alone_and_in_a_batch():
    made = ends(72, b=3, size=8)
    whole = merged(*made, backend="triton")
    made[0], made[1] = made[0][:1], made[1][:, :1]
    made[2:4] = [x[:1] for x in made[2:4]]
    assert torch.equal(merged(*made, backend="triton"), whole[:1])


@pytest.mark.parametrize("method", ["leverage", "uniform"])
def test_the_key_side_alone(method):
    """K̃ is a bit-for-bit copy of the selected keys. X agrees with the reference for the same landmarks."""
    key, value = (tokens(seed, 2, 2, 20, 8, dtype=torch.float32).to(DEVICE) for seed in (14, 15))
    options: dict[str, Any] = {"method": method, "qk_norm": "keys"}
    k, x = landmark_side(key, value, 7, backend="triton", **options)
    index = select_landmarks(oracle.normalise(key), 7, method=method)
    assert torch.equal(k.cpu(), oracle.gather(key.cpu(), index.cpu()))
    exact = landmark_side(
        key.double(), value.double(), 7, landmarks=index, qk_norm="keys", backend="reference"
    )[1]
    plain = landmark_side(key, value, 7, landmarks=index, qk_norm="keys", backend="reference")[1]
    within(x, plain, exact)


def wrong(**changed: Any) -> Any:
    f, a, bias, w, k, x = (t.cpu() for t in inputs(16))
    given = {
        "maps": [f], "align": [(a, bias)], "query_weights": [w], "keys": [k], "targets": [0], "size": 4, "xs": [x],
    } | changed  # fmt: skip
    first = [given.pop(name) for name in ("maps", "align", "query_weights", "keys", "targets")]
    return pooled_links(*first, **given)


ONE, SIXTEEN = torch.ones(1), torch.ones(16)
WRONG: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "at least one of each": (ValueError, {"maps": []}),
    "expected one for every link": (ValueError, {"targets": [0, 0]}),
    "expected indices of maps": (ValueError, {"targets": [1]}),
    "align is torch.float16.*or a wider dtype": (TypeError, {"align": [(torch.ones(16, 6).half(), SIXTEEN)]}),
    "expected keys in torch.float32": (
        TypeError,
        {"keys": [torch.ones(2, 2, 5, 8, dtype=torch.float64)], "xs": None},
    ),
    r"expected \(16, 6\)": (ValueError, {"align": [(torch.ones(16, 7), SIXTEEN)]}),
    r"expected \(16, 16\)": (ValueError, {"query_weights": [torch.ones(16, 8)]}),
    r"expected \(B, C_i": (ValueError, {"maps": [torch.ones(2, 6, 4)]}),
    r"expected \(B, H, r, d\)": (ValueError, {"keys": [torch.ones(3, 2, 5, 8)]}),
    "expected the same": (ValueError, {"xs": [torch.ones(2, 2, 5, 4)]}),
    "at least 1": (ValueError, {"size": 0}),
    "qk_norm": (ValueError, {"qk_norm": "queries"}),
    "dyt is torch.float16.*or a wider dtype": (
        TypeError,
        {"dyt": [(ONE.half(), SIXTEEN.half(), SIXTEEN.half())]},
    ),
    r"dyt has shape \(8,\); expected \(16,\)": (ValueError, {"dyt": [(ONE, torch.ones(8), SIXTEEN)]}),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_is_rejected_before_any_launch(message):
    kind, changed = WRONG[message]
    with pytest.raises(kind, match=message):
        wrong(**changed)


def test_bad_input_of_the_two_ends():
    made = [t.cpu() for t in sources(63)]
    with pytest.raises(ValueError, match=r"expected \(B, N, C\)"):
        projected(made[0][0], *made[1:])
    with pytest.raises(ValueError, match="expected one for every link"):
        project_sources(made[0], made[1:3], made[3:4])
    with pytest.raises(ValueError, match=r"shift has shape \(8,\); expected \(24,\)"):
        projected(*made, shift=torch.ones(8))
    with pytest.raises(ValueError, match=r"key_weights has shape .*expected \(24, 24\)"):
        projected(made[0], torch.ones(24, 8), *made[2:])
    given = [t.cpu() for t in ends(73)]
    with pytest.raises(ValueError, match=r"expected \(2, 2, up to 5, d\)"):
        merged(*given[:2], given[2][:1], *given[3:])
    with pytest.raises(ValueError, match="align reads 8 channels; expected 9"):
        merged(*given[:4], torch.ones(24, 3), *given[5:])
    with pytest.raises(TypeError, match=r"output_weights is torch\.float16"):
        merged(*given[:8], given[8].half(), *given[9:])


def test_what_the_kernels_cannot_take_is_refused_with_the_reason():
    f, a, bias, w, k, _ = inputs(17)
    with pytest.raises(NotImplementedError, match=r"triton.*P up to 32"):
        pooled(f, a, bias, w, k, size=33, backend="triton")
    wide = [t.double() for t in (f, a, bias, w, k)]
    with pytest.raises(NotImplementedError, match=r"triton.*float64"):
        pooled(*wide, size=4, backend="triton")
    with pytest.raises(NotImplementedError, match=r"triton.*float64"):
        landmark_side(wide[-1], wide[-1], 3, backend="triton")
    f, a, bias, w, k, _ = inputs(17, heads=3, d=100, rank=4, b=1, grid=(2, 2))
    with pytest.raises(NotImplementedError, match=r"triton.*C up to 256 .*and C is 300"):
        pooled(f, a, bias, w, k, size=2, qk_norm="both", backend="triton")
